"""Each step's numbers once and in order, and the same end whatever happened on the way."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxconv.errors import Failed, Refused, Stopped
from jaxconv.objectives.metrics import Metrics
from jaxconv.train import interrupt
from jaxconv.train import metrics as metrics_file
from jaxconv.train.checkpoint import Checkpoints
from jaxconv.train.loop import Loop, LoopSettings, Pending
from jaxconv.train.mesh import data_mesh
from jaxconv.train.state import TrainState
from jaxconv.train.update import make_update, tensor_names
from jaxconv.train.workdir import Workdir


@jax.jit
def mean(x):
    return jnp.mean(x)


def _move(state, noise):
    w = state.model["w"] + noise
    average = None if state.ema is None else {"w": 0.5 * state.ema["w"] + 0.5 * w}
    return TrainState({"w": w}, state.opt_state, average), jnp.mean(w), jnp.isfinite(w).all()[None]


move = jax.jit(_move, donate_argnums=0)


class Walk:
    """Steps at random; what a step has drawn is kept when it is saved in its middle.

    Args:
        disturb: called with the name of every point that is passed, the step and `save`.
        held_out: value of the evaluation by step; that of the weights where there is none.
        ends: step whose numbers end the stage.
    """

    def __init__(self, disturb=None, *, held_out=None, ends=None):
        self.disturb = disturb or (lambda point, step, save=None: None)
        self.held_out, self.ends = held_out, ends
        self.generator = np.random.default_rng(0)
        self.drawn = None
        self.moved = 0

    def step(self, state, done, save):
        if self.drawn is None:
            self.drawn = self.generator.normal(size=3).astype("f4")
        self.disturb("middle", done + 1, save)
        state, average, finite = move(state, jax.device_put(self.drawn))
        self.drawn = None
        self.moved = done + 1
        self.disturb("moved", done + 1)
        numbers = {"mean": average, "number": done + 1, "loss": np.float32(done)}
        return state, Pending(numbers, finite, ["the weight w"], tokens=3)

    def evaluate(self, state):
        self.disturb("evaluate", self.moved)
        found = {"held_out/mean": mean(np.asarray(state.averaged["w"]))}  # a copy to the device
        if self.held_out:
            found["held_out/loss"] = self.held_out(self.moved)
        return found

    def verdict(self, step, metrics):
        assert metrics["number"] == step
        return f"ended by step {step}" if step == self.ends else None

    def snapshot(self):
        mean(np.zeros(3, "f4"))  # a copy to the device
        self.disturb("snapshot", self.moved)
        arrays = {} if self.drawn is None else {"drawn": self.drawn}
        return arrays, {"generator": self.generator.bit_generator.state, "drawn": len(arrays)}

    def like(self, host):
        return {"drawn": np.zeros(3, "f4")} if host["drawn"] else {}

    def restore(self, arrays, host):
        self.generator.bit_generator.state = host["generator"]
        self.drawn = arrays.get("drawn")


class Killed(Exception):
    """What a process would not live to see."""


def killer(*points):
    """Raises once at each of these (point, step)s, in this order."""
    left = list(points)

    def disturb(point, step, save=None):
        if left and left[0] == (point, step):
            left.pop(0)
            raise Killed

    return disturb


def start(ema=False):
    w = jnp.zeros(3)
    return TrainState({"w": w}, (), {"w": w + 0} if ema else None)


def settings(**changed) -> LoopSettings:
    chosen = {"steps": 7, "checkpoint_every": 2, "keep": 2, "evaluate_every": 3} | changed
    return LoopSettings("walk", **chosen)


def workdir_at(folder) -> Workdir:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")  # by which a later run knows it
    return Workdir(folder)


def run(folder, work=None, state=None, **changed):
    with workdir_at(folder) as workdir:
        return Loop(work or Walk(), state or start(), settings(**changed), workdir).run()


def records(folder):
    """The metrics of the stage without their times."""
    found = metrics_file.read(Workdir(folder, writer=False), "walk")
    return [{k: v for k, v in record.items() if not k.startswith("time")} for record in found]


def saved(folder, stage="walk"):
    """(last step, arrays, host) of the stage's checkpoints; of the steps, all of them."""
    with Checkpoints(folder / "checkpoints" / stage) as checkpoints:
        latest = checkpoints.latest()
        host = checkpoints.host(latest)
        like = {"state": start(), "work": Walk().like(host["work"])}
        arrays, _ = checkpoints.restore(latest, like)
        return checkpoints.steps(), arrays, host


@pytest.fixture(scope="module", params=[0, 1], ids=["ahead=0", "ahead=1"])
def undisturbed(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    outcome = run(folder, ahead=request.param)
    return folder, outcome, request.param


def test_numbers_are_written_once_and_in_order(undisturbed):
    folder, outcome, _ = undisturbed
    start, *found = records(folder)
    assert start == {"stage": "walk", "step": 0, "held_out/mean": 0.0}
    assert [r["step"] for r in found] == [r["number"] for r in found] == list(range(1, 8))
    walk = np.cumsum(np.random.default_rng(0).normal(size=(7, 3)).astype("f4"), axis=0)
    np.testing.assert_allclose([r["mean"] for r in found], walk.mean(1), rtol=1e-5)
    np.testing.assert_allclose(outcome.model["w"], walk[-1], rtol=1e-6)
    assert (outcome.step, outcome.notes) == (7, [])


def test_held_out_numbers_are_those_of_their_step(undisturbed):
    _, *found = records(undisturbed[0])
    assert [r["step"] for r in found if "held_out/mean" in r] == [3, 6, 7]
    assert all(r["held_out/mean"] == r["mean"] for r in found if "held_out/mean" in r)


def test_a_stage_without_evaluation_has_none(tmp_path):
    run(tmp_path / "run", evaluate_every=0)
    found = records(tmp_path / "run")
    assert len(found) == 7 and not any("held_out/mean" in r for r in found)


def test_checkpoints_come_at_their_steps_and_at_the_end(undisturbed, tmp_path):
    assert saved(undisturbed[0])[0] == [6, 7]
    run(tmp_path / "run", keep=9, evaluate_every=0, ahead=undisturbed[2])
    assert saved(tmp_path / "run")[0] == [2, 4, 6, 7]


def test_a_finished_stage_does_nothing_more(undisturbed):
    folder, outcome, ahead = undisturbed
    before = records(folder)
    again = run(folder, Walk(killer(("middle", 8))), ahead=ahead)
    np.testing.assert_array_equal(again.model["w"], outcome.model["w"])
    assert records(folder) == before and again.step == 7


POINTS = [
    *(("evaluate", 0), ("middle", 1), ("moved", 1), ("moved", 2), ("snapshot", 2), ("middle", 3)),
    *(("evaluate", 3), ("snapshot", 3), ("middle", 4), ("moved", 5), ("evaluate", 6)),
    *(("moved", 7), ("evaluate", 7), ("snapshot", 7)),
]


def test_a_stage_killed_anywhere_comes_to_the_same_end(undisturbed, tmp_path):
    """One run that dies at every point once."""
    folder, outcome, ahead = undisturbed
    kill = killer(*POINTS)
    for _ in POINTS:
        with pytest.raises(Killed):
            run(tmp_path / "run", Walk(kill), ahead=ahead)
        steps = [r["step"] for r in records(tmp_path / "run")]
        assert steps == list(range(len(steps)))
    end = run(tmp_path / "run", Walk(kill), ahead=ahead)
    np.testing.assert_array_equal(end.model["w"], outcome.model["w"])
    assert records(tmp_path / "run") == records(folder)
    for mine, other in zip(saved(tmp_path / "run")[1:], saved(folder)[1:], strict=True):
        jax.tree.map(np.testing.assert_array_equal, mine, other)


def test_a_stage_stopped_after_every_step_comes_to_the_same_end(undisturbed, tmp_path, monkeypatch):
    folder, outcome, ahead = undisturbed
    monkeypatch.setattr(interrupt, "requested", lambda: True)
    for step in range(1, 8):
        with pytest.raises(Stopped, match=f"walk stopped after step {step} of 7"):
            run(tmp_path / "run", ahead=ahead)
        assert len(records(tmp_path / "run")) == step + 1
    end = run(tmp_path / "run", ahead=ahead)
    np.testing.assert_array_equal(end.model["w"], outcome.model["w"])
    assert records(tmp_path / "run") == records(folder)


def test_a_stage_stopped_in_the_middle_of_every_step_comes_to_the_same_end(undisturbed, tmp_path):
    """Whatever was drawn before is not drawn again, and no number is lost."""
    folder, outcome, ahead = undisturbed
    for step in range(1, 8):

        def stop(point, at, save=None, step=step):
            if (point, at) == ("middle", step):
                save()
                raise Stopped

        with pytest.raises(Stopped):
            run(tmp_path / "run", Walk(stop), ahead=ahead)
        assert len(records(tmp_path / "run")) == step
        _, arrays, host = saved(tmp_path / "run")
        assert host["done"] == step - 1 and "drawn" in arrays["work"]
    end = run(tmp_path / "run", ahead=ahead)
    np.testing.assert_array_equal(end.model["w"], outcome.model["w"])
    assert records(tmp_path / "run") == records(folder)


def test_the_start_is_measured_once(tmp_path):
    """Also where the first step was stopped in its middle."""

    def stop(point, at, save=None):
        if (point, at) == ("middle", 1):
            save()
            raise Stopped

    with pytest.raises(Stopped):
        run(tmp_path / "run", Walk(stop))
    measured = []
    run(tmp_path / "run", Walk(lambda point, at, save=None: measured.append((point, at))))
    assert ("evaluate", 3) in measured and ("evaluate", 0) not in measured
    assert [r["step"] for r in records(tmp_path / "run")] == list(range(8))


def test_a_step_may_save_in_its_middle_and_go_on(undisturbed, tmp_path):
    folder, outcome, ahead = undisturbed

    def save_twice(point, at, save=None):
        if point == "middle":
            save()
            save()

    end = run(tmp_path / "run", Walk(save_twice), ahead=ahead)
    np.testing.assert_array_equal(end.model["w"], outcome.model["w"])
    assert records(tmp_path / "run") == records(folder)


# ---------------------------------------------------------------- the best weights

VALUES = {0: 0.5, 1: 5.0, 2: 2.0, 3: 3.0, 4: 1.0, 5: 4.0, 6: 1.0, 7: 6.0}
BEST = {"best": "held_out/loss", "evaluate_every": 1, "checkpoint_every": 9}


@pytest.mark.parametrize("ema", [False, True], ids=["weights", "average"])
def test_the_first_lowest_value_is_kept_and_survives_every_resume(tmp_path, monkeypatch, ema):
    """Evaluations at the steps 2, 4, 6 and 7; stopped after each step, also between them."""
    changed = BEST | {"evaluate_every": 2}
    walk = np.cumsum(np.random.default_rng(0).normal(size=(7, 3)).astype("f4"), axis=0)
    kept = sum(walk[i] * 0.5 ** (4 - i) for i in range(4)) if ema else walk[3]

    def go():
        return run(tmp_path / "run", Walk(held_out=VALUES.get), start(ema), **changed)

    monkeypatch.setattr(interrupt, "requested", lambda: True)
    for _ in range(7):
        with pytest.raises(Stopped):
            go()
    outcome = go()
    assert outcome.step == 4
    np.testing.assert_allclose(outcome.model["w"], kept, rtol=1e-5, atol=1e-6)
    with Checkpoints(tmp_path / "run" / "checkpoints" / "walk_best") as best:
        assert best.steps() == [2, 4]  # the one before stays, for a kill between the two saves


def test_a_killed_stage_keeps_the_same_best(tmp_path):
    """It dies after the best was kept and before the state was: step 4 comes once more."""
    kill = killer(("snapshot", 4), ("snapshot", 2), ("snapshot", 7))
    for _ in range(2):
        with pytest.raises(Killed):
            run(tmp_path / "run", Walk(kill, held_out=VALUES.get), **BEST)
        kill = killer(("snapshot", 7))
    outcome = run(tmp_path / "run", Walk(held_out=VALUES.get), **BEST)
    walk = np.cumsum(np.random.default_rng(0).normal(size=(7, 3)).astype("f4"), axis=0)
    assert outcome.step == 4
    np.testing.assert_allclose(outcome.model["w"], walk[3], rtol=1e-6)


def test_a_best_last_step_needs_no_checkpoint(tmp_path):
    assert run(tmp_path / "a", Walk(held_out=lambda step: -step), **BEST).step == 7


def test_a_start_that_was_better_than_all_that_followed_is_not_what_comes_out(tmp_path):
    outcome = run(tmp_path / "run", Walk(held_out=lambda step: min(step, 1) + step), **BEST)
    assert outcome.step == 1
    assert records(tmp_path / "run")[0]["held_out/loss"] == 0


def test_a_lost_best_checkpoint_is_refused(tmp_path):
    run(tmp_path / "run", Walk(held_out=VALUES.get), **BEST)
    (tmp_path / "run" / "checkpoints" / "walk_best" / "4").rename(tmp_path / "4")
    with pytest.raises(Refused, match="has no checkpoint of step 4, which had the best"):
        run(tmp_path / "run", Walk(held_out=VALUES.get), **BEST)


def test_the_state_and_the_best_weights_may_be_saved_at_once(tmp_path):
    with Checkpoints(tmp_path / "walk") as one, Checkpoints(tmp_path / "walk_best") as other:
        for step in range(1, 9):
            one.save(step, {"w": np.full(3, step)}, {})
            other.save(step, {"w": np.full(3, -step)}, {})
        for checkpoints, sign in ((one, 1), (other, -1)):
            assert checkpoints.steps() == [7, 8]
            arrays, _ = checkpoints.restore(8, {"w": np.zeros(3, int)})
            np.testing.assert_array_equal(arrays["w"], sign * 8)


# ---------------------------------------------------------------- the end


@pytest.mark.parametrize(("ahead", "last"), [(0, 4), (1, 5)])
def test_a_verdict_ends_the_stage_for_good(tmp_path, ahead, last):
    """With one step ahead the one under way is finished; the last one is evaluated."""
    outcome = run(tmp_path / "run", Walk(ends=4), ahead=ahead, checkpoint_every=3)
    assert outcome.notes == ["ended by step 4"] and outcome.step == last
    found = records(tmp_path / "run")
    assert [r["step"] for r in found] == list(range(last + 1))
    assert [r["step"] for r in found if "held_out/mean" in r] == [0, 3, last]
    again = run(tmp_path / "run", Walk(killer(("middle", last + 1))), ahead=ahead)
    assert again.notes == outcome.notes and again.step == last
    np.testing.assert_array_equal(again.model["w"], outcome.model["w"])
    assert records(tmp_path / "run") == found


def test_a_step_may_not_copy_by_accident(tmp_path):
    class Careless(Walk):
        def step(self, state, done, save):
            mean(np.ones(3, "f4"))
            return super().step(state, done, save)

    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        run(tmp_path / "run", Careless())


# ---------------------------------------------------------------- numbers that are not finite


@jax.custom_vjp
def spoilt(w, flag):
    """w, but with a gradient that is NaN where the flag is set."""
    return w


spoilt.defvjp(lambda w, flag: (w, flag), lambda flag, g: (jnp.where(flag, jnp.nan, g), None))


def regression(model, batch):
    x, bad_gradient = batch
    w = {"a": model["a"], "b": spoilt(model["b"], bad_gradient.any()), "c": model["c"]}
    total = jnp.square(x @ (w["a"] + w["b"] + w["c"]) - 1.0).sum()
    count = jnp.float32(x.shape[0])
    return total, count, Metrics({"loss": total, "count": count})


def careless_optimizer(bad_step):
    """Descends; at its `bad_step`th update it makes a NaN of one weight of "c"."""

    def update(gradients, count, model):
        updates = jax.tree.map(lambda g: -0.01 * g, gradients)
        updates["c"] = updates["c"].at[1].set(jnp.where(count == bad_step - 1, jnp.nan, 0.0))
        return updates, count + 1

    return optax.GradientTransformation(lambda model: jnp.int32(0), update)


class Regression:
    """A step on data of its own, spoilt at one step in one way."""

    def __init__(self, bad_step, way):
        self.bad_step, self.way = bad_step, way
        self.optimizer = careless_optimizer(bad_step if way == "weight" else 0)
        self.update = make_update(regression, self.optimizer, data_mesh(1))

    def start(self):
        return TrainState.create({n: jnp.full(3, 0.1) for n in "abc"}, self.optimizer)

    def step(self, state, done, save):
        x = np.random.default_rng(done).normal(size=(2, 4, 3)).astype("f4")
        bad = done + 1 == self.bad_step
        if bad and self.way == "loss":
            x[1, 2, 0] = np.nan
        flags = np.full((2, 4), bad and self.way == "gradient")
        state, updated = self.update(state, *jax.device_put(((x, flags), np.int32(2))))
        names = tensor_names(updated.metrics, state)
        return state, Pending(updated.metrics.sums, updated.finite, names, tokens=1)

    def evaluate(self, state):
        return {}

    def verdict(self, step, metrics):
        return None

    def snapshot(self):
        return {}, {}

    def like(self, host):
        return {}

    def restore(self, arrays, host):
        pass


def regress(folder, work, **changed):
    with workdir_at(folder) as workdir:
        return Loop(work, work.start(), settings(evaluate_every=0, **changed), workdir).run()


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("bad_step", [1, 4, 5])
@pytest.mark.parametrize(
    ("way", "first", "tensors"),
    [
        ("loss", "the sum of loss", 7),
        ("gradient", "the gradient of b", 2),
        ("weight", "the weight c", 1),
    ],
)
def test_what_is_not_finite_fails_by_name_and_is_not_kept(
    tmp_path, ahead, bad_step, way, first, tensors
):
    message = f"walk step {bad_step}: {first} is not finite, the first of {tensors} such tensors"
    with pytest.raises(Failed, match=message):
        regress(tmp_path / "run", Regression(bad_step, way), ahead=ahead)
    assert [r["step"] for r in records(tmp_path / "run")] == list(range(1, bad_step))
    good = regress(tmp_path / "good", Regression(0, ""), steps=4)
    with Checkpoints(tmp_path / "run" / "checkpoints" / "walk") as checkpoints:
        if bad_step < 3:
            assert checkpoints.latest() is None
            return
        assert checkpoints.steps() == ([2] if bad_step == 4 else [2, 4])
    # The run goes on from the last good one, whose numbers are those of a run without a NaN.
    end = regress(tmp_path / "run", Regression(0, ""), steps=4)
    jax.tree.map(np.testing.assert_array_equal, end.model, good.model)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_held_out_number_that_is_not_finite_fails_by_name(tmp_path, value):
    values = VALUES | {4: value}
    message = f"walk step 4: held_out/loss is {value}; the checkpoints before it are good"
    with pytest.raises(Failed, match=message):
        run(tmp_path / "run", Walk(held_out=values.get), **BEST | {"checkpoint_every": 2})
    assert [r["step"] for r in records(tmp_path / "run")] == [0, 1, 2, 3]
    assert saved(tmp_path / "run")[2]["best"] == {"step": 2, "value": 2.0}


def test_a_start_that_cannot_be_measured_fails_before_the_first_step(tmp_path):
    work = Walk(killer(("middle", 1)), held_out={0: np.nan}.get)
    with pytest.raises(Failed, match="walk before the first step: held_out/loss is nan"):
        run(tmp_path / "run", work, **BEST)
