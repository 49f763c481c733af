"""Supervised fine-tuning end to end: what a run leaves, and what it makes of a user's data."""

import json
import shutil

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxconv.data import token_store
from jaxconv.data.corpus import last_exchange
from jaxconv.data.synthetic import assistant
from jaxconv.data.template import take_apart
from jaxconv.evals.report import escape
from jaxconv.models.hf import load_pretrained
from jaxconv.recipes import sft as recipe
from jaxconv.rollout.replies import replies
from jaxconv.train import metrics
from jaxconv.train.likelihood import Scorer
from jaxconv.train.mesh import data_mesh
from jaxconv.train.workdir import Workdir

WIDTH, BUDGET = 256, 8  # of the tiny run
STORES = ("train", "validation", "held_out", "choice", "exchanged", "exchanged_validation")


def report_of(workdir) -> dict:
    return json.loads((workdir / "report.json").read_text())


def records_of(workdir, stage=None) -> list[dict]:
    return metrics.read(Workdir(workdir, writer=False), stage)


def updates_of(workdir, stage=None) -> list[dict]:
    """The records without those of the stages' starts."""
    return [record for record in records_of(workdir, stage) if record["step"]]


# ---------------------------------------------------------------- what a run leaves


def test_a_run_leaves_what_it_promises(sft, finished_sft):
    made = {str(p.relative_to(finished_sft)) for p in finished_sft.rglob("*") if p.is_file()}
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
        "export/chat_template.jinja",
        *(f"artifacts/tokens/{name}/store.json" for name in STORES),
    }
    assert not [name for name in made if "partial" in name or name.endswith(".tmp")]
    assert "artifacts/quarantine.jsonl" not in made  # nothing was bad
    assert not any(name.startswith("artifacts/adapter") for name in made)
    report = report_of(finished_sft)
    assert report["status"] == "done" and "quarantine" not in report["artifacts"]
    for path in report["artifacts"].values():
        assert (finished_sft / path).exists()
    steps = [(record["stage"], record["step"]) for record in records_of(finished_sft)]
    assert steps == sft.steps


def test_updates_accumulate_packed_rows(finished_sft):
    for record in updates_of(finished_sft):
        assert 0 < record["fill"] <= 1
        assert np.isfinite([record[k] for k in ("nll", "gradient_norm", "entropy")]).all()
    full = updates_of(finished_sft, "sft")[:-1]  # the last one takes what is left
    assert min(r["fill"] for r in full) > 0.5
    assert max(r["tokens"] for r in full) > 2 * WIDTH  # more than a micro-batch of two rows holds
    seen = [r["step"] for r in records_of(finished_sft, "sft") if "held_out/nll" in r]
    assert seen == [0, 3, 6, 9]


def test_the_report_tells_what_was_gained(finished_sft):
    report, text = report_of(finished_sft), (finished_sft / "report.md").read_text()
    gained = report["baselines"]["nll/start"]["value"] - report["results"]["nll"]["value"]
    assert report["results"]["gain/nll"]["value"] == pytest.approx(gained, rel=1e-4)
    assert gained > 0  # it learns how replies sound at least
    for estimate in [*report["results"].values(), *report["baselines"].values()]:
        assert estimate["ci95"][0] <= estimate["value"] <= estimate["ci95"][1]
    for name in ("gain/choice", "gain/context", "correct", "gain/correct"):
        assert name in report["results"]
    assert {"control/gain/nll", "control/gain/context", "control/gain/correct"} <= report[
        "baselines"
    ].keys()
    assert {"sft/tokens_per_s", "sft/fill", "control/fill"} <= report["perf"].keys()
    assert "![Learning curves](curves.png)" in text and text.count("| before | after |") == 4


def test_the_first_line_and_the_report_say_what_model_it_is(sft, mixed):
    """On a user's data too, which weights at random may not be meant for."""
    workdir, done = mixed
    first, parameters = done.stdout.splitlines()[0], 0
    for tensor in load_file(workdir / "export" / "model.safetensors").values():
        parameters += tensor.size
    vocabulary = json.loads((workdir / "export" / "config.json").read_text())["vocab_size"]
    assert first == (
        f"model: from scratch, {parameters:,} parameters "
        f"(2 layers, width 16, vocabulary {vocabulary}, context 128)"
    )
    assert report_of(workdir)["notes"][0] == first


@pytest.mark.parametrize("there", [True, False])
def test_an_adapter_names_a_folder_as_it_is_found_from_anywhere(there, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if there:
        (tmp_path / "Qwen" / "Qwen3-0.6B").mkdir(parents=True)
    named = str(tmp_path / "Qwen" / "Qwen3-0.6B") if there else "Qwen/Qwen3-0.6B"
    assert recipe.base_name("Qwen/Qwen3-0.6B") == named


@pytest.mark.parity
def test_transformers_says_what_our_replies_say(finished_sft):
    torch = pytest.importorskip("torch", reason="parity extra is not installed")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = load_pretrained(finished_sft / "export")
    prompts = [last_exchange(talk)[0] for talk in assistant.conversations(0, 6, held_out=True)]
    ours = replies(
        model,
        take_apart(tokenizer),
        prompts,
        length=WIDTH,
        budget=24,
        temperature=0.0,
        seed=0,
    )
    theirs = AutoModelForCausalLM.from_pretrained(finished_sft / "export").eval()
    read = AutoTokenizer.from_pretrained(finished_sft / "export")
    said = []
    for prompt in prompts:
        messages = [{"role": m.role, "content": m.content} for m in prompt]
        ids = read.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        room = WIDTH - ids["input_ids"].shape[1]
        with torch.no_grad():
            out = theirs.generate(**ids, do_sample=False, max_new_tokens=min(24, room))
        new = out[0, ids["input_ids"].shape[1] :].tolist()
        said.append(read.decode([i for i in new if i != read.eos_token_id]).strip())
    assert ours == said
    assert len(set(ours)) > 1


def test_the_replies_of_the_report_are_those_of_the_export(finished_sft):
    model, tokenizer = load_pretrained(finished_sft / "export")
    prompt, _ = last_exchange(assistant.conversations(0, 1, held_out=True)[0])
    (reply,) = replies(
        model, take_apart(tokenizer), [prompt], length=WIDTH, budget=BUDGET, temperature=0.0, seed=0
    )
    shown = (finished_sft / "report.md").read_text().partition("| before | after |")[2]
    assert shown.splitlines()[2].endswith(f" | {escape(reply)} |")


# ---------------------------------------------------------------- a run that is over


def test_the_same_command_prints_the_report_and_leaves(sft, finished_sft, capsys):
    before = (finished_sft / "report.json").read_bytes()
    assert sft.main(sft.arguments(finished_sft)) == 0
    shown = capsys.readouterr().out
    assert "gain/nll" in shown and "report.md" in shown and "an update takes" not in shown
    assert (finished_sft / "report.json").read_bytes() == before


def evaluation_of(workdir) -> dict:
    return json.loads((workdir / "evaluation.json").read_text())


def test_evaluating_again_finds_the_same(sft, finished_sft):
    again = sft.run(finished_sft, "--eval_only")
    assert again.returncode == 0, again.stderr
    assert evaluation_of(finished_sft)["results"] == report_of(finished_sft)["results"]


@pytest.mark.slow
def test_evaluating_on_other_data_leaves_the_training_s_alone(sft, finished_sft):
    kept = {p: p.read_bytes() for p in (finished_sft / "artifacts").rglob("*") if p.is_file()}
    kept.pop(finished_sft / "artifacts/evaluation_records.json", None)  # of an evaluation before
    other = sft.run(finished_sft, "--eval_only", seed=1, samples__prompts=3)
    assert other.returncode == 0, other.stderr
    evaluation = evaluation_of(finished_sft)
    assert evaluation["results"]["nll"] != report_of(finished_sft)["results"]["nll"]
    assert "differs from the training: config.seed: 0 -> 1" in evaluation["notes"]
    found = {p: p.read_bytes() for p in (finished_sft / "artifacts").rglob("*") if p.is_file()}
    assert {p: found[p] for p in kept} == kept
    assert {p.name for p in found.keys() - kept.keys()} <= {"evaluation_records.json"}


@pytest.mark.slow
def test_devices_that_get_no_rows_are_told_of(sft, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "3")
    done = sft.run(tmp_path / "run", control__exchanged=False, train__steps=2)
    assert done.returncode == 0, done.stderr
    line = (
        "1 of 3 devices are idle: config.batch.rows=2 is shared out to 2; "
        "a multiple of 3 would keep all of them busy."
    )
    assert done.stdout.splitlines().count(line) == 1
    assert line in report_of(tmp_path / "run")["notes"]


# ---------------------------------------------------------------- a user's data


def talks(n: int) -> list[dict]:
    """Rows of the help desk in OpenAI's form."""
    return [
        {"messages": [{"role": m.role, "content": m.content} for m in talk.messages], "id": talk.id}
        for talk in assistant.conversations(1 << 20, n)
    ]


BAD = [
    '{"messages": [',
    json.dumps({"messages": [{"role": "user", "content": "hello?"}]}),
    json.dumps({"messages": [{"role": "robot", "content": "hello"}]}),
    json.dumps({"text": "no messages"}),
]


def write_mixed(path, n=30):
    """Good rows with bad ones between them."""
    lines = [json.dumps(row) for row in talks(n)]
    for i, bad in enumerate(BAD):
        lines.insert(5 * i + 2, bad)
    path.write_text("".join(line + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def mixed(sft, tmp_path_factory):
    """A run on a file with bad rows, long conversations split."""
    folder = tmp_path_factory.mktemp("mixed")
    path = write_mixed(folder / "talks.jsonl")
    done = sft.run(
        folder / "run",
        data__path=path,
        data__too_long="split",
        batch__width=128,
        control__exchanged=False,
    )
    assert done.returncode == 3, done.stderr
    return folder / "run", done


def test_bad_rows_are_kept_counted_and_named(mixed):
    workdir, done = mixed
    report = report_of(workdir)
    assert report["status"] == "partial" and done.stderr == ""
    kept = [json.loads(line) for line in (workdir / "artifacts/quarantine.jsonl").open()]
    assert [row["line"] for row in kept] == [3, 8, 13, 18]
    assert [row["row"].rstrip("\n") for row in kept] == BAD
    assert report["artifacts"]["quarantine"] == "artifacts/quarantine.jsonl"
    start = "4 rows could not be read, see artifacts/quarantine.jsonl: "
    counted = [note for note in report["notes"] if note.startswith(start)]
    assert len(counted) == 1 and all(row["reason"].replace("_", " ") in counted[0] for row in kept)
    assert done.stdout.count(counted[0][:24]) == 1


def test_every_good_row_is_accounted_for(mixed):
    workdir, _ = mixed
    stores = {p.parent.name: json.loads(p.read_text()) for p in workdir.rglob("store.json")}
    assert sum(stores["train"]["counts"].values()) == 30 - 8 - 6
    assert sum(stores["held_out"]["counts"].values()) == 8
    assert any("split" in name for name in stores["train"]["counts"])
    report, text = report_of(workdir), (workdir / "report.md").read_text()
    found = json.loads((workdir / report["artifacts"]["records"]).read_text())
    for outcome, about in found.items():
        (note,) = [n for n in report["notes"] if f"({about['why']})" in n]
        assert escape(note) in text
        for name, told in about["stores"].items():
            assert told["count"] == stores[name]["counts"][outcome] == len(told["ids"])
            assert f"{name} {told['count']} of {told['of']}" in note
    assert found["split"]["stores"]["train"]["of"] == 16
    assert not any("control" in name for name in report_of(workdir)["baselines"])
    assert "correct" not in report_of(workdir)["results"]  # nobody knows the facts of user data


def test_the_same_command_keeps_the_status_of_a_partial_run(mixed, sft, capsys):
    workdir, _ = mixed
    config = json.loads((workdir / "config.json").read_text())["config"]
    changed = {"data__path": config["data"]["path"], "data__too_long": "split"}
    arguments = sft.arguments(workdir, **changed, batch__width=128, control__exchanged=False)
    assert sft.main(arguments) == 3
    assert "4 rows could not be read" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["truncate_left", "leave_out"])
def test_long_conversations_under_each_policy(policy, sft, tmp_path):
    path = tmp_path / "talks.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in talks(40)))
    done = sft.run(tmp_path / "run", data__path=path, data__too_long=policy, batch__width=160)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "run" / "artifacts" / "records.json").read_text())
    assert ("truncated" in found) == (policy == "truncate_left")
    assert found["left_out"]["stores"]["train"]["of"] == 26
    assert len(report_of(tmp_path / "run")["notes"]) == 1 + len(found)


@pytest.mark.slow
def test_the_data_that_the_recipe_derives_refuse_nobody(sft, tmp_path):
    """No conversation is too long, but one with the replies of another may be."""
    words = {True: "word " * 30, False: "yes"}
    rows = [
        {
            "messages": [
                {"role": "user", "content": words[i % 2 == 0] + f" {i}?"},
                {"role": "assistant", "content": words[i % 2 == 1] + f" {i}"},
            ]
        }
        for i in range(40)
    ]
    path = tmp_path / "talks.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    changed = {"data__path": path, "data__too_long": "refuse", "batch__width": 48}
    done = sft.run(tmp_path / "run", **changed)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "run" / "artifacts" / "records.json").read_text())
    assert found.keys() == {"left_out"}
    assert "exchanged" in found["left_out"]["stores"]
    assert {"train", "held_out"}.isdisjoint(found["left_out"]["stores"])


TOOL_TEMPLATE = (
    "{%- if tools -%}{{ '<|system|>' + (tools | tojson) + '<|end|>' }}{%- endif -%}"
    "{%- for m in messages -%}"
    "{{ '<|' + ('user' if m['role'] == 'tool' else m['role']) + '|>' + m['content'] }}"
    "{%- for c in m['tool_calls'] or [] -%}{{ 'call ' + (c['function'] | tojson) }}{%- endfor -%}"
    "{{ '<|end|>' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|assistant|>' }}{%- endif -%}"
)


@pytest.mark.slow
def test_conversations_with_tools_are_learned_and_asked_about(sft, finished_sft, tmp_path):
    source = shutil.copytree(finished_sft / "export", tmp_path / "source")
    (source / "chat_template.jinja").write_text(TOOL_TEMPLATE)
    rows = []
    for i in range(24):
        call = {"id": "c", "function": {"name": "find", "arguments": json.dumps({"n": i})}}
        messages = [
            {"role": "user", "content": f"Where is {i}?"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": f"box {i}", "tool_call_id": "c"},
            {"role": "assistant", "content": f"In box {i}."},
        ]
        rows.append({"messages": messages[: 2 + 2 * (i % 2)], "tools": [{"name": "find"}]})
    path = tmp_path / "talks.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    workdir = tmp_path / "run"
    done = sft.run(workdir, model__path=source, data__path=path, data__too_long="refuse")
    assert done.returncode == 0, done.stderr
    _, tokenizer = load_pretrained(source)
    store = token_store.load(workdir / "artifacts" / "tokens" / "train")
    for i in range(len(store)):
        (example,) = store[i]
        assert tokenizer.decode(example.tokens).startswith('<|system|>[{"name": "find"}]<|end|>')
        learned = tokenizer.decode(example.tokens[example.mask])
        assert learned.startswith('call {"name": "find", "arguments": {"n": ')
        assert learned.count("<|end|>") == 1 + ("In box" in learned)
    assert escape('find({"n": ') in (workdir / "report.md").read_text()


# ---------------------------------------------------------------- other ways to train


@pytest.mark.slow
@pytest.mark.parametrize(
    "changed",
    [
        {"train__optimizer": "muon"},
        {"train__optimizer": "adafactor"},
        {"train__ema_decay": 0.5},
        {"train__keep_best": False, "train__schedule": "linear"},
        {"train__steps": 3, "batch__packing": False, "batch__microbatches": 3},
        {"model__family": "qwen3", "model__remat": "full"},
    ],
    ids=lambda changed: "-".join(f"{v}" for v in changed.values()),
)
def test_other_ways_to_train(changed, sft, tmp_path):
    workdir = tmp_path / "run"
    done = sft.run(workdir, control__exchanged=False, **changed)
    assert done.returncode == 0, done.stderr
    records = updates_of(workdir)
    assert records[-1]["nll"] < records[0]["nll"]
    steps = changed.get("train__steps", len(records))
    assert [r["step"] for r in records] == list(range(1, steps + 1))
    load_pretrained(workdir / "export")


@pytest.mark.slow
def test_the_average_is_what_comes_out(sft, tmp_path):
    """With a decay near 1 the average stays at the start, wherever training goes."""
    start, slow = tmp_path / "start", tmp_path / "slow"
    same = {"control__exchanged": False, "train__keep_best": False}
    assert sft.run(start, **same, train__learning_rate=1e-30).returncode == 0
    assert sft.run(slow, **same, train__ema_decay=0.999999).returncode == 0
    a, b = (load_file(w / "export" / "model.safetensors") for w in (start, slow))
    for name in a:
        np.testing.assert_allclose(a[name], b[name], atol=1e-5)
    assert records_of(slow)[-1]["nll"] < records_of(start)[-1]["nll"] - 0.1


@pytest.mark.slow
def test_a_checkpoint_keeps_what_it_came_with(sft, finished_sft, tmp_path):
    """Its chat template, how it is meant to be sampled from, its tokenizer."""
    source = shutil.copytree(finished_sft / "export", tmp_path / "source")
    template = (source / "chat_template.jinja").read_text()
    (source / "chat_template.jinja").write_text("{#- mine -#}" + template)
    path = source / "generation_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"temperature": 0.7, "top_k": 20, "do_sample": True}))
    done = sft.run(tmp_path / "run", model__path=source, control__exchanged=False)
    assert done.returncode == 0, done.stderr
    export = tmp_path / "run" / "export"
    kept = json.loads((export / "generation_config.json").read_text())
    assert (kept["temperature"], kept["top_k"], kept["do_sample"]) == (0.7, 20, True)
    end = load_pretrained(export)[1].convert_tokens_to_ids("<|end|>")
    assert kept["eos_token_id"] in (end, [end])
    assert (export / "chat_template.jinja").read_text().startswith("{#- mine -#}")
    # It went on from where the source was.
    report = report_of(tmp_path / "run")
    assert report["baselines"]["nll/start"]["value"] == pytest.approx(
        report_of(finished_sft)["results"]["nll"]["value"], rel=1e-5
    )


@pytest.mark.slow
def test_what_is_measured_is_what_is_exported(sft, finished_sft, tmp_path):
    """A checkpoint in bfloat16 does not hold every small update of its float32 master weights."""
    source = shutil.copytree(finished_sft / "export", tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    tensors = {name: x.astype(ml_dtypes.bfloat16) for name, x in tensors.items()}
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    about = json.loads((source / "config.json").read_text())
    about.pop("torch_dtype", None)
    (source / "config.json").write_text(json.dumps(about | {"dtype": "bfloat16"}))
    workdir = tmp_path / "run"
    done = sft.run(workdir, model__path=source, control__exchanged=False)
    assert done.returncode == 0, done.stderr
    export, _ = load_pretrained(workdir / "export")
    held_out = token_store.load(workdir / "artifacts" / "tokens" / "held_out")
    logprob, tokens = Scorer(data_mesh(2), rows=2, width=WIDTH)(export, None, held_out)
    measured = report_of(workdir)["results"]["nll"]["value"]
    assert measured == pytest.approx(-logprob.sum() / tokens.sum(), rel=1e-6)
