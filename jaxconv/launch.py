"""Runs a recipe: `python -m jaxconv.launch --config=configs/NAME.py[:PRESET] [flags]`.

The same command again resumes a run that was stopped or killed, and prints the report of a finished
one. Single fields are set with `--config.group.field=value`.

Exit status: 0 done, 1 failed, 2 refused input, 3 done in part, 4 stopped and resumable.
"""

import contextlib
import importlib
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

from jaxconv.errors import Failed, Refused, Stopped
from jaxconv.train import attempts, interrupt
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
        return _run(argv, workdir)
    except Refused as error:
        return _say(REFUSED, f"refused: {error}")
    except Stopped as error:
        return _say(STOPPED, f"stopped: {error}; {_RESUME}")
    except KeyboardInterrupt:
        return _say(STOPPED, f"stopped; {_RESUME}")
    except Exception as error:
        return _say(FAILED, f"failed: {_explain(error, workdir[0] if workdir else None)}")
    finally:
        for held in workdir:
            held.close()


def _flags() -> flags.FlagValues:
    values = flags.FlagValues()
    for define, name, default, text in (
        (flags.DEFINE_string, "config", None, "config file: configs/NAME.py[:PRESET]"),
        (flags.DEFINE_string, "workdir", None, "folder of the run; runs/<config>-<preset> if none"),
        (flags.DEFINE_bool, "print_config", False, "print the resolved config and leave"),
        (flags.DEFINE_bool, "overwrite", False, "remove what the workdir holds and start anew"),
        (flags.DEFINE_bool, "eval_only", False, "evaluate what the workdir exported, again"),
        (flags.DEFINE_bool, "chat", False, "talk to what the workdir exported"),
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
    loaded = configs.load(values.config)
    configs.override(loaded.config, overrides)
    resolved = configs.resolved(loaded.config)
    recipe = _recipe(loaded.config.recipe)
    recipe.check(loaded.config)
    if values.print_config:
        print(json.dumps(resolved, indent=2, ensure_ascii=False))
        return DONE

    # jax is imported and told what to do only now that the input has been accepted.
    logging.set_verbosity(logging.WARNING)  # Orbax tells of every step at lower levels
    # transformers would say that it found no PyTorch, which nobody here needs.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from jaxconv.train import compile_cache, mesh

    compile_cache.enable()
    mesh.split_cpu()
    writer = _join_processes(values)
    path = Path(values.workdir or f"runs/{loaded.name}-{loaded.preset}")
    if values.eval_only or values.chat:
        _offered(recipe, "chat" if values.chat else "evaluate", loaded.config)
        if not path.exists():
            raise Refused(f"--workdir={path} holds no run yet; train one first")
    if writer:
        if values.overwrite:
            remove(path)
        held.append(Workdir(path))
        if not (values.eval_only or values.chat):
            _refuse_other_config(held[0], resolved)
    _wait_for_process_0()
    if not writer:
        held.append(Workdir(path, writer=False))
    workdir = held[0]

    if values.eval_only or values.chat:
        function = _offered(recipe, "chat" if values.chat else "evaluate", loaded.config)
        if workdir.read_identity() is None:
            raise Refused(f"--workdir={workdir.path} holds no run yet; train one first")
        return (_chat if values.chat else _evaluate)(function, loaded.config, workdir)
    if (status := _finished(workdir)) is not None:
        return status
    fresh = workdir.read_identity() is None
    workdir.write_identity(resolved, preset=loaded.preset)
    try:
        with interrupt.catching():
            return _train(recipe, loaded.config, workdir)
    except Refused:
        if fresh and workdir.is_writer:
            workdir.discard()  # so that the mended command does not find another config's folder
        raise


def _check_flags(values: flags.FlagValues) -> None:
    if values.config is None:
        raise Refused("--config is missing; it must be a config file, such as configs/omar.py")
    if values.eval_only and values.chat:
        raise Refused("--eval_only and --chat exclude each other")
    if values.overwrite and (values.eval_only or values.chat):
        raise Refused("--overwrite would remove what --eval_only and --chat need")
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


def _recipe(name: str) -> Any:
    module = f"jaxconv.recipes.{name}"
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        # Something that the recipe itself lacks is another matter.
        if error.name != module:
            raise
    folder = Path(__file__).parent / "recipes"
    known = sorted(path.stem for path in folder.glob("*.py") if path.stem != "__init__")
    raise Refused(f"config.recipe={name!r}; it may be {', '.join(known)}")


def _join_processes(values: flags.FlagValues) -> bool:
    """Joins the other processes where there are any; returns whether this one writes."""
    import jax

    # What srun sets for each step; inside a plain batch script there is nobody to wait for.
    slurm_tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    if values.distributed or (slurm_tasks.isdecimal() and int(slurm_tasks) > 1):
        jax.distributed.initialize(
            coordinator_address=values.coordinator,
            num_processes=values.process_count,
            process_id=values.process_index,
        )
    return jax.process_index() == 0


def _wait_for_process_0() -> None:
    """Lets no process look into the workdir before process 0 has accepted it. If that one refuses,
    it leaves, and the others fail at this barrier."""
    import jax

    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices("jaxconv.launch: workdir accepted")


def _refuse_other_config(workdir: Workdir, resolved: dict[str, Any]) -> None:
    identity = workdir.read_identity()
    if identity is None or identity["config_sha"] == config_sha(resolved):
        return
    changed = configs.differences(identity["config"], resolved)
    raise Refused(
        f"--workdir={workdir.path} belongs to another config ({'; '.join(changed)}); "
        "give another --workdir, or --overwrite to start anew"
    )


def _finished(workdir: Workdir) -> int | None:
    """Prints the report of a finished run and returns its exit status; None when there is work."""
    from jaxconv.evals import report

    content = report.read(workdir)
    if content is None:
        return None
    if content["status"] not in ("done", "partial"):
        if workdir.is_writer:
            # They tell of the attempt before this one.
            workdir.report.unlink()
            (workdir.path / "report.md").unlink(missing_ok=True)
        return None
    report.print_summary(content, workdir)
    return _STATUS_OF_REPORT[content["status"]]


def _train(recipe: Any, config: Any, workdir: Workdir) -> int:
    from jaxconv.evals.report import Report

    attempts.begin(workdir)
    try:
        report = recipe.run(config, workdir)
    except Stopped as error:
        _write_report(Report(status="stopped", notes=[str(error)]), workdir)
        raise
    except Refused:
        raise
    except Exception as error:
        if not is_disk_full(error):
            _write_report(Report(status="failed", notes=[_last_line(error)]), workdir)
        raise
    return _show(_write_report(report, workdir), workdir)


def _offered(recipe: Any, name: str, config: Any) -> Any:
    """What a recipe offers besides `run`."""
    function = getattr(recipe, name, None)
    if function is None:
        flag = {"evaluate": "--eval_only", "chat": "--chat"}[name]
        raise Refused(f"{flag}: recipe {config.recipe!r} does not have it")
    return function


def _evaluate(function: Any, config: Any, workdir: Workdir) -> int:
    """`--eval_only`: into `evaluation.*`, so that the report of the training stays."""
    began = time.monotonic()
    report = function(config, workdir)
    changed = configs.differences(workdir.read_identity()["config"], configs.resolved(config))
    report.notes += [f"differs from the training: {difference}" for difference in changed]
    report.cost["wall_s"] = round(time.monotonic() - began, 3)
    return _show(_write_report(report, workdir, name="evaluation"), workdir, "evaluation")


def _chat(function: Any, config: Any, workdir: Workdir) -> int:
    """`--chat`: Ctrl-C and Ctrl-D are how a person says goodbye."""
    try:
        function(config, workdir)
    except (KeyboardInterrupt, EOFError):
        print()
    return DONE


def _write_report(report: "Report", workdir: Workdir, *, name: str = "report") -> dict[str, Any]:
    """Adds what only the launcher knows: wall time of the run, compile time of this process."""
    from jaxconv.evals.report import Quantity
    from jaxconv.train import compile_cache

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


def _say(status: int, line: str) -> int:
    print(f"jaxconv: {line}", file=sys.stderr, flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
