"""Preference optimisation end to end: what a run leaves, kinds, references, a user's pairs."""

import dataclasses
import json
import os
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxconv.data import token_store
from jaxconv.data.synthetic import assistant
from jaxconv.models.hf import load_pretrained
from jaxconv.recipes import dpo as recipe
from jaxconv.train import config as configs
from jaxconv.train import metrics
from jaxconv.train.likelihood import Scorer
from jaxconv.train.mesh import data_mesh
from jaxconv.train.workdir import Workdir

ROOT = Path(__file__).parents[2]
HH = Path(os.environ.get("JAXCONV_DATA", ROOT.parent / "shared" / "data")) / "hh_rlhf"
ALONE = {"sft__epochs": 0, "control__shuffled": False}


def report_of(workdir) -> dict:
    return json.loads((workdir / "report.json").read_text())


def records_of(workdir, stage=None) -> list[dict]:
    return metrics.read(Workdir(workdir, writer=False), stage)


def updates_of(workdir, stage=None) -> list[dict]:
    """The records without those of the stages' starts."""
    return [record for record in records_of(workdir, stage) if record["step"]]


def run(recipe, workdir, *, status=0, **changed):
    done = recipe.run(workdir, **changed)
    assert done.returncode == status, done.stderr
    assert status or not done.stderr
    return workdir


# ---------------------------------------------------------------- what a run leaves


def test_a_run_leaves_what_it_promises(dpo, finished_dpo):
    made = {str(p.relative_to(finished_dpo)) for p in finished_dpo.rglob("*") if p.is_file()}
    names = ("train", "validation", "held_out", "sft_train", "sft_validation")
    shuffled = (f"shuffled{part}{way}" for part in ("", "_validation") for way in ("", "_opposite"))
    assert made >= {
        "config.json",
        "metrics.jsonl",
        "report.json",
        "report.md",
        "curves.png",
        "export/config.json",
        "export/generation_config.json",
        "export/model.safetensors",
        "export/tokenizer.json",
        "artifacts/start/model.safetensors",
        "artifacts/tokens/reference_dpo.npy",
        "artifacts/tokens/reference_control.npy",
        "artifacts/tokens/reference_control_opposite.npy",
        *(f"artifacts/tokens/{name}/store.json" for name in (*names, *shuffled)),
    }
    assert not [name for name in made if "partial" in name or name.endswith(".tmp")]
    assert "artifacts/quarantine.jsonl" not in made
    assert report_of(finished_dpo)["status"] == "done"
    steps = [(record["stage"], record["step"]) for record in records_of(finished_dpo)]
    assert steps == dpo.steps


def test_the_reference_is_the_fine_tuned_start(finished_dpo):
    start, _ = load_pretrained(finished_dpo / "artifacts" / "start")
    store = token_store.load(finished_dpo / "artifacts" / "tokens" / "train")
    logprob, _ = Scorer(data_mesh(2), rows=2, width=320)(start, None, store)
    kept = np.load(finished_dpo / "artifacts" / "tokens" / "reference_dpo.npy")
    np.testing.assert_allclose(kept, logprob, rtol=1e-5)
    # Shuffled labels exchange the columns of half of the pairs, the opposite ones of the others.
    exchanged = []
    for name in ("control", "control_opposite"):
        other = np.load(finished_dpo / "artifacts" / "tokens" / f"reference_{name}.npy")
        exchanged.append((other == kept[:, ::-1]).all(1))
        own = ~exchanged[-1]
        np.testing.assert_array_equal(other[own], kept[own])
    assert (exchanged[0] != exchanged[1]).all() and exchanged[0].sum() == len(kept) // 2


def test_a_reference_is_reused_for_the_same_replies_alone(finished_dpo, tmp_path):
    tokens = finished_dpo / "artifacts" / "tokens"
    train, shuffled, other = (
        token_store.load(tokens / name) for name in ("train", "shuffled", "shuffled_validation")
    )
    kept = np.load(tokens / "reference_dpo.npy")
    sides = recipe.exchanged(shuffled, train)
    for i, order in enumerate(sides):
        for stream, side in zip(shuffled[i], order, strict=True):
            np.testing.assert_array_equal(stream.tokens, train[i][side].tokens)
            np.testing.assert_array_equal(stream.mask, train[i][side].mask)
    assert recipe.exchanged(other, train) is None
    changed = train.mask.copy()
    changed[-1] = ~changed[-1]
    assert recipe.exchanged(dataclasses.replace(train, mask=changed), train) is None

    scored = []

    def scorer(start, resting, store, watch):
        scored.append(store)
        return np.full((len(store), 2), -1.0), None

    with Workdir(tmp_path / "run") as workdir:
        (workdir.artifacts / "tokens").mkdir(parents=True)
        find = partial(recipe.reference_logprobs, workdir, start=None, scorer=scorer, like=train)
        assert (find("dpo", store=train) == -1).all() and scored == [train]
        np.save(workdir.artifacts / "tokens" / "reference_dpo.npy", kept)
        found = find("control", store=shuffled)
        np.testing.assert_array_equal(found, np.take_along_axis(kept, sides, axis=1))
        assert scored == [train]
        find("another", store=other)
        assert scored == [train, other]


@pytest.mark.parametrize(("reference", "loads"), [("precomputed", 1), ("live", 2)])
def test_a_stage_loads_its_start_once_for_all_but_a_live_reference(
    reference, loads, finished_dpo, tmp_path, monkeypatch
):
    config = configs.load("configs/dpo.py").config
    config.dpo.reference = reference
    train = token_store.load(finished_dpo / "artifacts" / "tokens" / "train")
    loaded = []

    def scorer(start, resting, store, watch=None):
        return np.full((len(store), 2), -1.0), np.ones((len(store), 2), int)

    def fit(config, stage, workdir, name, model, store, **given):
        assert model == 0 and given["constants"] == ((1,) if loads == 2 else ())
        return SimpleNamespace(model="trained"), None

    monkeypatch.setattr(recipe.fine_tuning, "fit", fit)
    monkeypatch.setattr(recipe.sft, "kept", lambda workdir, name, model, resting, base: model)
    monkeypatch.setattr(recipe.sft, "as_exported", lambda model: model)
    with Workdir(tmp_path / "run") as workdir:
        (workdir.artifacts / "tokens").mkdir(parents=True)
        learned = recipe.learn(
            config,
            workdir,
            "dpo",
            lambda: loaded.append(0) or len(loaded) - 1,
            train,
            train,
            scorer,
            like=train,
        )
    assert learned == "trained" and len(loaded) == loads


def test_training_begins_at_the_reference_and_leaves_it(finished_dpo):
    start, first, *_, last = records_of(finished_dpo, "dpo")
    assert start["held_out/loss"] == pytest.approx(np.log(2), abs=1e-5)
    # Before the first update all rewards are 0, so the loss is that of a coin.
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert first["rewards/chosen"] == pytest.approx(0, abs=1e-3)
    assert last["loss"] < 0.5 and last["rewards/margin"] > 0
    for record in updates_of(finished_dpo, "dpo"):
        assert record["pairs"] >= 1 and 0 < record["fill"] <= 1
    held_out = [r["step"] for r in records_of(finished_dpo, "dpo") if "held_out/loss" in r]
    assert held_out == [0, 3, 6, 8]


def test_the_report_measures_from_the_start(finished_dpo):
    report = report_of(finished_dpo)
    results, baselines = report["results"], report["baselines"]
    gained = results["prefers"]["value"] - baselines["prefers/start"]["value"]
    assert results["gain/prefers"]["value"] == pytest.approx(gained)
    for name in ("style", "correct", "gain/style", "margin"):
        assert name in results
    assert {"control/accuracy", "control/margin", "control/gain/style"} <= baselines.keys()
    for estimate in [*results.values(), *baselines.values()]:
        assert estimate["ci95"][0] <= estimate["value"] <= estimate["ci95"][1]
    text = (finished_dpo / "report.md").read_text()
    assert "![Learning curves](curves.png)" in text and text.count("| before | after |") == 4


def test_the_same_command_prints_the_report_and_leaves(dpo, finished_dpo, capsys):
    before = (finished_dpo / "report.json").read_bytes()
    assert dpo.main(dpo.arguments(finished_dpo)) == 0
    shown = capsys.readouterr().out
    assert "accuracy" in shown and "report.md" in shown and "an update takes" not in shown
    assert (finished_dpo / "report.json").read_bytes() == before


@pytest.mark.slow
def test_evaluating_again_finds_the_same(dpo, finished_dpo):
    again = dpo.run(finished_dpo, "--eval_only")
    assert again.returncode == 0, again.stderr
    evaluation = json.loads((finished_dpo / "evaluation.json").read_text())
    assert evaluation["results"] == report_of(finished_dpo)["results"]


# ---------------------------------------------------------------- a user's pairs and checkpoint


def write_pairs(path, n, bad=()):
    rows = [
        json.dumps(
            {
                "prompt": [{"role": m.role, "content": m.content} for m in pair.prompt],
                "chosen": [{"role": m.role, "content": m.content} for m in pair.chosen],
                "rejected": [{"role": m.role, "content": m.content} for m in pair.rejected],
            }
        )
        for pair in assistant.pairs(1 << 20, n, traits=("name",))
    ]
    path.write_text("".join(row + "\n" for row in [*rows[:3], *bad, *rows[3:]]))
    return path


@pytest.fixture(scope="module")
def mine(dpo, finished_dpo, tmp_path_factory):
    """A run from a user's checkpoint on a user's file, with nothing fine-tuned before."""
    folder = tmp_path_factory.mktemp("mine")
    source = shutil.copytree(finished_dpo / "export", folder / "source")
    template = (source / "chat_template.jinja").read_text()
    (source / "chat_template.jinja").write_text("{#- mine -#}" + template)
    settings = json.loads((source / "generation_config.json").read_text())
    settings |= {"temperature": 0.7, "top_k": 20, "do_sample": True}
    (source / "generation_config.json").write_text(json.dumps(settings))
    bad = ["{", json.dumps({"prompt": "hi", "chosen": "same", "rejected": "same"})]
    path = write_pairs(folder / "pairs.jsonl", 26, bad)
    run(dpo, folder / "run", status=3, model__path=source, data__path=path, **ALONE)
    return folder / "run"


def test_bad_pairs_are_kept_counted_and_named(mine):
    report = report_of(mine)
    assert report["status"] == "partial"
    kept = [json.loads(line) for line in (mine / "artifacts" / "quarantine.jsonl").open()]
    assert [row["line"] for row in kept] == [4, 5]
    assert kept[1]["reason"] == "no_preference"
    about, *_, note = report["notes"]
    assert about.startswith(f"model: {mine.parent / 'source'}, ") and "2 layers" in about
    assert note.startswith("2 rows could not be read, see artifacts/quarantine.jsonl: ")
    stores = {p.parent.name: json.loads(p.read_text()) for p in mine.rglob("store.json")}
    assert sum(stores["train"]["counts"].values()) == 12
    assert sum(stores["held_out"]["counts"].values()) == 8


def test_a_checkpoint_keeps_what_it_came_with(mine):
    kept = json.loads((mine / "export" / "generation_config.json").read_text())
    assert (kept["temperature"], kept["top_k"], kept["do_sample"]) == (0.7, 20, True)
    template = (mine / "export" / "chat_template.jinja").read_text()
    assert template.startswith("{#- mine -#}")
    assert not (mine / "artifacts" / "start").exists()
    assert {r["stage"] for r in records_of(mine)} == {"dpo"}
    # Nobody knows the style or the facts of user data.
    assert {"style", "correct"}.isdisjoint(report_of(mine)["results"])


# ---------------------------------------------------------------- kinds and references


@pytest.mark.slow
def test_a_live_reference_is_the_precomputed_one(dpo, finished_dpo, tmp_path):
    live = run(dpo, tmp_path / "run", dpo__reference="live", control__shuffled=False)
    assert not list(live.rglob("reference_*.npy"))
    for name in ("loss", "rewards/margin", "gradient_norm"):
        found, expected = ([r[name] for r in updates_of(w, "dpo")] for w in (live, finished_dpo))
        np.testing.assert_allclose(found[:3], expected[:3], rtol=1e-2, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changed",
    [
        {"dpo__kind": "simpo", "dpo__gamma": 0.5},
        {"dpo__kind": "orpo"},
        {"dpo__kind": "ipo"},
        {"dpo__kind": "robust", "dpo__label_smoothing": 0.1},
        {"dpo__kind": "apo_zero", "train__ema_decay": 0.5},
        {"dpo__kind": "hinge", "dpo__sft_weight": 0.2},
        {"train__optimizer": "muon"},
        {"train__optimizer": "adafactor", "data__too_long": "leave_out"},
        {"batch__packing": False},
    ],
    ids=lambda changed: "-".join(f"{v}" for v in changed.values()),
)
def test_other_ways_to_learn(changed, dpo, tmp_path):
    workdir = run(dpo, tmp_path / "run", **ALONE, **changed)
    free = changed.get("dpo__kind") in ("simpo", "orpo")
    assert bool(list(workdir.rglob("reference_dpo.npy"))) == (not free)
    first, *later = [record["loss"] for record in updates_of(workdir, "dpo")]
    assert min(later) < first  # of four pairs or so each
    load_pretrained(workdir / "export")


ADAPTER = {
    "lora__rank": 2,
    "lora__targets": "('q_proj','down_proj')",
    "train__learning_rate": 0.05,
    "control__shuffled": False,
}


@pytest.fixture(scope="module")
def adapted(dpo, tmp_path_factory):
    return run(dpo, tmp_path_factory.mktemp("adapted") / "run", **ADAPTER, dpo__reference="live")


@pytest.mark.slow
def test_an_adapter_moves_its_targets_alone(adapted):
    start = load_file(adapted / "artifacts" / "start" / "model.safetensors")
    export = load_file(adapted / "export" / "model.safetensors")
    moved = {name for name in start if not np.array_equal(start[name], export[name])}
    assert moved == {name for name in start if "q_proj" in name or "down_proj" in name}
    assert not list(adapted.rglob("reference_*.npy"))  # the base is the reference, at no memory
    first = updates_of(adapted, "dpo")[0]
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-5)


@pytest.mark.slow
@pytest.mark.parity
def test_peft_makes_the_export_of_the_start_and_the_adapter(adapted):
    torch = pytest.importorskip("torch", reason="parity extra is not installed")
    peft = pytest.importorskip("peft", reason="parity extra is not installed")
    from transformers import AutoModelForCausalLM

    folder = adapted / "artifacts" / "adapter_dpo"
    base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert base == str(adapted / "artifacts" / "start")
    tokens = torch.from_numpy(np.random.default_rng(0).integers(5, 300, (2, 40)))
    with torch.no_grad():
        start = AutoModelForCausalLM.from_pretrained(base).eval()
        plain = start(tokens).logits
        theirs = peft.PeftModel.from_pretrained(start, folder).eval()(tokens).logits
        export = AutoModelForCausalLM.from_pretrained(adapted / "export").eval()(tokens).logits
    torch.testing.assert_close(theirs, export, rtol=1e-4, atol=1e-5)
    assert (plain - export).abs().max() > 1e-3


@pytest.mark.slow
def test_an_adapter_run_resumes_bit_for_bit(dpo, adapted, tmp_path):
    changed = {**ADAPTER, "dpo__reference": "live"}
    workdir = tmp_path / "run"
    dpo.killed("jaxconv.train.supervised:Supervised.step:3+", workdir, **changed)
    dpo.killed("jaxconv.train.supervised:Supervised.step:5+", workdir, **changed)
    dpo.killed("jaxconv.models.peft_io:save_tensors:1+", workdir, **changed)
    dpo.killed("jaxconv.recipes.sft:save_adapter:1+", workdir, **changed)
    run(dpo, workdir, **changed)
    assert dpo_outcome(workdir) == dpo_outcome(adapted)


def dpo_outcome(workdir) -> list[bytes]:
    paths = ("export/model", "artifacts/adapter_dpo/adapter_model", "artifacts/start/model")
    return [(workdir / f"{path}.safetensors").read_bytes() for path in paths]


# ---------------------------------------------------------------- real pairs


@pytest.mark.slow
@pytest.mark.skipif(not HH.is_dir(), reason="hh_rlhf is not in JAXCONV_DATA")
def test_every_pair_of_hh_rlhf_is_accounted_for(dpo, tmp_path):
    (path,) = HH.glob("*.jsonl.gz")
    workdir = tmp_path / "run"
    small = {name: v for name, v in dpo.fields.items() if name.startswith(("model.", "samples."))}
    recipe = type(dpo)("configs/dpo.py:hh_rlhf", small, {}, dpo.told, ())
    changed = {"data__path": path, "train__steps": 3, "sft__steps": 3, "samples__prompts": 8}
    run(recipe, workdir, **changed, checkpoint__every=2)
    report = report_of(workdir)
    assert report["status"] == "done" and "quarantine" not in report["artifacts"]
    stores = {p.parent.name: json.loads(p.read_text()) for p in workdir.rglob("store.json")}
    assert sum(stores["held_out"]["counts"].values()) == 400
    for name in ("train", "shuffled", "sft_train"):
        counts = stores[name]["counts"]
        assert set(counts) <= {"whole", "truncated", "left_out"}
        assert sum(counts.values()) == 2312 - 400 - 200, name
        made = token_store.load(workdir / "artifacts" / "tokens" / name)
        assert len(made) == counts["whole"] + counts["truncated"]
        assert made.lengths.max() <= 512
    # Pairs that begin with the same message are one unit.
    scored = len(token_store.load(workdir / "artifacts" / "tokens" / "held_out"))
    assert 0.9 * scored < report["results"]["accuracy"]["n"] <= scored
