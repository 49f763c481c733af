"""A profiler trace of chosen steps, for TensorBoard's profile page or xprof."""

from collections.abc import Iterator
from contextlib import contextmanager

from jaxconv.errors import Refused
from jaxconv.train.workdir import Workdir


def parse_steps(text: str, *, field: str = "config.profile.steps") -> range | None:
    """`"10:12"` are the steps 10 and 11, as in a Python slice; `""` is no step at all.

    Raises:
        Refused: anything else; names the `field`.
    """
    if not text:
        return None
    first, colon, stop = text.partition(":")
    if not (colon and first.isdecimal() and stop.isdecimal() and int(first) < int(stop)):
        raise Refused(
            f'{field}={text!r}; it must be "FIRST:STOP" with FIRST < STOP, such as "10:12" for the '
            'steps 10 and 11, or "" for none'
        )
    return range(int(first), int(stop))


class Profiler:
    """Traces the steps `steps` of a stage into `<workdir>/tensorboard/<stage>`.

    Wrap every step of the loop in `with profiler.step(number):`. Each step is marked with its
    number in the trace. The body should wait for its results: what still runs on the device when
    the last traced step ends is not in the trace. The trace is written when that step ends, also by
    an exception.
    """

    def __init__(self, workdir: Workdir, stage: str, steps: range | None):
        self._folder = workdir.tensorboard / stage
        self._stage = stage
        self._steps = steps if workdir.is_writer else None
        self._tracing = False

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        if self._steps is None or number not in self._steps:
            yield
            return
        import jax

        if not self._tracing:
            self._folder.mkdir(parents=True, exist_ok=True)
            jax.profiler.start_trace(str(self._folder))
            self._tracing = True
        last = number == self._steps[-1]
        try:
            with jax.profiler.StepTraceAnnotation(self._stage, step_num=number):
                yield
        except BaseException:
            last = True
            raise
        finally:
            if last:
                jax.profiler.stop_trace()
                self._tracing = False
