"""The search for the fastest layout that fits, against a compiler of known answers."""

import pytest

from jaxconv.errors import Refused
from jaxconv.perf import suggest
from jaxconv.perf.chips import topology
from jaxconv.perf.compiling import Compilation
from jaxconv.perf.hlo import Cost, Work
from jaxconv.perf.memory import Memory
from jaxconv.perf.planned import Planned
from jaxconv.perf.roofline import estimate
from jaxconv.perf.suggest import Layout, search
from jaxconv.perf.table import Program

V5E = topology("v5e:2x2")
PLACES = [(0, i, j) for i in range(2) for j in range(2)]
GIB = 1 << 30
SECONDS = {"full": 4.0, "dots": 3.5, "none": 3.0}  # of a row
MEMORY = {"full": 2, "dots": 5, "none": 20}  # GiB of a row


@pytest.fixture
def compiled(monkeypatch):
    """The layouts that were compiled."""
    layouts = []

    def compile_all(plans, chips):
        (plan,) = plans
        layout = plan.lower
        layouts.append(layout)
        slower = 1.5 if layout.strategy == "fsdp_tp" else 1.0
        # Half a second of every micro-batch is overhead, so that more rows are faster.
        seconds = slower * (0.5 + layout.rows * SECONDS[layout.remat])
        cost = Cost((Work("", "", 197e12 * seconds, "bf16", 0, 1),), (), ())
        done = Compilation(
            cost, Memory(0, 0, 0, layout.rows * MEMORY[layout.remat] * GIB, 0), None, (), 1.0
        )
        return [Program("", done, estimate(cost, V5E, PLACES, tokens=plan.tokens))]

    monkeypatch.setattr(suggest, "compile_all", compile_all)
    return layouts


def plan(layout: Layout) -> Planned:
    if layout.tensor > 2:
        raise Refused("heads")
    held = 20 * GIB if layout.strategy == "ddp" else GIB
    return Planned("", layout, None, layout.rows * 100.0, 1.0, lambda *_: "", arguments=held)


def test_it_finds_the_fastest_that_fits(compiled):
    tried = list(search(plan, V5E, rows=64))
    fitting = [t for t in tried if t.rate is not None]
    best = max(fitting, key=lambda t: t.rate)
    assert best.layout == Layout("fsdp", 1, "dots", 2)
    assert best.rate == pytest.approx(200 / 7.5)
    assert best.why == "10.0 GiB, limited by compute"


def test_what_cannot_fit_is_not_compiled(compiled):
    tried = {str(t.layout): t.why for t in search(plan, V5E, rows=64)}
    assert tried["ddp remat=full rows=1"] == "does not fit: 20.0 GiB before it begins"
    assert tried["fsdp_tp tensor=4 remat=full rows=1"] == "refused: heads"
    assert tried["fsdp remat=full rows=8"] == "does not fit: 16.0 GiB"
    assert tried["fsdp remat=none rows=1"] == "does not fit: 20.0 GiB"
    assert {layout.strategy for layout in compiled} == {"fsdp", "fsdp_tp"}
    assert not any(layout.rows > 8 or layout.tensor > 2 for layout in compiled)


def test_an_update_has_no_more_rows_than_it_had(compiled):
    assert max(t.layout.rows_in_all(4) for t in search(plan, V5E, rows=8)) == 8
