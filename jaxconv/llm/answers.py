"""From the text that a model wrote to the value that its task asked for."""

import json
import re
from typing import Any

from pydantic import BaseModel, ValidationError

from jaxconv.llm.failures import InvalidAnswer
from jaxconv.llm.task import Task

_THOUGHT, _THOUGHT_END = "<think>", "</think>"
_DECODER = json.JSONDecoder()
_PLACES = re.compile(r'{(?=\s*["}])|' + _THOUGHT_END)
_WASTED = 1 << 16  # characters read as objects that were none, until no more are looked for
_TOO_DEEP = 1 << 12  # about so many of them before Python reads no deeper
_EACH = 128  # that an error counts as at least
_SHOWN = 3  # errors that a model is told of at once
_OUTSIDE = ("literal_error", "enum")


def parse(task: Task, input: BaseModel, text: str) -> Any:
    """The value in an answer, valid and checked.

    Words around the object of JSON do not matter, nor does a thought before it. Several objects
    that differ are no answer: nobody knows which one is meant.

    Raises:
        InvalidAnswer: there is none; `kind` is one of `failures.ANSWERS`, or "check_error" where a
            check or the output type itself went wrong.
    """
    found = _object(text)
    try:
        value = task.output.model_validate(found)
        _check_written(value)
    except InvalidAnswer:
        raise
    except ValidationError as invalid:
        errors = invalid.errors(include_url=False, include_context=False)
        outside = all(error["type"] in _OUTSIDE for error in errors)
        message = "; ".join(_said(error) for error in errors[:_SHOWN])
        raise InvalidAnswer("outside_labels" if outside else "wrong_schema", message) from None
    except Exception as error:
        message = f"the output type raised {type(error).__name__}: {error}"
        raise InvalidAnswer("check_error", message) from error
    for check in task.checks:
        try:
            problem = check(input, value)
        except Exception as error:
            message = f"a check raised {type(error).__name__}: {error}"
            raise InvalidAnswer("check_error", message) from error
        if problem:
            raise InvalidAnswer("failed_check", problem)
    return value


def is_valid(task: Task, input: BaseModel, text: str) -> bool:
    """Whether there is a value in an answer."""
    try:
        parse(task, input, text)
    except InvalidAnswer:
        return False
    return True


def _object(text: str) -> dict[str, Any]:
    """The one object in a text."""
    found, error = _objects(text)
    if not found and error is None:
        raise InvalidAnswer("invalid_json", "there is no JSON object in the answer")
    if not found:
        raise InvalidAnswer("invalid_json", f"the answer is not JSON ({error})")
    found = [each for each in found if each] or found  # {} stands in formulas too
    if len({_canonical(each) for each in found}) > 1:
        message = "there are several JSON objects in the answer, which differ"
        raise InvalidAnswer("invalid_json", message)
    return found[0]


def _objects(text: str) -> tuple[list[dict[str, Any]], Exception | None]:
    """(the objects after the thought, what was wrong with the first that is none).

    A thought is what stands before its end; where it begins is not always told, since templates
    may begin it. One that a text begins with and that does not end has no answer after it.
    """
    found, error, wasted, at = [], None, 0, 0
    thinking = text.lstrip().startswith(_THOUGHT)
    while place := _PLACES.search(text, at):
        at = place.end()
        if place[0] == _THOUGHT_END:
            found, error, wasted, thinking = [], None, 0, False
        elif wasted < _WASTED:
            try:
                value, at = _DECODER.raw_decode(text, place.start())
                found.append(value)
            except (ValueError, RecursionError) as raised:
                error = error or raised
                wasted += getattr(raised, "pos", at + _TOO_DEEP) - at + _EACH
    return ([] if thinking else found), error


def _canonical(found: dict[str, Any]) -> str:
    """Refuses half of a surrogate pair, which JSON can escape and no file can hold, and numbers
    that JSON has not."""
    try:
        text = json.dumps(found, ensure_ascii=False, sort_keys=True, allow_nan=False)
        text.encode()
    except UnicodeEncodeError:
        raise InvalidAnswer("invalid_json", "it holds half of a surrogate pair") from None
    except ValueError:
        raise InvalidAnswer("invalid_json", "a number in it is NaN or too large") from None
    except RecursionError:
        raise InvalidAnswer("invalid_json", "it is nested too deeply") from None
    return text


def _check_written(value: BaseModel) -> None:
    """Refuses what no file of JSON can hold, such as NaN."""
    try:
        json.dumps(value.model_dump(mode="json"), allow_nan=False, ensure_ascii=False).encode()
    except ValueError as error:
        raise InvalidAnswer("wrong_schema", f"it cannot be written as JSON ({error})") from None


def _said(error: Any) -> str:
    place = ".".join(str(part) for part in error["loc"]) or "the object"
    found = json.dumps(error["input"], ensure_ascii=False, default=str)
    return f"{place}: {error['msg']}, not {found if len(found) <= 80 else found[:77] + '...'}"
