"""Typed questions to language models: a task, many inputs, one result for each.

results = run_tasks(task, {"a": Input(text="…")}, OpenAI("a-model", base_url="http://…/v1"))
results["a"].value or results["a"].error
"""

from jaxconv.llm.failures import Failure
from jaxconv.llm.journal import Journal
from jaxconv.llm.merge import merge_journals
from jaxconv.llm.plan import Estimate, estimate
from jaxconv.llm.prompt import Prompt
from jaxconv.llm.results import Result, count_by_cause
from jaxconv.llm.runner import run_tasks
from jaxconv.llm.settings import Settings
from jaxconv.llm.task import Task

__all__ = [
    "Estimate",
    "Failure",
    "Journal",
    "Prompt",
    "Result",
    "Settings",
    "Task",
    "count_by_cause",
    "estimate",
    "merge_journals",
    "run_tasks",
]
