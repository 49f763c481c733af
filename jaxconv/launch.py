"""Runs a recipe: `python -m jaxconv.launch --config=configs/NAME.py[:PRESET] [flags]`.

The same command again resumes a run that was stopped or killed, and prints the report of a finished
one. Single fields are set with `--config.group.field=value`.

Exit status: 0 done, 1 failed, 2 refused input, 3 done in part, 4 stopped and resumable.
"""

import contextlib
import importlib
import inspect
import json
import os
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from absl import flags, logging

from jaxconv import compile_for, processes, recipes, storage
from jaxconv.errors import Failed, Refused, Stopped
from jaxconv.perf import libtpu
from jaxconv.train import attempts, checks, clock, interrupt, shared_folder
from jaxconv.train import config as configs
from jaxconv.train.atomic import is_disk_full
from jaxconv.train.workdir import Workdir, config_sha, remove

if TYPE_CHECKING:
    from jaxconv.evals.report import Report

DONE, FAILED, REFUSED, PARTIAL, STOPPED = range(5)
_RESUME = "to go on, run the same command again (without --overwrite)"
_STATUS_OF_REPORT = {"done": DONE, "partial": PARTIAL, "failed": FAILED, "stopped": STOPPED}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line (without the program's name) and returns its exit status."""
    with _read_or_not():
        return _main(list(sys.argv[1:] if argv is None else argv))


class _Stream:
    """A standard stream that goes on in silence once nobody reads it (`... | head`).

    A run of hours does not depend on who watches it. Its status is that of its work.
    """

    def __init__(self, stream: TextIO):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except BrokenPipeError:
            self._silence()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._silence()

    def _silence(self) -> None:
        """What is buffered goes nowhere too, when the interpreter flushes it at its end."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)


@contextlib.contextmanager
def _read_or_not() -> Iterator[None]:
    """Inside the block standard output and standard error need nobody to read them."""
    out, err = (stream and _Stream(stream) for stream in (sys.stdout, sys.stderr))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            yield
        finally:
            for stream in filter(None, (out, err)):
                stream.flush()


def _main(argv: list[str]) -> int:
    workdir: list[Workdir] = []
    try:
        status, line = _run(argv, workdir), ""
    except Refused as error:
        status, line = REFUSED, f"refused: {error}"
    except Stopped as error:
        status, line = STOPPED, f"stopped: {error}; {_RESUME}"
    except KeyboardInterrupt:
        status, line = STOPPED, f"stopped; {_RESUME}"
    except Exception as error:
        if processes.explains(error):
            status, line = STOPPED, f"stopped: {_broken(error)}; {_RESUME}"
        else:
            status = FAILED
            line = f"failed: {_explain(error, workdir[0] if workdir else None)}"
    finally:
        for held in workdir:
            held.close()
    if line:
        _say(line)
    processes.leave(status, line)
    return status


def _flags() -> flags.FlagValues:
    values = flags.FlagValues()
    for define, name, default, text in (
        (flags.DEFINE_string, "config", None, "config file: configs/NAME.py[:PRESET]"),
        (
            flags.DEFINE_string,
            "workdir",
            None,
            "folder of the run, also gs://… or s3://…; runs/<config>-<preset> if none",
        ),
        (flags.DEFINE_bool, "print_config", False, "print the resolved config and leave"),
        (flags.DEFINE_bool, "overwrite", False, "remove what the workdir holds and start anew"),
        (flags.DEFINE_bool, "eval_only", False, "evaluate what the workdir exported, again"),
        (flags.DEFINE_bool, "chat", False, "talk to what the workdir exported"),
        (flags.DEFINE_string, "compile_for", None, "compile the run for a TPU topology, and leave"),
        (flags.DEFINE_bool, "suggest", False, "with --compile_for: find the fastest that fits"),
        (flags.DEFINE_bool, "dry_run", False, "print what a run would take, by stage, and leave"),
        (flags.DEFINE_bool, "retry_failed", False, "ask again for rows that were given up"),
        (flags.DEFINE_bool, "distributed", False, "start as one process of several"),
        (flags.DEFINE_string, "coordinator", None, "HOST:PORT of process 0, with --distributed"),
        (flags.DEFINE_integer, "process_count", None, "how many processes, with --distributed"),
        (flags.DEFINE_integer, "process_index", None, "which one this is, with --distributed"),
        (flags.DEFINE_bool, "help", False, "show this text and leave"),
    ):
        define(name, default, text, flag_values=values, module_name="jaxconv.launch")
    return values


def _run(argv: list[str], held: list[Workdir]) -> int:
    overrides, rest = configs.split_overrides(argv)
    values = _flags()
    try:
        unparsed = values(["jaxconv.launch", *rest])[1:]
    except flags.Error as error:
        raise Refused(" ".join(str(error).split())) from None
    if values.help:
        print(f"{__doc__.strip()}\n{values.get_help()}")
        return DONE
    if unparsed:
        raise Refused(
            f"unexpected argument {unparsed[0]!r}; it may be a flag such as --workdir=DIR"
        )
    _check_flags(values)
    others = ("print_config", "compile_for", "dry_run", "eval_only", "chat")
    trains = not any(values[name].value for name in others)
    # From here on, so that no signal ends a process which others have begun to wait for, and one
    # that comes while jax and the recipe are imported is one that the run can be resumed after.
    with interrupt.catching() if trains else contextlib.nullcontext():
        return _run_command(values, overrides, held)


def _run_command(values: flags.FlagValues, overrides: list[str], held: list[Workdir]) -> int:
    topology = values.compile_for and compile_for.prepare(values.compile_for)
    loaded = configs.load(values.config)
    configs.override(loaded.config, overrides)
    resolved = configs.resolved(loaded.config)
    recipe = _recipe(loaded.config.recipe)
    if "seed" in loaded.config:
        checks.at_least(loaded.config, {"seed": 0})
    recipe.check(loaded.config)
    if values.print_config:
        print(json.dumps(resolved, indent=2, ensure_ascii=False))
        return DONE
    if topology:
        fits = compile_for.run(
            recipe, loaded, resolved, topology, values.workdir, suggest=values.suggest
        )
        return DONE if fits else FAILED
    if values.dry_run:
        path = _path(values, loaded)
        place = storage.local_place(path) if storage.is_url(path) else Path(path)
        for line in _offered(recipe, "dry_run", loaded.config)(loaded.config, place):
            print(line)
        return DONE
    if values.retry_failed and not _retries(recipe):
        raise Refused(f"--retry_failed: recipe {loaded.config.recipe!r} does not have it")

    # jax is imported and told what to do only now that the input has been accepted.
    logging.set_verbosity(logging.WARNING)  # Orbax tells of every step at lower levels
    # transformers would say that it found no PyTorch, which nobody here needs.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    libtpu.tell()
    from jaxconv.train import compile_cache, host_memory, mesh

    host_memory.keep()
    compile_cache.enable()
    mesh.split_cpu()
    return _run_recipe(values, loaded, resolved, recipe, held)


def _run_recipe(
    values: flags.FlagValues,
    loaded: Any,
    resolved: dict[str, Any],
    recipe: Any,
    held: list[Workdir],
) -> int:
    """What the command line asks for, in one process or several."""
    from jaxconv.models import kernels

    writer = _join_processes(values)
    if "model" in loaded.config:
        kernels.refuse_other_platforms(loaded.config.model.kernels)
    path = _path(values, loaded)
    if values.eval_only or values.chat:
        _offered(recipe, "chat" if values.chat else "evaluate", loaded.config)
        if not storage.is_url(path) and not Path(path).exists():
            raise Refused(f"--workdir={path} holds no run yet; train one first")
    if writer:
        if values.overwrite:
            remove(path)
        held.append(Workdir(path))
        if not (values.eval_only or values.chat):
            _refuse_other_config(held[0], resolved, getattr(recipe, "MAY_CHANGE", ()))
    # Before process 0 has accepted the workdir, no other looks into it.
    processes.barrier("jaxconv: workdir accepted")
    if not writer:
        held.append(Workdir(path, writer=False, process=processes.index()))
    workdir = held[0]
    shared_folder.refuse_private(workdir)
    processes.share_files(workdir.push, workdir.pull)
    try:
        return _in_workdir(values, loaded, resolved, recipe, workdir)
    finally:
        workdir.push()


def _in_workdir(
    values: flags.FlagValues,
    loaded: Any,
    resolved: dict[str, Any],
    recipe: Any,
    workdir: Workdir,
) -> int:
    """What the command line asks for, in a workdir that was accepted."""

    if values.eval_only or values.chat:
        function = _offered(recipe, "chat" if values.chat else "evaluate", loaded.config)
        if workdir.read_identity() is None:
            raise Refused(f"--workdir={workdir} holds no run yet; train one first")
        return (_chat if values.chat else _evaluate)(function, loaded.config, workdir)
    identity = workdir.read_identity()
    changed = configs.differences(identity["config"], resolved) if identity else []
    again = values.retry_failed or bool(changed)
    reported = tuple(f"config.{field}: " for field in getattr(recipe, "REPORTED", ()))
    made_of = recipe.made_of(loaded.config) if hasattr(recipe, "made_of") else {}
    other = _changed_since(identity, made_of)
    anew = bool(other) or any(difference.startswith(reported) for difference in changed)
    with processes.process_0_first("jaxconv: the report before"):
        status = _finished(workdir, again=again, anew=anew)
    if status is not None:
        return status
    if other:
        processes.say(f"changed since the last run: {'; '.join(other)}")
    fresh = identity is None
    workdir.write_identity(resolved, preset=loaded.preset, made_of=made_of)
    try:
        return _train(recipe, loaded.config, workdir, retry_failed=values.retry_failed)
    except Refused:
        # So that the mended command does not find another config's folder; nothing that was trained
        # or asked of a model is lost.
        kept = workdir.checkpoints.exists() or workdir.journal.exists()
        if fresh and workdir.is_writer and not kept:
            workdir.discard()
        raise
    finally:
        clock.end()


def _changed_since(identity: dict[str, Any] | None, made_of: dict[str, str]) -> list[str]:
    """Which of the prompts and files that a recipe depends on the last run did not have so."""
    before = (identity or {}).get("made_of")
    if before is None:
        return []
    changed = [name for name, content in made_of.items() if before.get(name) != content]
    gone = [f"{name}, which is gone" for name in before if name not in made_of]
    if gone and not any(name.startswith("the file") for name in made_of):
        # There is nothing to run on; what there is to say is the report.
        processes.say(f"the report is of what is no longer there: {'; '.join(gone)}")
        return changed
    return changed + gone


def _check_flags(values: flags.FlagValues) -> None:
    if values.config is None:
        raise Refused("--config is missing; it must be a config file, such as configs/omar.py")
    if values.eval_only and values.chat:
        raise Refused("--eval_only and --chat exclude each other")
    if values.suggest and values.compile_for is None:
        raise Refused("--suggest needs --compile_for=TOPOLOGY")
    if values.compile_for is not None:
        for name in ("dry_run", "overwrite", "eval_only", "chat", "distributed"):
            if values[name].value:
                raise Refused(f"--compile_for excludes --{name}")
    if values.overwrite and (values.eval_only or values.chat):
        raise Refused("--overwrite would remove what --eval_only and --chat need")
    other = values.overwrite or values.eval_only or values.chat
    for name in ("dry_run", "retry_failed"):
        if values[name].value and other:
            raise Refused(f"--{name} excludes --overwrite, --eval_only and --chat")
    parts = {name: values[name].value for name in ("coordinator", "process_count", "process_index")}
    given = [f"--{name}" for name, value in parts.items() if value is not None]
    if given and not values.distributed:
        raise Refused(f"{given[0]} needs --distributed")
    if given and len(given) < len(parts):
        raise Refused(
            f"{', '.join(given)} alone is not enough; give --coordinator, --process_count and "
            "--process_index, or none of them where the cluster tells"
        )
    if given and not 0 <= values.process_index < values.process_count:
        raise Refused(
            f"--process_index={values.process_index}; "
            f"it must be from 0 to {values.process_count - 1}, below --process_count"
        )


def _path(values: flags.FlagValues, loaded: Any) -> str:
    return values.workdir or f"runs/{loaded.name}-{loaded.preset}"


def _retries(recipe: Any) -> bool:
    return "retry_failed" in inspect.signature(recipe.run).parameters


def _recipe(name: str) -> Any:
    if name not in recipes.RECIPES:
        raise Refused(f"config.recipe={name!r}; it may be {', '.join(recipes.RECIPES)}")
    return importlib.import_module(f"jaxconv.recipes.{name}")


def _join_processes(values: flags.FlagValues) -> bool:
    """Joins the other processes where there are any; returns whether this one writes."""
    # What srun sets for each step; inside a plain batch script there is nobody to wait for.
    slurm_tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    if values.distributed or (slurm_tasks.isdecimal() and int(slurm_tasks) > 1):
        processes.join(values.coordinator, values.process_count, values.process_index)
        processes.watch(interrupt.noticed, interrupt.request)
    return processes.index() == 0


def _refuse_other_config(
    workdir: Workdir, resolved: dict[str, Any], may_change: Sequence[str]
) -> None:
    identity = workdir.read_identity()
    if identity is None or identity["config_sha"] == config_sha(resolved):
        return
    free = tuple(f"config.{field}: " for field in may_change)
    changed = [
        difference
        for difference in configs.differences(identity["config"], resolved)
        if not difference.startswith(free)
    ]
    if not changed:
        return
    raise Refused(
        f"--workdir={workdir} belongs to another config ({'; '.join(changed)}); "
        "give another --workdir, or --overwrite to start anew"
    )


def _finished(workdir: Workdir, *, again: bool, anew: bool) -> int | None:
    """Prints the report of a finished run and returns its exit status; None when there is work.

    `again`: a run that is done in part goes on; `anew`: so does one that is done.
    """
    from jaxconv.evals import report

    content = report.read(workdir)
    if content is None:
        return None
    if anew or content["status"] not in (("done",) if again else ("done", "partial")):
        if workdir.is_writer:
            # They tell of the attempt before this one.
            workdir.report.unlink()
            (workdir.path / "report.md").unlink(missing_ok=True)
        return None
    report.print_summary(content, workdir)
    return _STATUS_OF_REPORT[content["status"]]


def _train(recipe: Any, config: Any, workdir: Workdir, *, retry_failed: bool = False) -> int:
    from jaxconv.evals.report import Report

    attempts.begin(workdir)
    options = {"retry_failed": True} if retry_failed else {}
    try:
        report = recipe.run(config, workdir, **options)
    except Stopped as error:
        _write_report(Report(status="stopped", notes=[str(error)]), workdir)
        raise
    except Refused:
        raise
    except Exception as error:
        if processes.explains(error):
            _write_report(Report(status="stopped", notes=[_broken(error)]), workdir)
            raise Stopped(_broken(error)) from error
        if not is_disk_full(error):
            _write_report(Report(status="failed", notes=[_last_line(error)]), workdir)
        raise
    with processes.process_0_first("the report"):  # which others compare with what is there
        return _show(_write_report(report, workdir), workdir)


def _offered(recipe: Any, name: str, config: Any) -> Any:
    """What a recipe offers besides `run`."""
    function = getattr(recipe, name, None)
    if function is None:
        flag = {"evaluate": "--eval_only"}.get(name, f"--{name}")
        raise Refused(f"{flag}: recipe {config.recipe!r} does not have it")
    return function


def _evaluate(function: Any, config: Any, workdir: Workdir) -> int:
    """`--eval_only`: into `evaluation.*`, so that the report of the training stays."""
    began = time.monotonic()
    report = function(config, workdir)
    changed = configs.differences(workdir.read_identity()["config"], configs.resolved(config))
    report.notes += [f"differs from the training: {difference}" for difference in changed]
    report.cost["wall_s"] = round(time.monotonic() - began, 3)
    with processes.process_0_first("the report"):
        return _show(_write_report(report, workdir, name="evaluation"), workdir, "evaluation")


def _chat(function: Any, config: Any, workdir: Workdir) -> int:
    """`--chat`: Ctrl-C and Ctrl-D are how a person says goodbye."""
    try:
        function(config, workdir)
    except (KeyboardInterrupt, EOFError):
        print()
    return DONE


def _write_report(report: "Report", workdir: Workdir, *, name: str = "report") -> dict[str, Any]:
    """Adds what only the launcher knows: time of the run and of compiling, memory."""
    from jaxconv.evals import performance
    from jaxconv.evals.report import Quantity
    from jaxconv.train import compile_cache

    if name == "report":
        performance.add(report, workdir)
    report.cost.setdefault("wall_s", round(attempts.wall_seconds(workdir), 3))
    report.notes += attempts.changes(workdir)
    units = {"compile_s": "s", "lower_s": "s"}
    for part, value in asdict(compile_cache.stats()).items():
        report.compile.setdefault(part, Quantity(round(value, 3), units.get(part, "programs")))
    return report.write(workdir, name=name)


def _show(content: dict[str, Any], workdir: Workdir, name: str = "report") -> int:
    from jaxconv.evals.report import print_summary

    print_summary(content, workdir, name=name)
    return _STATUS_OF_REPORT[content["status"]]


def _explain(error: Exception, workdir: Workdir | None) -> str:
    """One line for standard error; the traceback goes to the workdir, or follows without one."""
    if isinstance(error, Failed):
        return str(error)
    if is_disk_full(error):
        place = getattr(error, "filename", None) or (workdir.path if workdir else "a file")
        return f"disk full while writing {place}"
    trace = traceback.format_exc()
    if workdir is None:
        return f"{_last_line(error)}\n{trace.rstrip()}"
    try:
        with open(workdir.error_log, "a", encoding="utf-8") as log:
            log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S %z')}\n{trace}\n")
    except OSError:
        return f"{_last_line(error)}\n{trace.rstrip()}"
    return f"{_last_line(error)} (traceback: {workdir.error_log})"


def _last_line(error: BaseException) -> str:
    first = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def _broken(error: BaseException) -> str:
    return f"the connection between processes broke ({_last_line(error)})"


def _say(line: str) -> None:
    print(f"jaxconv: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
