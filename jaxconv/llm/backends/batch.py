"""A provider's batch API: about half the price, answers within a day, and the same interface."""

import asyncio
import json
import os
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from jaxconv.errors import Failed
from jaxconv.llm.backends.base import Answer, Call
from jaxconv.llm.backends.dialect import Status
from jaxconv.llm.backends.openai import (
    OpenAI,
    answer_of,
    failed_call,
    make_client,
    redact,
)
from jaxconv.llm.failures import NO_TOKENS, TRANSIENT, CallFailed, Failure

_OVER = ("completed", "failed", "expired", "cancelled")
_PATH = "/v1/chat/completions"
_TRIES = 10  # at what an endpoint that does not answer is asked for
_CLOCKS_S = 3600.0  # by which the endpoint's clock may be behind
_SHOWN = 300  # characters of what an endpoint says of a batch


class OpenAIBatch:
    """Gathers calls, hands them over as one batch and waits for it.

    The file of a batch stands in `state` before there is the batch, which is looked for among the
    endpoint's before another is made of these calls: a run that was killed, or did not hear that
    the batch was made, finds it again and pays for nothing twice. An endpoint that does not answer
    for long ends the run, which goes on later.

    Args:
        model, base_url, api_key_env, structured, price: as of `OpenAI`. What a model does not take
            is found out by a batch, after which its calls are made again without it.
        state: a file, made where it is not there.
        rows, size: of a batch, at most; the size in bytes.
        linger_s: a batch goes when no call has come for so long.
        poll_s: between two looks at a batch.
    """

    is_model = True

    def __init__(
        self,
        model: str,
        *,
        state: Path,
        rows: int = 20_000,
        size: int = 190_000_000,
        linger_s: float = 2.0,
        poll_s: float = 20.0,
        **options: Any,
    ):
        self._endpoint = OpenAI(model, **options)
        self.model, self.price = self._endpoint.model, self._endpoint.price
        self.notes, self._first = self._endpoint.notes, self._endpoint.dialect
        self._state, self._rows, self._size = Path(state), rows, size
        self._linger_s, self._poll_s = linger_s, poll_s

    async def __aenter__(self) -> "OpenAIBatch":
        self._client = make_client(self._endpoint.base_url, self._endpoint.key)
        self._waiting: dict[str, tuple[bytes, asyncio.Future]] = {}
        self._came = asyncio.Event()
        self._read_state()
        self._looked_for: dict[str, asyncio.Task] = {}
        self._fetched: dict[str, asyncio.Task] = {}
        self._collector = asyncio.create_task(self._collect())
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        tasks = [self._collector, *self._looked_for.values(), *self._fetched.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._client.close()

    def resumes(self, call: Call) -> bool:
        """Whether an earlier run has handed the call over, or was about to."""
        return self._is_known(_name(call))

    def _is_known(self, name: str) -> bool:
        return name in self._handed_over or name in self._intended

    async def ask(self, call: Call) -> Answer:
        """The answer to one call, when its batch is done.

        Raises:
            CallFailed, Refused, Failed: as `OpenAI.ask`.
        """
        dialect, refused = self._endpoint.dialect, 0
        while True:
            name = _name(call, refused)
            known = self._is_known(name)
            code, body = await self._response(name, dialect.body(call))
            if code == 200:
                if not known:
                    self._endpoint.learn(dialect)
                return answer_of(body)
            status = Status(code, body, {})
            # In which dialect an earlier run has made a call is not known: in the first at least.
            spoken = self._first if known else dialect
            other = spoken.other(status, schema=self._endpoint.structured == "auto")
            if other is None:
                raise failed_call(status, self._endpoint.key)
            dialect, refused = dialect.and_of(other), refused + 1

    async def _response(self, name: str, body: Mapping[str, Any]) -> tuple[int, Any]:
        """(HTTP status, body) of the response to a call, when its batch is done."""
        if name in self._intended:
            await asyncio.shield(self._look_for(*self._intended[name]))
        batch = self._handed_over.get(name)
        if batch is None:
            if self._collector.done():
                self._collector.result()
            future = asyncio.get_running_loop().create_future()
            line = {"custom_id": name, "method": "POST", "url": _PATH, "body": body}
            self._waiting[name] = json.dumps(line).encode() + b"\n", future
            self._came.set()
            batch = await future
        lines, ended, tokens = await asyncio.shield(self._fetch(batch))
        if name not in lines:
            raise CallFailed(ended, tokens=tokens)
        response = lines[name].get("response")
        if not response:
            said = f"its batch {batch} has no answer to it: {_said(lines[name].get('error'))}"
            raise CallFailed(Failure("server_error", said), tokens=NO_TOKENS)
        return response.get("status_code", 500), response.get("body")

    # ------------------------------------------------------------ handing over

    async def _collect(self) -> None:
        """Makes a batch of what waits, whenever nothing more comes."""
        while True:
            await self._came.wait()
            known = -1
            while known < len(self._waiting) < self._rows:
                known = len(self._waiting)
                await asyncio.sleep(self._linger_s)
            self._came.clear()
            calls = {name: self._waiting.pop(name) for name in self._next_batch()}
            if self._waiting:
                self._came.set()
            try:
                batch = await self._hand_over({name: line for name, (line, _) in calls.items()})
            except Exception as error:
                for _, future in calls.values():
                    if not future.done():
                        future.set_exception(_of_its_own(error))
                continue
            for _, future in calls.values():
                if not future.done():
                    future.set_result(batch)

    def _next_batch(self) -> list[str]:
        names, size = [], 0
        for name, (line, _) in self._waiting.items():
            size += len(line)
            if len(names) == self._rows or (names and size > self._size):
                break
            names.append(name)
        return names

    async def _hand_over(self, lines: Mapping[str, bytes]) -> str:
        content = b"".join(lines.values())

        async def upload() -> str:
            file = await self._client.files.create(file=("calls.jsonl", content), purpose="batch")
            return file.id

        file = await self._insist(upload)
        began, names = time.time(), list(lines)
        self._write({"file": file, "time": began, "calls": names})
        tried = False

        async def create() -> str:
            nonlocal tried
            if tried and (found := await self._batch_of(file, began)) is not None:
                return found
            tried = True
            made = await self._client.batches.create(
                input_file_id=file, endpoint=_PATH, completion_window="24h"
            )
            return made.id

        batch = await self._insist(create)
        self._keep(batch, names)
        return batch

    async def _insist(self, step: Callable[[], Awaitable[Any]]) -> Any:
        """What comes of a step, which is done again when the endpoint does not answer: to give its
        calls up would be to pay for them once more.

        Raises:
            CallFailed, Refused, Failed: what its answer means; `Failed` also where there is none.
        """
        import openai

        for left in reversed(range(_TRIES)):
            try:
                return await step()
            except openai.OpenAIError as error:
                failed = self._failed(error)
                if not isinstance(failed, CallFailed) or failed.failure.kind not in TRANSIENT:
                    raise failed from None
                if not left:
                    raise Failed(
                        f"the endpoint takes no batch ({failed.failure.message}); the same command "
                        "goes on where this one ended"
                    ) from None
            await asyncio.sleep(self._poll_s)

    async def _batch_of(self, file: str, began: float) -> str | None:
        """The batch that the endpoint has of a file, None where there is none."""
        import openai

        try:
            async for batch in self._client.batches.list(limit=100):
                if batch.input_file_id == file:
                    return batch.id
                if batch.created_at < began - _CLOCKS_S:
                    break  # the newest come first
        except openai.APIStatusError as error:
            if error.status_code not in (404, 405, 501):
                raise
            self.notes.append(
                "The endpoint does not list its batches; one that was being handed over when the "
                "run or the connection broke may have been made and paid for twice."
            )
        return None

    def _look_for(self, file: str, began: float) -> asyncio.Task:
        """Finds out whether a file became a batch before the run was killed; once."""

        async def look() -> None:
            batch = await self._insist(lambda: self._batch_of(file, began))
            names = [name for name, intended in self._intended.items() if intended[0] == file]
            if batch is not None:
                self._keep(batch, names)
            for name in names:
                self._intended.pop(name, None)

        if file not in self._looked_for:
            self._looked_for[file] = asyncio.create_task(look())
        return self._looked_for[file]

    def _failed(self, error: Exception) -> Exception:
        """What it means for a call that its batch could not be handed over or looked at."""
        import openai

        if isinstance(error, openai.APIStatusError):
            status = Status(error.status_code, error.body, error.response.headers)
            try:
                return failed_call(status, self._endpoint.key)
            except Exception as fatal:
                return fatal
        if isinstance(error, openai.APIConnectionError):
            return CallFailed(Failure("connection", "the connection broke"), tokens=NO_TOKENS)
        return error

    def _keep(self, batch: str, names: list[str]) -> None:
        self._write({"batch": batch, "calls": names})
        self._handed_over |= dict.fromkeys(names, batch)

    def _write(self, record: Mapping[str, Any]) -> None:
        self._state.parent.mkdir(parents=True, exist_ok=True)
        with open(self._state, "a", encoding="utf-8") as file:
            # On a line of its own, even after one that a kill tore.
            file.write("\n" + json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _read_state(self) -> None:
        """Of each call its batch, or the file that was to become one and since when."""
        self._handed_over: dict[str, str] = {}
        self._intended: dict[str, tuple[str, float]] = {}
        lines = self._state.read_text(encoding="utf-8").splitlines() if self._state.exists() else []
        for line in lines:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if "batch" in record:
                self._handed_over |= dict.fromkeys(record["calls"], record["batch"])
            else:
                intended = record["file"], record["time"]
                self._intended |= dict.fromkeys(record["calls"], intended)
        for name in self._handed_over:
            self._intended.pop(name, None)

    # ------------------------------------------------------------ getting back

    def _fetch(self, batch: str) -> asyncio.Task:
        """What came of a batch, by the names of its calls; asked for once."""
        if batch not in self._fetched:
            self._fetched[batch] = asyncio.create_task(self._wait_for(batch))
        return self._fetched[batch]

    async def _wait_for(self, batch: str) -> tuple[dict[str, Any], Failure, tuple[int, int] | None]:
        """(its lines by the names of their calls, and of a call that has none the failure and what
        it took)."""
        import openai

        while True:
            try:
                found = await self._client.batches.retrieve(batch)
                if found.status in _OVER:
                    files = (found.output_file_id, found.error_file_id)
                    texts = [
                        (await self._client.files.content(file)).text for file in files if file
                    ]
                    break
            except (openai.APIConnectionError, openai.InternalServerError, openai.RateLimitError):
                pass  # the batch is there all the same; the runner's timeout ends the waiting
            except openai.APIStatusError as error:
                raise self._failed(error) from None
            await asyncio.sleep(self._poll_s)
        whole = redact("\n".join(texts), self._endpoint.key)
        lines = [json.loads(line) for line in whole.split("\n") if line.strip()]
        # What an endpoint did not finish it does not charge for.
        tokens = None if found.status == "completed" else NO_TOKENS
        errors = found.errors.data if found.errors and found.errors.data else []
        said = "; ".join(_said(error.model_dump()) for error in errors[:3]) or "without an answer"
        message = redact(f"its batch {batch} {found.status}: {said}", self._endpoint.key)
        return {line["custom_id"]: line for line in lines}, Failure("server_error", message), tokens


def _name(call: Call, refused: int = 0) -> str:
    """Of a call in a batch: each attempt at a request has its own, and each dialect after the first
    in which it was refused."""
    name = f"{call.request.key[:48]}-{call.before}"
    return f"{name}-{refused}" if refused else name


def _of_its_own(error: Exception) -> Exception:
    """An error for one of many calls: whoever raises one adds to its traceback."""
    if isinstance(error, CallFailed):
        return CallFailed(error.failure, error.retry_after, tokens=error.tokens)
    return error


def _said(error: Any) -> str:
    """What an endpoint says of an error, in one line."""
    if not isinstance(error, dict):
        return "it does not say why" if error is None else str(error)[:_SHOWN]
    parts = [str(error[name]) for name in ("code", "message") if error.get(name)]
    where = f" (line {error['line']})" if error.get("line") else ""
    return (": ".join(parts) + where)[:_SHOWN] or "it does not say why"
