"""What cannot work is refused in one line that names the field, before any work."""

import json
import shutil

import numpy as np
import pytest

TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def refused(tiny, arguments, capsys) -> str:
    """The one line of a refusal."""
    assert tiny.main(arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("jaxconv: refused: ") and err.count("\n") == 1, err
    return err


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({"self_play__iteration": 3}, "config.self_play.iteration: no such field; did you mean"),
        ({"self_play__games": "many"}, "config.self_play.games='many': must be an integer"),
        ({"self_play__games": 0}, "config.self_play.games=0; it must be at least 1"),
        ({"self_play__script_share": 1.5}, "config.self_play.script_share=1.5; it must be from 0"),
        ({"credit__lam_turn": -0.1}, "config.credit.lam_turn=-0.1; it must be from 0 to 1"),
        ({"rollout__temperature": 0.0}, "config.rollout.temperature=0.0; it must be above 0"),
        ({"seed": -1}, "config.seed=-1; it must be at least 0"),
        ({"credit__deposit": "seed"}, "anchor"),
        ({"credit__anchor": "middle"}, "anchor"),
        ({"credit__whitening": "bleach"}, "config.credit.whitening='bleach'; it may be"),
        ({"credit__estimator": "magic"}, "config.credit.estimator='magic'"),
        ({"loss__clip_low": 2.0}, "clip_low is 2.0; it must lie between 0 and 1"),
        ({"rollout__turn_budget": 384}, "config.rollout.turn_budget=384; it must be below"),
        ({"rollout__turn_budget": 0}, "config.rollout.turn_budget=0; it must be at least 1"),
        ({"rollout__lengths": "()"}, "config.rollout.lengths=(); it must be at least 1"),
        ({"rollout__slots": 1, "rollout__engines": 1}, "a conversation needs two slots"),
        ({"minibatching__width": 100}, "config.minibatching.width=100; a row must hold a whole"),
        ({"warm_start__width": 100}, "config.warm_start.width=100; a row must hold a whole"),
        ({"arena__script_games": 5}, "config.arena.script_games=5; it must be from 2 to"),
        ({"arena__script_games": 1}, "config.arena.script_games=1; it must be from 2 to"),
        ({"env__name": "chess"}, "environment is 'chess'; expected one of bargaining"),
        ({"env__kinds": "('haggling',)"}, "config.env.kinds is ('haggling',); each must be one of"),
        ({"env__players": "(1,)"}, "config.env.players is (1,); each must be 2 to 5"),
        ({"env__turns": "(5, 3)"}, "config.env.turns is (5, 3); expected (fewest, most)"),
        ({"profile__steps": "7"}, "config.profile.steps='7'"),
        ({"quality__repeats": 1}, "config.quality.repeats=1; it must be at least 2"),
        ({"model__family": "gpt"}, "config.model.family (model_type) is 'gpt'; it may be llama"),
        ({"model__dtype": "float99"}, "config.model.dtype is 'float99'; it may be float32"),
        ({"model__remat": "some"}, "config.model.remat is 'some'; it may be none"),
        ({"model__num_kv_heads": 3}, "config.model.num_kv_heads is 3; it must divide"),
        ({"model__num_heads": 16}, "config.model.num_heads=16; it must divide half of"),
        ({"self_play__b2": 1.0}, "config.self_play.b2=1.0; it must be at least 0 and below 1"),
        ({"self_play__optimizer": "sgd"}, "config.self_play.optimizer='sgd'; it may be adamw"),
        ({"self_play__schedule": "step"}, "config.self_play.schedule='step'; it may be"),
        ({"arena__games": 1}, "config.arena.games=1; it must be at least 2"),
        ({"rollout__tensor": 0}, "config.rollout.tensor=0; it must be at least 1"),
        ({"rollout__tensor": 2}, "config.rollout.tensor=2; it must divide the model's num_heads=1"),
        ({"rollout__leave": 0.0}, "config.rollout.leave=0.0; it must be above 0"),
        ({"checkpoint__rollout_seconds": -1.0}, "config.checkpoint.rollout_seconds=-1.0"),
        ({"loss__dual_clip": 0.5}, "config.loss.dual_clip is 0.5; it must be above 1, or 0"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_settings_that_cannot_be(changed, line, tiny, tmp_path, capsys):
    workdir = tmp_path / "run"
    assert line in refused(tiny, tiny.arguments(workdir, **changed), capsys)
    assert not workdir.exists()


@pytest.fixture
def checkpoint(finished, tmp_path):
    """A folder that could be started from, to be spoilt."""
    return shutil.copytree(finished / "artifacts" / "warm_start", tmp_path / "checkpoint")


def no_such_folder(folder):
    shutil.rmtree(folder)
    return "no such folder"


def truncated_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    return "model.safetensors"


def no_weights(folder):
    (folder / "model.safetensors").unlink()
    return "safetensors"


def no_tokenizer(folder):
    for path in folder.glob("*token*"):
        path.unlink()
    return "has no tokenizer"


def broken_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{")
    return "the tokenizer does not load"


def other_architecture(folder):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"model_type": "mamba"}))
    return "mamba"


def other_size(folder):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"intermediate_size": 48}))
    return "config.json expects"


def no_template(folder):
    (folder / "chat_template.jinja").unlink()
    return "has no chat template"


def template_that_counts(folder):
    text = TEMPLATE.replace("m['content']", "m['content'] + (messages | length | string)")
    (folder / "chat_template.jinja").write_text(text)
    return "does not concatenate"


def template_without_system(folder):
    text = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    (folder / "chat_template.jinja").write_text(text + TEMPLATE)
    return "does not concatenate: it refuses a system message"


@pytest.mark.parametrize(
    "spoil",
    [
        no_such_folder,
        truncated_weights,
        no_weights,
        no_tokenizer,
        broken_tokenizer,
        other_architecture,
        other_size,
        no_template,
        template_that_counts,
        template_without_system,
    ],
    ids=lambda function: function.__name__,
)
def test_checkpoints_that_cannot_be_started_from(spoil, checkpoint, tiny, tmp_path, capsys):
    line = spoil(checkpoint)
    workdir = tmp_path / "run"
    err = refused(tiny, tiny.arguments(workdir, model__path=checkpoint), capsys)
    assert line in err and (str(checkpoint) in err or "model_type" in err)
    # Nothing stays that would belong to another config once the mistake is mended.
    assert not workdir.exists()


def test_a_checkpoint_of_another_shape_in_the_workdir(tiny, copy, capsys):
    # Somebody gave the frozen start of a finished run another head, then asked for the rest.
    from safetensors.numpy import load_file, save_file

    (copy / "report.json").unlink()
    shutil.rmtree(copy / "export")
    shutil.rmtree(copy / "checkpoints")
    path = copy / "artifacts" / "warm_start" / "value_head.safetensors"
    tensors = load_file(path)
    save_file({name: np.concatenate([x, x], axis=-1) for name, x in tensors.items()}, path)
    err = refused(tiny, tiny.arguments(copy), capsys)
    assert str(path) in err and "has shape" in err
    assert not (copy / "report.json").exists()


def test_a_self_play_checkpoint_of_another_shape(tiny, copy, tmp_path, capsys):
    from jaxconv.train.checkpoint import Checkpoints

    (copy / "report.json").unlink()
    shutil.rmtree(copy / "export")
    shutil.rmtree(copy / "checkpoints" / "self_play")
    with Checkpoints(copy / "checkpoints" / "self_play") as checkpoints:
        work = {"games": None, "alarms": {"entropy": None, "flat": 0}}
        host = {"done": 1, "best": None, "notes": [], "work": work}
        checkpoints.save(1, {"state": {"model": np.zeros(3, np.float32)}}, host)
    err = refused(tiny, tiny.arguments(copy), capsys)
    assert "checkpoints/self_play/1" in err and "expected" in err


def test_a_checkpoint_of_an_older_version(tiny, copy, capsys):
    from jaxconv.train.checkpoint import Checkpoints

    (copy / "report.json").unlink()
    shutil.rmtree(copy / "export")
    shutil.rmtree(copy / "checkpoints" / "self_play")
    with Checkpoints(copy / "checkpoints" / "self_play") as checkpoints:
        checkpoints.save(1, {"state": np.zeros(3, np.float32)}, {"done": 1, "rollout": None})
    err = refused(tiny, tiny.arguments(copy), capsys)
    assert "checkpoints/self_play/1 keeps done, rollout; expected best, done, notes, work" in err
