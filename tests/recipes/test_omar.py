"""The recipe's own small parts: who plays whom, when self-play gives up, what is exported."""

import dataclasses
import itertools
import types

import jax
import numpy as np
import pytest

from jaxconv import envs
from jaxconv.models.config import DecoderConfig
from jaxconv.models.decoder import Decoder
from jaxconv.models.heads import ActorCritic, ValueHead
from jaxconv.recipes import imitation, omar
from jaxconv.rollout.world import make_env
from jaxconv.train.alarms import Alarms
from jaxconv.train.config import load, override
from jaxconv.train.starting_point import small_decoder

LIMITS = types.SimpleNamespace(
    entropy_high=2.0, entropy_low=0.5, reward_std_low=0.1, truncated_high=0.2
)


def sound(alarms, entropy=1.0, std=1.0, cut=0.0):
    metrics = {"policy/entropy": entropy, "reward/std": std, "game/truncated": cut}
    return alarms.sound(metrics, LIMITS)


@pytest.fixture
def config():
    return load("configs/omar.py").config


def test_alarms_compare_the_entropy_with_the_first_one():
    alarms = Alarms()
    assert sound(alarms, 0.3) is None
    assert sound(alarms, 0.59) is None and sound(alarms, 0.16) is None
    assert sound(alarms, 0.61) == "entropy rose from 0.3 to 0.61 nats a token"
    assert sound(alarms, 0.14) == "entropy fell from 0.3 to 0.14 nats a token"


def test_games_that_outgrow_the_cache_sound_the_alarm():
    alarms = Alarms()
    assert sound(alarms, cut=0.2) is None
    assert sound(alarms, cut=0.25) == "25.0% of the games outgrew the cache"


def test_flat_rewards_sound_the_alarm_the_third_time_in_a_row():
    alarms = Alarms()
    found = [sound(alarms, std=std) for std in (0.01, 0.01, 0.5, 0.01, 0.01)]
    assert found == [None] * 5
    # What is saved and read back goes on counting.
    again = Alarms(**dataclasses.asdict(alarms))
    assert sound(again, std=0.02) == "the spread of rewards fell to 0.02"


def test_an_iteration_without_a_turn_that_counts_has_no_entropy():
    alarms = Alarms()
    assert sound(alarms, entropy=0.0) is None and alarms.entropy is None
    assert sound(alarms, entropy=1.0) is None and alarms.entropy == 1.0
    assert sound(alarms, entropy=0.0) is None
    assert "rose from 1 to 3" in sound(alarms, entropy=3.0)


def test_the_schedule_is_a_function_of_the_iteration(config):
    override(config, ["--config.self_play.games=400", "--config.self_play.script_share=0.3"])
    games = omar.schedule(config, 2)
    assert games == omar.schedule(config, 2)
    assert [game.id for game in games] == list(range(800, 1200))
    assert not {g.seed for g in games} & {g.seed for g in omar.schedule(config, 3)}
    training, held_out = envs.temperaments(config.env.name)
    scripts = [name for game in games for name in game.cast if name != omar.LEARNER]
    assert 0.22 < len(scripts) / len(games) < 0.38
    assert set(scripts) == set(training) and not set(scripts) & set(held_out)
    assert all(len(game.cast) == 2 and omar.LEARNER in game.cast for game in games)
    # Scripts sit in either seat.
    assert {game.cast.index(omar.LEARNER) for game in games} == {0, 1}


@pytest.mark.parametrize(
    "preset", ["", ":tiny", ":league", ":bargaining_qwen2.5_0.5b", ":bargaining_qwen2.5_7b"]
)
def test_every_preset_is_accepted(preset):
    omar.check(load(f"configs/omar.py{preset}").config)


def test_the_learner_sits_in_every_seat_among_scripts(config):
    override(config, ["--config.env.players=(2,3)", "--config.self_play.games=300"])
    env = make_env(config)
    seats = {2: set(), 3: set()}
    for game in omar.schedule(config, 0):
        env.reset(game.seed)
        assert len(game.cast) == len(env.agents)
        own = [seat for seat, name in enumerate(game.cast) if name == omar.LEARNER]
        assert len(own) in (1, len(game.cast))
        if len(own) == 1:
            seats[len(game.cast)] |= {own[0]}
    assert seats == {2: {0, 1}, 3: {0, 1, 2}}


def test_seeds_of_stages_and_of_runs_never_meet(config):
    spans = []
    for seed in (0, 1, 2):
        config.seed = seed
        world = omar.World(config, None, small_decoder(config, 4096))
        for stage in (
            imitation.WARM_START_SEEDS,
            imitation.HELD_OUT_SEEDS,
            imitation.SELF_PLAY_SEEDS,
            imitation.ARENA_SEEDS,
        ):
            spans.append((world.first_seed + stage, world.first_seed + stage + (1 << 28)))
    spans.sort()
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))


def test_only_turns_that_nobody_understood_are_punished():
    game = types.SimpleNamespace(
        turn_rewards=[[0.0, 1.0, 2.0], [0.5]], valid=[[False, True, False], [False]]
    )
    # The last turn of seat 0 is flagged by the quality filter; a script spoke in seat 1.
    omar.punish([game], [[[True, True, False], []]], 0.25)
    assert game.turn_rewards == [[-0.25, 1.0, 2.0], [0.5]]


@pytest.fixture(scope="module")
def model():
    decoder = DecoderConfig(
        family="llama",
        vocab_size=16,
        embed_dim=8,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=8,
        mlp_dim=8,
        max_positions=16,
        stored_dtype="bfloat16",
    )
    return ActorCritic(Decoder(decoder, jax.random.key(0)), ValueHead(8, 1 / 3))


def test_what_is_evaluated_is_what_the_checkpoint_will_hold(model, tmp_path, config):
    rounded = omar.as_stored(model)
    assert rounded.decoder.embed[...].dtype == np.float32
    assert not np.array_equal(rounded.decoder.embed[...], model.decoder.embed[...])
    omar.save(rounded, None, tmp_path / "export")
    assert omar.is_saved(tmp_path / "export")
    loaded = omar.load(tmp_path / "export", config, model.decoder.config)
    assert jax.tree.structure(loaded) == jax.tree.structure(model)
    for found, expected in zip(jax.tree.leaves(loaded), jax.tree.leaves(rounded), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_a_loaded_model_is_executed_as_the_config_says(model, tmp_path, config):
    omar.save(model, None, tmp_path / "export")
    config.model.remat = "dots"
    decoder, tokenizer = omar.load_decoder(tmp_path / "export", config)
    assert decoder.config.remat == "dots" and decoder.config.unroll_layers and tokenizer is None
    assert decoder.layers.config == decoder.config
