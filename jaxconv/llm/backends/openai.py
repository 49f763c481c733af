"""Any endpoint that speaks OpenAI's chat completions: a provider, vLLM, SGLang, Ollama."""

import email.utils
import json
import math
import os
import re
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from jaxconv.errors import Failed, Refused
from jaxconv.llm.backends.base import Answer, Call
from jaxconv.llm.backends.dialect import Dialect, Status
from jaxconv.llm.failures import NO_TOKENS, CallFailed, Failure
from jaxconv.llm.prices import Price

STRUCTURED = ("auto", "schema", "text")
_SECRET = 12  # characters of a key
_SHOWN = 300  # characters of what a server says of an error
_MAYBE_PAID = (408, 502, 504, 520, 524)  # what a proxy says of an answer that did not reach it
_NO_CREDIT = ("insufficient_quota", "billing_hard_limit_reached")
_MOST_TOKENS = 2**32  # of a call; a server that counts more miscounts, and SQLite cannot add it up


class OpenAI:
    """A model at an endpoint, through the `openai` client (extra `llm`).

    Args:
        model: its name there.
        base_url: of the endpoint, such as `http://localhost:8000/v1`; "" is OpenAI's own.
        api_key_env: the environment variable that has the key. An endpoint of your own needs none.
        structured: "schema" sends the JSON schema along, so that the server lets the model write
            nothing else; "text" does not; "auto" does until the server refuses it. The schema is in
            the messages and the answer is checked, whichever it is.
        price: of the model's tokens.

    Attributes:
        notes: what a reader of the results has to know of the endpoint.
        base_url, key: of the endpoint; the key is written nowhere.
        structured: as given.
        dialect: what the endpoint understands, as far as it is known.

    Raises:
        Refused: credentials in the URL, no such client, no key.
    """

    is_model = True

    def __init__(
        self,
        model: str,
        *,
        base_url: str = "",
        api_key_env: str = "OPENAI_API_KEY",
        structured: str = "auto",
        price: Price | None = None,
    ):
        if structured not in STRUCTURED:
            raise Refused(f"structured={structured!r}; it may be {', '.join(STRUCTURED)}")
        self.model, self.price = model, price
        self.notes: list[str] = []
        self.base_url = checked_url(base_url)
        self.key = api_key(api_key_env, needed=not base_url)
        self._api_key_env, self.structured = api_key_env, structured
        self.dialect = Dialect(schema=structured != "text")
        _client_module()

    def __getstate__(self) -> dict[str, Any]:
        """All but the client and the key, which is taken from the environment where this goes."""
        state = {name: value for name, value in self.__dict__.items() if name != "_client"}
        return state | {"key": bool(self.key)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.key = api_key(self._api_key_env, needed=state["key"])
        _client_module()

    async def __aenter__(self) -> "OpenAI":
        self._client = make_client(self.base_url, self.key)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._client.close()

    async def ask(self, call: Call) -> Answer:
        """The answer to one call.

        Raises:
            CallFailed: there is none.
            Refused: the endpoint does not take the key or does not know the model.
            Failed: the account has no credit.
        """
        dialect = self.dialect
        while True:
            try:
                reply = await self._post(dialect.body(call))
            except Status as status:
                other = dialect.other(status, schema=self.structured == "auto")
                if other is None:
                    raise failed_call(status, self.key) from None
                dialect = other
            else:
                self.learn(dialect)
                return answer_of(reply)

    async def _post(self, body: Mapping[str, Any]) -> Any:
        """The server's JSON to a request.

        Raises:
            Status: it answered with a status that says no.
            CallFailed: it did not answer, or not with JSON.
        """
        openai = _client_module()
        try:
            # Not `chat.completions.create`: walking through a request's types takes it as much
            # processor time as all the rest of a call.
            text = await self._client.post("/chat/completions", cast_to=str, body=body)
        except openai.APIConnectionError as error:
            # One that calls itself a timeout included: there is none in the client, and its aiohttp
            # transport gives that name to a server that nobody is at.
            raise CallFailed(Failure("connection", _broken(error))) from None
        except openai.APIStatusError as error:
            raise Status(error.status_code, error.body, error.response.headers) from None
        except Exception as error:  # of the client; it may show what was sent
            message = redact(f"{type(error).__name__}: {error}", self.key)
            raise CallFailed(Failure("backend_error", message)) from None
        text = redact(text, self.key)
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise CallFailed(
                Failure("server_error", f"the server's reply is not JSON ({error})", text)
            ) from None

    def learn(self, dialect: Dialect) -> None:
        """Speaks to the endpoint from now on as in a call that it has taken: what it says of one
        that it takes in no way may be that call's own trouble."""
        now = self.dialect.and_of(dialect)
        who = self.base_url or "The endpoint"
        if self.dialect.schema and not now.schema:
            self.notes.append(f"{who} takes no JSON schema; answers were checked as text.")
        for name in sorted(now.without - self.dialect.without):
            self.notes.append(f"{who} takes no {name} for {self.model}; its own was used.")
        self.dialect = now


# ---------------------------------------------------------------- what comes back


def answer_of(reply: Any) -> Answer:
    """The answer in a chat completion.

    Raises:
        CallFailed: there is none in it.
    """
    raw = json.dumps(reply, ensure_ascii=False)
    if not isinstance(reply, dict):
        raise CallFailed(Failure("server_error", "the server's reply is no object", raw))
    usage = reply.get("usage") if isinstance(reply.get("usage"), dict) else {}
    used = _count(usage, "prompt"), _count(usage, "completion")
    paid = None if None in used else used
    choices = reply.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(message, dict):
        failure = Failure("no_answer", "the server's reply has no choices", raw)
        raise CallFailed(failure, tokens=paid)
    if choice.get("finish_reason") == "content_filter" or message.get("refusal"):
        said = message.get("refusal") or "the endpoint's filter held the answer back"
        raise CallFailed(Failure("content_filter", str(said), raw), tokens=paid)
    text, cut = message.get("content"), choice.get("finish_reason") == "length"
    if not isinstance(text, str) and not cut:
        failure = Failure("no_answer", "the server's reply has no text", raw)
        raise CallFailed(failure, tokens=paid)
    return Answer(text or "", cut, *used)


def _count(usage: Mapping[str, Any], what: str) -> int | None:
    found = usage.get(f"{what}_tokens")
    return found if type(found) is int and 0 <= found < _MOST_TOKENS else None


def failed_call(status: Status, key: str) -> CallFailed:
    """What a status means for a row.

    Raises:
        Refused, Failed: it means the same for all rows.
    """
    said = redact(status.said(), key)[:_SHOWN]
    line = f"HTTP {status.code}: {said}"
    if status.code in (401, 403):
        raise Refused(f"the endpoint does not take the API key ({line}); it comes from the "
                      "environment variable that llm.api_key_env names")  # fmt: skip
    if status.code == 404:
        raise Refused(f"the endpoint has no such model or path ({line}); check llm.model and "
                      "llm.base_url")  # fmt: skip
    if status.code == 402 or status.error_code() in _NO_CREDIT:
        raise Failed(f"the account at the endpoint has no credit ({line})")
    wait = retry_after(status.headers)
    tokens = None if status.code in _MAYBE_PAID else NO_TOKENS
    if status.code == 429:
        return CallFailed(Failure("rate_limited", line), wait, tokens=tokens)
    if status.code >= 500 or status.code in (408, 409, 425):
        return CallFailed(Failure("server_error", line), wait, tokens=tokens)
    return CallFailed(Failure("refused_request", line), tokens=tokens)


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that a server asks to wait."""
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        try:
            seconds = float(headers[name]) * unit
        except (KeyError, ValueError):
            continue
        if math.isfinite(seconds):
            return max(0.0, seconds)
    try:
        date = email.utils.parsedate_to_datetime(headers["retry-after"])
    except (KeyError, ValueError):
        return None
    return max(0.0, date.timestamp() - time.time())


def _broken(error: BaseException) -> str:
    """One sentence, the same however exactly a connection broke."""
    seen: BaseException | None = error
    while seen is not None:
        if type(seen).__name__.startswith(("ClientConnector", "ConnectError")):
            return "cannot connect to the endpoint"
        seen = seen.__cause__ or seen.__context__
    return "the connection broke"


# ---------------------------------------------------------------- keys and addresses


def api_key(variable: str, *, needed: bool) -> str:
    """The key in an environment variable.

    Raises:
        Refused: it is not set and `needed`, no header can hold it, or `variable` is no name but
            perhaps a key.
    """
    if not re.fullmatch(r"[A-Z][A-Z0-9_]*", variable):
        raise Refused(
            "llm.api_key_env does not look like a variable's name (not shown, it may be a key); "
            "it must be the name of an environment variable, such as OPENAI_API_KEY"
        )
    key = os.environ.get(variable, "")
    if needed and not key:
        raise Refused(f"environment variable {variable} is not set; it must hold the API key")
    if not (key.isascii() and key.isprintable()):
        raise Refused(
            f"environment variable {variable} holds a line break, another control character or one "
            "that is not ASCII (not shown); it must be the API key and nothing else"
        )
    return key


def checked_url(url: str) -> str:
    """`url`, which must have no credentials in it: it is written down.

    Raises:
        Refused: it has, or it is no URL.
    """
    if not url:
        return url
    try:
        parts = urlsplit(url)
    except ValueError:
        parts = urlsplit("")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise Refused(
            "llm.base_url has a user, a password or a query in it (not shown); it must be like "
            "http://localhost:8000/v1, and the key comes from the environment"
        )
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise Refused(f"llm.base_url={url!r}; it must be like http://localhost:8000/v1")
    return url.rstrip("/")


def redact(text: str, key: str) -> str:
    """`text` without the key, which some servers repeat. What is too short to be a secret, as local
    servers are given (`EMPTY`), may be any word of an answer and stays."""
    return text.replace(key, "[API key]") if len(key) >= _SECRET else text


def only_model(base_url: str, api_key_env: str) -> str:
    """The name of the one model that an endpoint serves.

    Raises:
        Refused: it serves several, none, or does not say.
    """
    openai = _client_module()
    url = checked_url(base_url)
    key = api_key(api_key_env, needed=not url)
    try:
        with openai.OpenAI(
            base_url=url or None, api_key=key or "none", max_retries=1, timeout=20
        ) as client:
            names = sorted(model.id for model in client.models.list())
    except openai.OpenAIError as error:
        said = redact(str(error), key)[:_SHOWN]
        raise Refused(f"{url or 'the endpoint'} does not list its models ({said}); "
                      "set llm.model") from None  # fmt: skip
    if len(names) != 1:
        raise Refused(f"llm.model is not set; {url or 'the endpoint'} has "
                      f"{', '.join(names[:20]) or 'none'}")  # fmt: skip
    return names[0]


def make_client(base_url: str, key: str) -> Any:
    """A client that neither retries nor times out, which the runner does, on aiohttp's transport
    where that is installed."""
    openai = _client_module()
    try:
        transport = openai.DefaultAioHttpClient(timeout=None)
    except RuntimeError:
        transport = openai.DefaultAsyncHttpxClient(timeout=None)
    return openai.AsyncOpenAI(
        base_url=base_url or None,
        api_key=key or "none",
        max_retries=0,
        timeout=None,
        http_client=transport,
    )


def _client_module() -> Any:
    try:
        import openai
    except ImportError:
        raise Refused("the openai client is not installed; pip install 'jaxconv[llm]'") from None
    return openai
