"""What fine-tuning cannot do is refused in one line that names the field, before any work."""

import json
import random
import shutil
from pathlib import Path

import jax
import pytest

from jaxconv.data.conversation import Conversation
from jaxconv.data.corpus import split
from jaxconv.data.tokenizer import train_tokenizer
from jaxconv.models.config import DecoderConfig
from jaxconv.models.decoder import Decoder
from jaxconv.models.hf import save_pretrained

NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def refused(recipe, workdir, capsys, **changed) -> str:
    """The one line of a refusal, which leaves no workdir behind."""
    assert recipe.main(recipe.arguments(workdir, **changed)) == 2
    err = capsys.readouterr().err
    assert err.startswith("jaxconv: refused: ") and err.count("\n") == 1, err
    assert not workdir.exists()
    return err


def write(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def talk(i: int, words: str = "", system: str = "") -> dict:
    messages = [{"role": "system", "content": system}] if system else []
    messages += [
        {"role": "user", "content": f"question {i}? {words}"},
        {"role": "assistant", "content": f"answer {i}"},
    ]
    return {"messages": messages}


def pair(i: int) -> dict:
    return {"prompt": f"question {i}?", "chosen": f"good {i}", "rejected": f"bad {i}"}


# ---------------------------------------------------------------- settings


BOTH = [
    ({"data__format": "csv"}, "config.data.format='csv'; it may be auto, jaxconv"),
    ({"data__too_long": "cut"}, "config.data.too_long='cut'; it may be truncate_left, split"),
    ({"data__validation": 1}, "config.data.validation=1; it must be at least 2"),
    ({"data__held_out": 1}, "config.data.held_out=1; it must be at least 2"),
    ({"data__examples": 0}, "config.data.examples=0; it must be at least 1"),
    ({"data__example": 3}, "config.data.example: no such field; did you mean"),
    ({"samples__prompts": 1}, "config.samples.prompts=1; it must be at least 2"),
    ({"samples__max_tokens": 0}, "config.samples.max_tokens=0; it must be at least 1"),
    ({"samples__temperature": -1.0}, "config.samples.temperature=-1.0; it must be at least 0"),
    ({"batch__rows": 0}, "config.batch.rows=0; it must be at least 1"),
    ({"batch__microbatches": 0}, "config.batch.microbatches=0; it must be at least 1"),
    ({"batch__width": 7}, "config.batch.width=7; it must be at least 8"),
    ({"train__epochs": 0}, "config.train.epochs=0 and config.train.steps=0; one must be at least"),
    ({"train__optimizer": "sgd"}, "config.train.optimizer='sgd'; it may be adamw, adafactor, muon"),
    ({"train__schedule": "step"}, "config.train.schedule='step'; it may be"),
    ({"train__ema_decay": 1.0}, "config.train.ema_decay=1.0; it must be at least 0 and below 1"),
    ({"train__learning_rate": 0.0}, "config.train.learning_rate=0.0; it must be above 0"),
    ({"train__evaluate_every": 0}, "config.train.evaluate_every=0; it must be at least 1"),
    ({"checkpoint__every": 0}, "config.checkpoint.every=0; it must be at least 1"),
    ({"model__vocab_size": 100}, "config.model.vocab_size=100; it must be at least 261"),
    ({"model__family": "gpt"}, "config.model.family (model_type) is 'gpt'; it may be llama"),
    ({"lora__rank": 2, "lora__targets": "('query',)"}, "config.lora: "),
    ({"profile__steps": "2"}, "config.profile.steps='2'"),
    ({"seed": -1}, "config.seed=-1; it must be at least 0"),
]
PAIRS = [
    ({"dpo__kind": "ppo"}, "config.dpo.kind='ppo'; it may be sigmoid"),
    ({"dpo__kind": "aot"}, "config.dpo.kind='aot' sorts the pairs of a whole batch, and an update"),
    ({"data__format": "hh_rlhf"}, "config.data.format='hh_rlhf' with config.data.path=''; it must"),
    ({"dpo__reference": "none"}, "config.dpo.reference='none'; it may be precomputed, live"),
    ({"dpo__beta": 0.0}, "config.dpo.beta=0.0; it must be above 0"),
    ({"dpo__sft_weight": -1.0}, "config.dpo.sft_weight=-1.0; it must be at least 0"),
    ({"dpo__label_smoothing": 0.5}, "config.dpo: label_smoothing is 0.5; it must be in [0, 0.5)"),
    (
        {"dpo__kind": "ipo", "dpo__label_smoothing": 0.1},
        "config.dpo: label_smoothing is 0.1 but kind 'ipo' has none; it may be set for",
    ),
    ({"dpo__kind": "exo_pair"}, "config.dpo: label_smoothing is 0 but kind 'exo_pair' needs it"),
    ({"dpo__gamma": 0.5}, "config.dpo: gamma is 0.5 but kind 'sigmoid' has none; only 'simpo'"),
    ({"dpo__kind": "simpo", "dpo__gamma": -0.5}, "config.dpo: gamma is -0.5; it must be at least"),
    ({"data__pairs": 0}, "config.data.pairs=0; it must be at least 1"),
    ({"data__traits": "('rude',)"}, "config.data.traits=('rude',); they may be some of name"),
    ({"data__traits": "()"}, "config.data.traits=(); they may be some of name"),
    ({"sft__warmup": -1}, "config.sft.warmup=-1; it must be at least 0"),
]


@pytest.mark.parametrize(
    ("name", "changed", "line"),
    [("sft", *case) for case in BOTH] + [("dpo", *case) for case in BOTH[:2] + PAIRS],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_settings_that_cannot_be(name, changed, line, request, tmp_path, capsys):
    recipe = request.getfixturevalue(name)
    assert line in refused(recipe, tmp_path / "run", capsys, **changed)


def test_a_stage_that_is_left_out_is_not_looked_at(dpo, tmp_path, capsys):
    changed = {"sft__epochs": 0, "sft__warmup": -1, "data__path": tmp_path / "none.jsonl"}
    assert "none.jsonl is not there" in refused(dpo, tmp_path / "run", capsys, **changed)


# ---------------------------------------------------------------- data


@pytest.mark.parametrize("name", ["sft", "dpo"])
def test_a_path_that_is_not_there(name, request, tmp_path, capsys):
    recipe = request.getfixturevalue(name)
    path = tmp_path / "none.jsonl"
    err = refused(recipe, tmp_path / "run", capsys, data__path=path)
    assert f"config.data.path: {path} is not there; it must be" in err


def test_files_of_no_use(sft, tmp_path, capsys):
    (empty := tmp_path / "empty.jsonl").touch()
    assert f"{empty} has no rows" in refused(sft, tmp_path / "run", capsys, data__path=empty)
    (other := tmp_path / "talks.csv").write_text("a,b\n")
    err = refused(sft, tmp_path / "run", capsys, data__path=other)
    assert "its name must end with .jsonl" in err
    rows = write(tmp_path / "rows.jsonl", [{"text": "once upon a time"}] * 3)
    err = refused(sft, tmp_path / "run", capsys, data__path=rows)
    assert "no good row of a known format" in err and "line 1" in err
    (tmp_path / "folder").mkdir()
    err = refused(sft, tmp_path / "run", capsys, data__path=tmp_path / "folder")
    assert "holds no file whose name ends with" in err


def test_rows_of_another_format_than_was_said(sft, tmp_path, capsys):
    path = write(tmp_path / "talks.jsonl", [talk(i) for i in range(20)])
    err = refused(sft, tmp_path / "run", capsys, data__path=path, data__format="sharegpt")
    assert "none of 20 rows is good as 'sharegpt'" in err


def test_fewer_rows_than_are_to_be_held_out(sft, dpo, tmp_path, capsys):
    talks = write(tmp_path / "talks.jsonl", [talk(i) for i in range(14)])
    pairs = write(tmp_path / "pairs.jsonl", [pair(i) for i in range(14)])
    for recipe, path in ((sft, talks), (dpo, pairs)):
        err = refused(recipe, tmp_path / "run", capsys, data__path=path)
        assert "config.data.held_out=8 and config.data.validation=6; together they must be" in err
        assert "below the number of records, 14" in err


def test_pairs_are_for_dpo_and_conversations_for_sft(sft, dpo, tmp_path, capsys):
    talks = write(tmp_path / "talks.jsonl", [talk(i) for i in range(20)])
    pairs = write(tmp_path / "pairs.jsonl", [pair(i) for i in range(20)])
    err = refused(sft, tmp_path / "run", capsys, data__path=pairs)
    assert f"config.data.path='{pairs}' holds preference pairs; it must hold conversations" in err
    err = refused(dpo, tmp_path / "run", capsys, data__path=talks)
    assert f"config.data.path='{talks}' holds conversations; it must hold preference pairs" in err


def many_words(i: int) -> str:
    """Of some 600 tokens, however the tokenizer was trained."""
    return "".join(random.Random(i).choices("abcdefghijklmnopqrstuvwxyz", k=900))


@pytest.mark.parametrize(
    ("policy", "line"),
    [
        ("refuse", "tokens; at most 256 are allowed"),
        (
            "leave_out",
            "train: no example is left of 6 records (6 left out); config.batch.width=256",
        ),
        ("truncate_left", "train: no example is left of 6 records (6 left out)"),
        ("split", "train: no example is left of 6 records (6 left out)"),
    ],
)
def test_conversations_that_are_all_too_long(policy, line, sft, tmp_path, capsys):
    path = write(tmp_path / "talks.jsonl", [talk(i, many_words(i)) for i in range(20)])
    err = refused(sft, tmp_path / "run", capsys, data__path=path, data__too_long=policy)
    assert line in err and (policy != "refuse" or "conversation 'talks.jsonl:" in err)


def test_too_few_are_left_to_be_measured_on(sft, tmp_path, capsys):
    # Which are held out follows from the seed alone where every talk begins in its own way.
    stubs = [Conversation(f"{i}", (), {}) for i in range(20)]
    apart = [int(c.id) for c in split(stubs, validation=6, held_out=8, seed=0).held_out]
    rows = [talk(i, many_words(i) if i in apart[1:] else "") for i in range(20)]
    path = write(tmp_path / "talks.jsonl", rows)
    err = refused(sft, tmp_path / "run", capsys, data__path=path)
    assert "held_out: 1 of the held-out conversations is left; an interval needs at least 2" in err


# ---------------------------------------------------------------- checkpoints


@pytest.fixture(scope="module")
def small_checkpoint(tmp_path_factory):
    """A folder in the Hugging Face format, as a user has one."""
    folder = tmp_path_factory.mktemp("checkpoint") / "small"
    tokenizer = train_tokenizer(["question answer good bad"] * 3, 280)
    config = DecoderConfig(
        family="llama",
        vocab_size=len(tokenizer),
        embed_dim=16,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=16,
        mlp_dim=16,
        max_positions=256,
        tie_embeddings=True,
        eos_token_ids=(tokenizer.eos_token_id,),
        pad_token_id=tokenizer.pad_token_id,
    )
    save_pretrained(Decoder(config, jax.random.key(0)), tokenizer, folder)
    return folder


@pytest.fixture
def checkpoint(small_checkpoint, tmp_path):
    return Path(shutil.copytree(small_checkpoint, tmp_path / "checkpoint"))


def no_folder(folder):
    shutil.rmtree(folder)
    return "no such folder"


def no_weights(folder):
    (folder / "model.safetensors").unlink()
    return "safetensors"


def no_tokenizer(folder):
    for path in folder.glob("*token*"):
        path.unlink()
    return "has no tokenizer"


def no_template(folder):
    (folder / "chat_template.jinja").unlink()
    return "has no chat template"


def no_pad_token(folder):
    path = folder / "tokenizer_config.json"
    about = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in about.items() if k != "pad_token"}))
    return "has no pad token; name one of its tokens in config.model.pad_token"


def torn_generation_config(folder):
    (folder / "generation_config.json").write_text("{")
    return "generation_config.json"


def few_positions(folder):
    path = folder / "config.json"
    about = json.loads(path.read_text())
    path.write_text(json.dumps(about | {"max_position_embeddings": 128}))
    return "config.batch.width=256; the model at config.model.path has 128 positions"


@pytest.mark.parametrize(
    "spoil",
    [
        no_folder,
        no_weights,
        no_tokenizer,
        no_template,
        no_pad_token,
        torn_generation_config,
        few_positions,
    ],
    ids=lambda function: function.__name__,
)
def test_checkpoints_that_cannot_be_started_from(spoil, checkpoint, sft, tmp_path, capsys):
    line = spoil(checkpoint)
    err = refused(sft, tmp_path / "run", capsys, model__path=checkpoint)
    assert line in err and (str(checkpoint) in err or "config.model.path" in err)


def test_a_pad_token_that_the_tokenizer_does_not_have(checkpoint, sft, tmp_path, capsys):
    changed = {"model__path": checkpoint, "model__pad_token": "<nothing>"}
    err = refused(sft, tmp_path / "run", capsys, **changed)
    assert "config.model.pad_token='<nothing>'; it must be a token of the tokenizer" in err


def test_a_system_message_and_a_template_without_one(checkpoint, sft, tmp_path, capsys):
    (checkpoint / "chat_template.jinja").write_text(NO_SYSTEM)
    rows = [talk(i, system="be brief" if i == 7 else "") for i in range(20)]
    path = write(tmp_path / "talks.jsonl", rows)
    err = refused(sft, tmp_path / "run", capsys, model__path=checkpoint, data__path=path)
    assert "conversation 'talks.jsonl:8': the chat template of tokenizer" in err
    assert "no system role" in err


def test_a_tool_message(sft, tmp_path, capsys):
    rows = [talk(i) for i in range(20)]
    rows[3]["messages"][0]["role"] = "tool"
    path = write(tmp_path / "talks.jsonl", rows)
    err = refused(sft, tmp_path / "run", capsys, data__path=path)
    assert "conversation 'talks.jsonl:4': the chat template of tokenizer" in err
    assert "does not show tool calls and tool messages" in err
    assert "leave such conversations out, or start from a checkpoint whose template" in err


# ---------------------------------------------------------------- a workdir of another run


def test_another_config_is_refused(sft, finished_sft, capsys):
    assert sft.main(sft.arguments(finished_sft, batch__rows=4)) == 2
    err = capsys.readouterr().err
    assert "config.batch.rows: 2 -> 4" in err and err.count("\n") == 1
    assert (finished_sft / "report.json").exists()
