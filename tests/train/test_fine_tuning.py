"""A stage of fine-tuning from its config: it learns, goes on where it was, and refuses in time."""

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxconv.data.token_store import TokenStore
from jaxconv.errors import Refused, Stopped
from jaxconv.models.lora import Adapter
from jaxconv.objectives.sft import finish_metrics
from jaxconv.train import fine_tuning, interrupt
from jaxconv.train import metrics as metrics_file
from jaxconv.train.likelihood import Scorer, sft_objective
from jaxconv.train.sections import shared_sections, stage_config
from jaxconv.train.trainable import merged
from jaxconv.train.workdir import Workdir


def make_config(**stage) -> ConfigDict:
    config = ConfigDict({"seed": 3})
    shared_sections(config)
    config.batch.update({"rows": 2, "microbatches": 2, "width": 16})
    config.checkpoint.every = 3
    config.train = stage_config(
        **({"steps": 8, "warmup": 2, "learning_rate": 0.02, "evaluate_every": 4} | stage)
    )
    return config


def whole() -> ConfigDict:
    return make_config(ema_decay=0.5)


def adapter() -> ConfigDict:
    config = make_config(optimizer="muon", learning_rate=0.05)
    config.lora.update({"rank": 4, "dropout": 0.1})
    return config


CONFIGS = {"whole": whole, "adapter": adapter}


def counting_store(n: int, seed: int) -> TokenStore:
    """Streams that count upwards: easy to learn."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(3, 13, n)
    tokens = [(rng.integers(40) + np.arange(size)) % 40 for size in lengths]
    offsets = np.cumsum([0, *lengths])
    mask = np.ones(offsets[-1], bool)
    return TokenStore(np.concatenate(tokens).astype("i4"), mask, offsets, np.arange(n), 1, {})


TRAIN, HELD_OUT = counting_store(30, 0), counting_store(8, 1)


class Killed(Exception):
    """What a process would not live to see."""


@pytest.fixture
def fit(small_actor_critic):
    """(config, folder) -> (outcome, resting, held-out nll of the outcome)

    It dies in the evaluation `kill`, counted from 1; with `values` the evaluations find these.
    """

    def fit(config, folder, *, kill=None, values=()):
        scorer = Scorer(fine_tuning.training_mesh(config, 2), rows=2, width=16)
        evaluations = iter(range(1, 99))

        def evaluate(trained, resting):
            n = next(evaluations)
            if n == kill:
                raise Killed
            if n <= len(values):
                return {"nll": values[n - 1]}
            logprob, tokens = scorer(trained, resting, HELD_OUT)
            return {"nll": -logprob.sum() / tokens.sum()}

        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text("{}")
        with Workdir(folder) as workdir:
            outcome, resting = fine_tuning.fit(
                config,
                "train",
                workdir,
                "sft",
                small_actor_critic().decoder,
                TRAIN,
                objective=sft_objective,
                finish=finish_metrics,
                evaluate=evaluate,
                best="nll",
                headline=("nll",),
                evaluated=int(HELD_OUT.lengths.sum()),
            )
        return outcome, resting, evaluate(outcome.model, resting)["nll"]

    return fit


def records(folder):
    found = metrics_file.read(Workdir(folder, writer=False), "sft")
    return [
        {k: v for k, v in record.items() if not k.startswith(("time", "speed/"))}
        for record in found
    ]


def assert_identical(one, other):
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("kind", ["whole", pytest.param("adapter", marks=pytest.mark.slow)])
def test_a_stage_learns_and_goes_on_bit_for_bit(kind, fit, tmp_path, monkeypatch):
    """Killed between two checkpoints, stopped in the next run, finished in the third."""
    config = CONFIGS[kind]()
    fine_tuning.check(config, "train")
    outcome, resting, nll = fit(config, tmp_path / "whole")
    start, *found = records(tmp_path / "whole")
    assert start.keys() == {"stage", "step", "held_out/nll"}
    assert [r["step"] for r in found] == list(range(1, 9))
    assert [r["step"] for r in found if "held_out/nll" in r] == [4, 8]
    assert found[-1]["nll"] < 0.9 * found[0]["nll"]
    assert nll == min(r["held_out/nll"] for r in found if "held_out/nll" in r)
    # Of so short a stage the warm-up is nothing.
    assert found[0]["learning_rate"] == pytest.approx(config.train.learning_rate)
    assert all(0.4 < r["fill"] <= 1 for r in found)
    assert isinstance(outcome.model, Adapter) == (resting is not None) == (kind == "adapter")
    assert merged(outcome.model, resting).embed.shape == (40, 16)

    with pytest.raises(Killed):
        fit(config, tmp_path / "cut", kill=2)
    assert [r["step"] for r in records(tmp_path / "cut")] == [0, 1, 2, 3]
    answers = iter([False, True])
    monkeypatch.setattr(interrupt, "requested", lambda: next(answers))
    with pytest.raises(Stopped, match="sft stopped after step 5 of 8"):
        fit(config, tmp_path / "cut")
    monkeypatch.undo()
    again, base, _ = fit(config, tmp_path / "cut")
    assert again.step == outcome.step
    assert_identical((again.model, base), (outcome.model, resting))
    assert records(tmp_path / "cut") == [start, *found]


def test_the_length_may_be_given_in_epochs_and_the_last_weights_kept(fit, tmp_path):
    config = make_config(steps=0, epochs=2, keep_best=False, evaluate_every=99)
    outcome, *_ = fit(config, tmp_path / "run")
    _, *found = records(tmp_path / "run")
    assert outcome.step == len(found)
    # Every example twice: all tokens of the store.
    assert sum(r["tokens"] for r in found) == 2 * len(TRAIN.tokens)
    assert not (tmp_path / "run" / "checkpoints" / "sft_best" / str(outcome.step)).exists()


@pytest.mark.parametrize(("keep_best", "step"), [(True, 2), (False, 4)])
def test_the_best_weights_come_out_if_asked_for(keep_best, step, fit, tmp_path):
    config = make_config(steps=4, evaluate_every=2, keep_best=keep_best)
    assert fit(config, tmp_path / "run", values=(0.5, 1.0, 2.0))[0].step == step


def test_the_average_comes_out_if_asked_for(fit, tmp_path, small_actor_critic):
    """After one step it is as far from the start as from the weights of that step."""
    last, average = (
        jax.device_get(fit(make_config(steps=1, ema_decay=decay), tmp_path / str(decay))[0].model)
        for decay in (0.0, 0.5)
    )
    start = jax.device_get(small_actor_critic().decoder)
    for w, mean, first in zip(*map(jax.tree.leaves, (last, average, start)), strict=True):
        np.testing.assert_allclose(mean, (w + first) / 2, rtol=1e-6, atol=1e-7)
        assert np.abs(w - first).max() > 1e-3


def test_other_data_is_refused_when_a_stage_goes_on(fit, tmp_path, monkeypatch):
    config = make_config()
    monkeypatch.setattr(interrupt, "requested", lambda: True)
    with pytest.raises(Stopped):
        fit(config, tmp_path / "run")
    config.batch.width = 13
    with pytest.raises(Refused, match="of the sequence, where no update begins"):
        fit(config, tmp_path / "run")


# ---------------------------------------------------------------- refusals

LORA = {"lora.rank": 4}
CASES = [
    ({"seed": -1}, "config.seed=-1; it must be at least 0"),
    ({"model.vocab_size": 260}, "config.model.vocab_size=260; it must be at least 261"),
    ({"model.embed_dim": 0}, "config.model.embed_dim=0; it must be at least 1"),
    ({"model.num_layers": 0}, "config.model.num_layers=0; it must be at least 1"),
    ({"model.num_heads": 0}, "config.model.num_heads=0; it must be at least 1"),
    ({"model.num_heads": 3}, "config.model.num_heads=3; it must divide half of .*embed_dim=64"),
    ({"model.num_kv_heads": 3}, "config.model.num_kv_heads.*3.*"),
    ({"model.mlp_dim": 0}, "config.model.mlp_dim=0; it must be at least 1"),
    ({"model.family": "bert"}, "config.model.family.*bert.*llama.*"),
    ({"model.dtype": "int4"}, "config.model.dtype.*int4.*float32.*"),
    ({"model.remat": "all"}, "config.model.remat.*all.*none.*"),
    (
        {"model.path": "p", "model.dtype": "int4"},
        "config.model.dtype='int4'; it may be .*float32.*",
    ),
    ({"model.path": "p", "model.remat": "all"}, "config.model.remat='all'; it may be none, .*"),
    ({"lora.rank": -1}, "config.lora.rank=-1; it must be at least 0"),
    (LORA | {"lora.alpha": 0.0}, "config.lora: .*alpha is 0.0; it must be positive"),
    (LORA | {"lora.targets": ("qkv",)}, "config.lora: .*'qkv'; it may be q_proj, .*"),
    (LORA | {"lora.targets": ()}, "config.lora: .*targets are empty; they may be q_proj, .*"),
    (LORA | {"lora.dropout": 1.0}, "config.lora: .*dropout is 1.0; it must be .* below 1"),
    ({"batch.rows": 0}, "config.batch.rows=0; it must be at least 1"),
    ({"batch.microbatches": 0}, "config.batch.microbatches=0; it must be at least 1"),
    ({"batch.width": 7}, "config.batch.width=7; it must be at least 8"),
    ({"checkpoint.every": 0}, "config.checkpoint.every=0; it must be at least 1"),
    ({"checkpoint.keep": 0}, "config.checkpoint.keep=0; it must be at least 1"),
    ({"profile.steps": "9:3"}, "config.profile.steps='9:3'; it must be .*FIRST < STOP.*"),
    ({"train.epochs": -1}, "config.train.epochs=-1; it must be at least 0"),
    ({"train.steps": -1}, "config.train.steps=-1; it must be at least 0"),
    (
        {"train.steps": 0, "train.epochs": 0},
        "config.train.epochs=0 and config.train.steps=0; one must be at least 1",
    ),
    ({"train.warmup": -1}, "config.train.warmup=-1; it must be at least 0"),
    ({"train.weight_decay": -0.1}, "config.train.weight_decay=-0.1; it must be at least 0"),
    ({"train.evaluate_every": 0}, "config.train.evaluate_every=0; it must be at least 1"),
    ({"train.learning_rate": 0.0}, "config.train.learning_rate=0.0; it must be above 0"),
    ({"train.learning_rate": float("nan")}, "config.train.learning_rate=nan; it must be above 0"),
    ({"train.clip_norm": 0.0}, "config.train.clip_norm=0.0; it must be above 0"),
    ({"train.b2": 1.0}, "config.train.b2=1.0; it must be at least 0 and below 1"),
    ({"train.ema_decay": 1.0}, "config.train.ema_decay=1.0; it must be at least 0 and below 1"),
    ({"train.schedule": "step"}, "config.train.schedule='step'; it may be constant, cosine, .*"),
    ({"train.optimizer": "sgd"}, "config.train.optimizer='sgd'; it may be adamw, .*"),
    ({"other.b2": 2.0}, "config.other.b2=2.0; it must be at least 0 and below 1"),
]


@pytest.mark.parametrize(("changed", "message"), CASES, ids=[" ".join(c) for c, _ in CASES])
def test_what_cannot_work_is_refused_in_one_line(changed, message):
    config = make_config()
    config.other = stage_config()
    config.update_from_flattened_dict(changed)
    with pytest.raises(Refused) as refused:
        fine_tuning.check(config, "train", "other")
    assert "\n" not in str(refused.value)
    refused.match(f"^{message}$")


@pytest.mark.parametrize("kind", CONFIGS)
def test_what_can_work_is_not_refused(kind):
    fine_tuning.check(CONFIGS[kind](), "train")
