"""The section `config.llm` of recipes that ask language models, and what is made of it."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from jaxconv import storage
from jaxconv.data.fingerprint import fingerprint
from jaxconv.data.rows import SUFFIXES
from jaxconv.errors import Refused
from jaxconv.llm.backends import local, openai
from jaxconv.llm.backends.base import Backend
from jaxconv.llm.backends.batch import OpenAIBatch
from jaxconv.llm.backends.replay import Replay
from jaxconv.llm.backends.rules import Rules
from jaxconv.llm.prices import price_of
from jaxconv.llm.settings import EXECUTORS, Settings
from jaxconv.llm.task import Task

BACKENDS = ("auto", "openai", "openai_batch", "local", "rules", "replay")
_BATCH_S = 26 * 3600.0  # a batch API promises its answers within a day
_LOCAL_S = 24 * 3600.0  # nothing can be lost on the way, and large models are slow to begin
_BATCH_CALLS = 20_000
_MOST_CALLS = 1000  # connections that the client opens

MAY_CHANGE = tuple(
    f"llm.{name}"
    for name in (
        "base_url",
        "api_key_env",
        "concurrency",
        "tensor",
        "max_attempts",
        "timeout_s",
        "requests_per_minute",
        "tokens_per_minute",
        "budget_usd",
        "budget_tokens",
        "prices",
        "max_failure_rate",
        "executor",
        "workers",
    )
)
"""Fields that no answer depends on: a run goes on with other values."""


def llm_section() -> ConfigDict:
    llm = ConfigDict()
    # Or local, openai_batch, replay. auto is openai if there is a base_url or a model, else rules.
    llm.backend = "auto"
    llm.base_url = ""  # of any endpoint of OpenAI's kind; "" is OpenAI's own
    llm.model = ""  # "" is the one model that the endpoint serves; for local a folder or hub id
    llm.tensor = 1  # devices that hold one copy of a local model
    llm.api_key_env = "OPENAI_API_KEY"  # the environment variable that holds the key
    llm.structured = "auto"  # sends the JSON schema if the server takes it; or "schema", "text"
    llm.journal = ""  # of an earlier run, for replay
    llm.concurrency = 32  # calls at a time
    llm.max_attempts = 5  # at a row
    llm.timeout_s = 120.0  # of a call; a batch has 26 hours, a local model a day
    llm.requests_per_minute = 0.0  # 0 is no limit, here and below
    llm.tokens_per_minute = 0.0
    llm.budget_usd = 0.0  # hard caps on all calls of the run
    llm.budget_tokens = 0
    llm.prices = ""  # a price table in the form of jaxconv/llm/prices.json
    llm.max_failure_rate = 1.0  # ends the run when more of the rows fail
    llm.executor = "local"  # or ray: workers on a Ray cluster, which share the limits
    llm.workers = 0  # of a Ray cluster; 0 is one for each node
    return llm


def check(config) -> None:
    """Refuses what cannot work, before any work is done."""
    llm = config.llm
    if llm.backend not in BACKENDS:
        raise Refused(f"config.llm.backend={llm.backend!r}; it may be {', '.join(BACKENDS)}")
    if llm.structured not in openai.STRUCTURED:
        known = ", ".join(openai.STRUCTURED)
        raise Refused(f"config.llm.structured={llm.structured!r}; it may be {known}")
    for name in ("concurrency", "max_attempts", "tensor"):
        if llm[name] < 1:
            raise Refused(f"config.llm.{name}={llm[name]}; it must be at least 1")
    if llm.concurrency > _MOST_CALLS:
        raise Refused(f"config.llm.concurrency={llm.concurrency}; it may be at most {_MOST_CALLS}")
    for name in ("requests_per_minute", "tokens_per_minute", "budget_usd", "budget_tokens"):
        if llm[name] < 0:
            raise Refused(f"config.llm.{name}={llm[name]}; it must be 0 (no limit) or more")
    if llm.timeout_s <= 0:
        raise Refused(f"config.llm.timeout_s={llm.timeout_s}; it must be above 0")
    if not 0 <= llm.max_failure_rate <= 1:
        raise Refused(f"config.llm.max_failure_rate={llm.max_failure_rate}; it must be from 0 to 1")
    if llm.executor not in EXECUTORS:
        raise Refused(f"config.llm.executor={llm.executor!r}; it may be {', '.join(EXECUTORS)}")
    if llm.workers < 0:
        raise Refused(f"config.llm.workers={llm.workers}; it must be 0 (one a node) or more")
    if llm.executor == "ray" and (is_rules(config) or llm.backend not in ("auto", "openai")):
        raise Refused(
            f"config.llm.executor='ray' with config.llm.backend={llm.backend!r}; it takes an "
            "endpoint: backend 'openai', or 'auto' with a base_url or a model"
        )
    openai.checked_url(llm.base_url)
    openai.api_key(llm.api_key_env, needed=False)
    if llm.prices:
        price_of("", path=llm.prices)
    if llm.backend == "local":
        _check_local(llm)
    if (llm.backend == "replay") != bool(llm.journal):
        raise Refused(
            f"config.llm.backend={llm.backend!r} with config.llm.journal={llm.journal!r}; "
            "replay needs a journal, and others have none"
        )


def _check_local(llm) -> None:
    if llm.base_url:
        raise Refused(
            f"config.llm.base_url={llm.base_url!r} with config.llm.backend='local', which asks no "
            "endpoint; leave one of them out"
        )
    if not llm.model:
        raise Refused(
            "config.llm.model='' with config.llm.backend='local'; it must be a checkpoint's folder "
            "or hub id"
        )
    local.checked_folder(llm.model)


def is_rules(config) -> bool:
    """Whether no model is asked."""
    llm = config.llm
    return llm.backend == "rules" or (llm.backend == "auto" and not (llm.base_url or llm.model))


def make_backend(config, state: Path) -> Backend:
    """Who answers, by the config.

    Args:
        state: a file for what a batch API has been given.

    Raises:
        Refused: there is no such endpoint, model, key or journal.
    """
    llm = config.llm
    if is_rules(config):
        return Rules()
    if llm.backend == "replay":
        return Replay(llm.journal, llm.model)
    if llm.backend == "local":
        return local.Local(llm.model, slots=llm.concurrency, seed=config.seed, tensor=llm.tensor)
    model = llm.model or openai.only_model(llm.base_url, llm.api_key_env)
    batch = llm.backend == "openai_batch"
    options: dict[str, Any] = {
        "base_url": llm.base_url,
        "api_key_env": llm.api_key_env,
        "structured": llm.structured,
        "price": price_of(model, path=llm.prices, batch=batch),
    }
    if batch:
        return OpenAIBatch(model, state=state, **options)
    return openai.OpenAI(model, **options)


def settings_of(config) -> Settings:
    """How to ask, by the config."""
    llm = config.llm
    batch = llm.backend == "openai_batch"
    return Settings(
        concurrency=_BATCH_CALLS if batch else llm.concurrency,
        max_attempts=llm.max_attempts,
        timeout_s={"openai_batch": _BATCH_S, "local": _LOCAL_S}.get(llm.backend, llm.timeout_s),
        requests_per_minute=llm.requests_per_minute,
        tokens_per_minute=llm.tokens_per_minute,
        budget_usd=llm.budget_usd,
        budget_tokens=llm.budget_tokens,
        max_failure_rate=llm.max_failure_rate,
        seed=config.seed,
        executor=llm.executor,
        workers=llm.workers,
    )


def made_of(tasks: Iterable[Task], *paths: str) -> dict[str, str]:
    """What a run depends on besides its config: the prompts of its tasks, and its files, or those
    in its folders. What is on an object store, or gone, is not told."""
    found = {f"the prompt of {task.name}": task.prompt.version for task in tasks}
    for path in filter(None, paths):
        root = Path(path)
        if storage.is_url(path) or not root.exists():
            continue
        if root.is_file():
            found[f"the file {root}"] = fingerprint([root], root)[root.name]
            continue
        prepared = (root / "dataset_info.json").is_file()
        files = [
            file
            for file in sorted(root.rglob("*"))
            if file.is_file() and (prepared or file.name.endswith(SUFFIXES))
        ]
        told = fingerprint(files, root)
        found |= {f"the file {root / name}": content for name, content in told.items()}
    return found
