"""A small task for the fault server, and a program: `small_task.py URL JOURNAL OUT N TIMEOUT`.

The program asks for N rows, with so many seconds for a call, and writes their results to OUT; tests
kill it.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Literal

from pydantic import BaseModel

from jaxconv.llm import Journal, Prompt, Settings, Task, run_tasks
from jaxconv.llm.artifact import write_results
from jaxconv.llm.backends.openai import OpenAI


class Row(BaseModel):
    text: str


class Answer(BaseModel):
    label: Literal["a", "b", "c", "d"]
    score: int


TASK = Task(
    name="small",
    input=Row,
    output=Answer,
    prompt=Prompt("small.md", "# System\nLabel the text.\n# User\n<text>{{ text }}</text>"),
    rules=lambda row: Answer(label="abcd"[len(row.text) % 4], score=len(row.text)),
    max_tokens=64,
)
FAST = Settings(
    concurrency=32,
    max_attempts=3,
    timeout_s=0.7,
    backoff_s=0.02,
    max_backoff_s=0.1,
    max_answer_bytes=2000,
)


def rows(n: int) -> dict[str, Row]:
    return {f"row-{i:05d}": Row(text=f"text {i}") for i in range(n)}


def words(row: Row) -> str:
    """What the server sees of a row."""
    return TASK.prompt.render(dict(row))[-1]["content"]


def endpoint(url: str, **options) -> OpenAI:
    return OpenAI("faulty", base_url=url, **options)


if __name__ == "__main__":
    url, journal, out, n, timeout = sys.argv[1:]
    settings = dataclasses.replace(FAST, timeout_s=float(timeout), concurrency=128)
    with Journal(journal) as kept:
        results = run_tasks(TASK, rows(int(n)), endpoint(url), journal=kept, settings=settings)
    write_results(Path(out), TASK, "faulty", results)
