"""Results as a file that people and later stages read."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxconv.durable import publish
from jaxconv.llm.results import Result
from jaxconv.llm.task import Task


def write_results(path: Path, task: Task, model: str, results: Mapping[str, Result]) -> None:
    """Writes one line of JSON for each row, by id: `{"id", "value" or "error", "task", "prompt",
    "model", "key"}`; an error is `{"kind", "message", "raw"}`.

    What a run was disturbed by does not show: only what was asked and what came of it. The journal
    has every attempt under `key`. The file appears whole or not at all.

    Raises:
        ValueError: a value that did not come from `run_tasks` holds NaN or an infinite number.
    """
    path = Path(path)
    origin = {"task": task.name, "prompt": task.prompt.version, "model": model}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "w", encoding="utf-8", newline="\n") as file:
        for id in sorted(results):
            result = results[id]
            row: dict[str, Any] = {"id": id}
            if result.error is None:
                row["value"] = result.value.model_dump(mode="json")
            else:
                row["error"] = dataclasses.asdict(result.error)
            row |= origin | {"key": result.key}
            file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
    publish(partial, path)
