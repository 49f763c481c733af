"""How a call is put to an endpoint, of which each understands a little less than all."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from jaxconv.llm.backends.base import Call

_BY_NAME = ("properties", "$defs", "definitions")  # parts of a JSON schema that hold others by name
_SCHEMA_WORDS = ("response_format", "json_schema", "schema", "grammar", "structured")


class Status(Exception):
    """A server's no.

    Attributes:
        code: the HTTP status.
        body: what it said, as JSON if it was.
        headers: of the response.
    """

    def __init__(self, code: int, body: Any, headers: Mapping[str, str]):
        super().__init__(code)
        self.code, self.body, self.headers = code, body, headers

    def said(self) -> str:
        """The server's sentence."""
        body = self.body.get("error", self.body) if isinstance(self.body, dict) else self.body
        said = body.get("message", body) if isinstance(body, dict) else body
        return said if isinstance(said, str) else json.dumps(said, ensure_ascii=False, default=str)

    def error_code(self) -> str:
        error = self._error()
        return str(error.get("code") or error.get("type") or "")

    def parameter(self) -> str:
        """The parameter that the server names as the trouble, "" where it names none."""
        return str(self._error().get("param") or "")

    def _error(self) -> dict[str, Any]:
        body = self.body.get("error", self.body) if isinstance(self.body, dict) else {}
        return body if isinstance(body, dict) else {}


@dataclass(frozen=True)
class Dialect:
    """What an endpoint understands.

    Attributes:
        schema: JSON schemas.
        completion_tokens: `max_completion_tokens` in the place of `max_tokens`.
        without: names of parameters of sampling that it does not take.
    """

    schema: bool = True
    completion_tokens: bool = False
    without: frozenset[str] = frozenset()

    def body(self, call: Call) -> dict[str, Any]:
        """A chat completion request."""
        limit = "max_completion_tokens" if self.completion_tokens else "max_tokens"
        parameters = dict(call.request.parameters)
        for replaced in ("max_tokens", "temperature_step"):
            parameters.pop(replaced, None)
        parameters |= {limit: call.max_tokens, "temperature": call.temperature}
        if call.temperature > 0:
            parameters["seed"] = call.request.sample
        sent = {name: value for name, value in parameters.items() if name not in self.without}
        body = {"model": call.request.model, "messages": call.messages, **sent}
        if self.schema:
            schema, strict = strict_schema(call.request.schema)
            body["response_format"] = {
                "type": "json_schema",
                "json_schema": {
                    "name": re.sub(r"\W", "_", call.task.name)[:64],
                    "schema": schema,
                    "strict": strict,
                },
            }
        return body

    def other(self, status: Status, *, schema: bool) -> "Dialect | None":
        """How to say the same so that the server may take it, None where that is not the trouble.

        Args:
            status: what it said to this.
            schema: whether the answer may be asked for without a JSON schema.
        """
        if status.code not in (400, 422, 501):
            return None
        said = status.said().lower()
        if "max_completion_tokens" in said and not self.completion_tokens:
            return replace(self, completion_tokens=True)
        if (refused := _refused_parameter(status, self)) is not None:
            return replace(self, without=self.without | {refused})
        if schema and self.schema and any(word in said for word in _SCHEMA_WORDS):
            return replace(self, schema=False)
        return None

    def and_of(self, other: "Dialect") -> "Dialect":
        """What an endpoint understands that takes no more than either."""
        return Dialect(
            self.schema and other.schema,
            self.completion_tokens or other.completion_tokens,
            self.without | other.without,
        )


def _refused_parameter(status: Status, dialect: Dialect) -> str | None:
    """The parameter of sampling that a server does not take, None where that is not the trouble."""
    # Of two that it does not take together, `top_p` is the one that nobody is likely to miss.
    left = [name for name in ("top_p", "temperature", "seed") if name not in dialect.without]
    if status.parameter():
        return status.parameter() if status.parameter() in left else None
    said = re.findall(r"[a-z_]+", status.said().lower())
    return next((name for name in left if name in said), None)


def strict_schema(schema: Any) -> tuple[Any, bool]:
    """(a schema in which every object has exactly its properties, whether it could be made so).

    Objects with free names cannot; such a schema stays as it is.
    """
    free = False

    def closed(part: Any) -> Any:
        nonlocal free
        if isinstance(part, list):
            return [closed(each) for each in part]
        if not isinstance(part, dict):
            return part
        out = {}
        for name, value in part.items():
            if name in _BY_NAME and isinstance(value, dict):
                # Names that somebody chose, `default` perhaps, and not words of JSON schema.
                out[name] = {chosen: closed(each) for chosen, each in value.items()}
            elif name in ("const", "enum"):
                out[name] = value
            elif name != "default":
                out[name] = closed(value)
        if part.get("type") == "object":
            free |= "properties" not in part or part.get("additionalProperties") not in (
                None,
                False,
            )
            out |= {"additionalProperties": False, "required": list(part.get("properties", ()))}
        return out

    made = closed(schema)
    return (schema, False) if free else (made, True)
