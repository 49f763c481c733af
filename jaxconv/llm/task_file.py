"""Tasks on conversations, described in a small YAML or Python file. `docs/llm.md` has the form."""

import runpy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from jaxconv.data.conversation import Conversation
from jaxconv.errors import Refused
from jaxconv.llm.conversations import ConversationInput, input_of
from jaxconv.llm.prompt import Prompt, is_quoted
from jaxconv.llm.shortlist import Shortlist
from jaxconv.llm.task import Task

TYPES = ("label", "labels", "integer", "number", "boolean", "text", "texts", "quote")


class FieldSpec(BaseModel):
    """A field of the output.

    Attributes:
        type: one of `TYPES`. A `quote` must stand in the conversation.
        description: for the model.
        labels: names, or names with what they mean (`label` and `labels`).
        shortlist: how many labels to offer for a conversation, the likeliest by their words; 0 is
            all of them.
        minimum, maximum: of a number.
        max_items: of `labels` and `texts`.
        max_words: of a text.
    """

    model_config = ConfigDict(extra="forbid")

    type: Literal["label", "labels", "integer", "number", "boolean", "text", "texts", "quote"]
    description: str = ""
    labels: dict[str, str] | list[str] = Field(default_factory=dict)
    shortlist: int = Field(default=0, ge=0)
    minimum: float | None = None
    maximum: float | None = None
    max_items: int | None = Field(default=None, ge=1)
    max_words: int | None = Field(default=None, ge=1)

    @property
    def meanings(self) -> dict[str, str]:
        """What each label means, "" where nothing is said."""
        return self.labels if isinstance(self.labels, dict) else dict.fromkeys(self.labels, "")


class TaskSpec(BaseModel):
    """A YAML file: `prompt` is the prompt itself, or the name of a Markdown file beside it."""

    model_config = ConfigDict(extra="forbid")

    name: str
    prompt: str
    output: dict[str, FieldSpec] = Field(min_length=1)
    max_tokens: int = Field(default=512, ge=1)
    temperature: float = Field(default=0.0, ge=0)
    temperature_step: float = Field(default=0.0, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)


@dataclass(frozen=True)
class ConversationTask:
    """A task with what makes its inputs.

    Attributes:
        task: its input is `ConversationInput`.
        make_input: of a conversation.
        label_fields: fields of the output that have one label.
    """

    task: Task
    make_input: Callable[[Conversation], ConversationInput]
    label_fields: tuple[str, ...]


def load_task(path: str | Path) -> ConversationTask:
    """The task in a file: `.yaml` in the form of `TaskSpec`, or `.py` with a `Task` named `TASK`.

    Raises:
        Refused: no such file, or it does not describe a task; it names the file and the field.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise Refused(f"task file {path}: no such file; it must be a .yaml or .py file")
    if path.suffix == ".py":
        return _of_python(path)
    if path.suffix not in (".yaml", ".yml"):
        raise Refused(f"task file {path}: it must end in .yaml, .yml or .py")
    import yaml

    try:
        spec = TaskSpec.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except yaml.YAMLError as error:
        raise Refused(f"task file {path}: {' '.join(str(error).split())}") from None
    except ValidationError as invalid:
        error = invalid.errors(include_url=False)[0]
        place = ".".join(str(part) for part in error["loc"]) or "the file"
        raise Refused(f"task file {path}, {place}: {error['msg']}") from None
    prompt = Prompt(f"of {path.name}", spec.prompt)
    if spec.prompt.strip().endswith(".md"):
        prompt = Prompt.load(path.parent / spec.prompt.strip())
    try:
        return task_of(spec, prompt)
    except Refused as error:
        raise Refused(f"task file {path}: {error}") from None


def _of_python(path: Path) -> ConversationTask:
    task = runpy.run_path(str(path)).get("TASK")
    if not isinstance(task, Task) or task.input is not ConversationInput:
        raise Refused(
            f"task file {path}: it must define TASK, a jaxconv.llm.Task whose input is "
            "jaxconv.llm.conversations.ConversationInput"
        )
    return ConversationTask(task, input_of, _label_fields(task.output))


def task_of(spec: TaskSpec, prompt: Prompt) -> ConversationTask:
    """The task that a specification describes.

    Raises:
        Refused: a field that lacks what its type needs, or has what it cannot use.
    """
    for name, field in spec.output.items():
        _check_field(name, field)
    shortlists = {
        name: (Shortlist(field.meanings), field.shortlist)
        for name, field in spec.output.items()
        if field.labels
    }
    output = create_model(
        spec.name.replace("/", "_"),
        __config__=ConfigDict(extra="forbid"),
        **{name: _annotation(field) for name, field in spec.output.items()},
    )
    checks = [check for name, field in spec.output.items() for check in _checks(name, field)]
    rules = None
    if all(field.type == "label" for field in spec.output.values()):
        rules = _nearest(output, {name: s for name, (s, _) in shortlists.items()})
    task = Task(
        name=spec.name,
        input=ConversationInput,
        output=output,
        prompt=prompt,
        checks=tuple(checks),
        rules=rules,
        max_tokens=spec.max_tokens,
        temperature=spec.temperature,
        temperature_step=spec.temperature_step,
        top_p=spec.top_p,
    )
    return ConversationTask(
        task, lambda conversation: input_of(conversation, shortlists), _label_fields(output)
    )


def _check_field(name: str, field: FieldSpec) -> None:
    if not name.isidentifier() or name.startswith(("_", "model_")):
        raise Refused(f"output.{name}: a field's name has letters, digits and '_'")
    takes = {
        "labels": ("label", "labels"),
        "shortlist": ("label", "labels"),
        "minimum": ("integer", "number"),
        "maximum": ("integer", "number"),
        "max_items": ("labels", "texts"),
        "max_words": ("text", "quote"),
    }
    for part, types in takes.items():
        if field.type not in types and part in field.model_fields_set:
            raise Refused(f"output.{name}.{part}: type {field.type} has none")
    if field.type in ("label", "labels") and len(field.meanings) < 2:
        raise Refused(f"output.{name}.labels: there must be two or more")


def _annotation(field: FieldSpec) -> tuple[Any, Any]:
    limits = {"description": field.description or None}
    if field.type in ("label", "labels"):
        kind: Any = Literal[tuple(field.meanings)]
    else:
        kind = {"integer": int, "number": float, "boolean": bool}.get(field.type, str)
    if field.type in ("labels", "texts"):
        kind = list[kind]
        limits |= {"max_length": field.max_items}
    if field.type in ("integer", "number"):
        limits |= {"ge": field.minimum, "le": field.maximum}
    if field.type == "number":
        limits |= {"allow_inf_nan": False}
    return Annotated[kind, Field(**limits)], ...


def _checks(name: str, field: FieldSpec) -> list[Callable[[ConversationInput, Any], str | None]]:
    out: list[Callable[[ConversationInput, Any], str | None]] = []
    if field.type == "quote":

        def stands(input: ConversationInput, answer: Any) -> str | None:
            if is_quoted(getattr(answer, name), input.text()):
                return None
            return f"{name}: it must be words of the conversation, exactly as they stand there"

        out.append(stands)
    if field.max_words:

        def short(input: ConversationInput, answer: Any) -> str | None:
            words = len(getattr(answer, name).split())
            return None if words <= field.max_words else (
                f"{name}: it has {words} words; it may have {field.max_words}"
            )  # fmt: skip

        out.append(short)
    if field.type in ("label", "labels"):

        def offered(input: ConversationInput, answer: Any) -> str | None:
            given = getattr(answer, name)
            given = [given] if isinstance(given, str) else given
            if len(set(given)) < len(given):
                return f"{name}: a label comes twice"
            names = [label.name for label in input.labels.get(name, ())]
            wrong = next((label for label in given if label not in names), None)
            return wrong and f"{name}: {wrong!r} is not offered; it may be {', '.join(names)}"

        out.append(offered)
    return out


def _nearest(
    output: type[BaseModel], shortlists: Mapping[str, Shortlist]
) -> Callable[[ConversationInput], BaseModel]:
    """The classical baseline: the label whose description is the most similar to what the user
    said."""

    def rules(input: ConversationInput) -> BaseModel:
        return output(**{name: s.top(input.text("user"), 1)[0] for name, s in shortlists.items()})

    return rules


def _label_fields(output: type[BaseModel]) -> tuple[str, ...]:
    properties = output.model_json_schema()["properties"]
    return tuple(name for name, schema in properties.items() if "enum" in schema)
