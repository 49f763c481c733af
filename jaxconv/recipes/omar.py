"""OMAR: one model, all roles. Multi-turn, multi-agent self-play RL (arXiv 2602.03109).

1. A tokenizer and a model: a checkpoint, or a small one from scratch.
2. A warm start by imitation of scripted players; the critic learns how their episodes end.
3. Self-play: the model speaks for every agent of a conversation; the environment pays each of them
   at the end; hierarchical (turn and token) advantages turn that into PPO updates.
4. An arena: the trained model in one seat, its frozen warm start in the others, and everybody else
   who keeps the gain honest.
5. A Hugging Face checkpoint, and a report.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import PurePath
from random import Random

import jax
import numpy as np
import optax

from jaxconv import envs, processes
from jaxconv.data.template import take_apart
from jaxconv.data.trajectories import Trajectories
from jaxconv.errors import Failed, Refused, Stopped
from jaxconv.evals import arena, cross_play, episodes, self_play_report
from jaxconv.evals.report import Report
from jaxconv.models import hf
from jaxconv.models.decoder import Decoder
from jaxconv.models.heads import ActorCritic
from jaxconv.models.sharding import loosened
from jaxconv.perf.flops import rollout_flops
from jaxconv.perf.planned import Planned
from jaxconv.recipes.imitation import (
    ARENA_SEEDS,
    SELF_PLAY_SEEDS,
    imitate,
    left_out,
    scripted_words,
)
from jaxconv.rollout import settings
from jaxconv.rollout.planned import planned_self_play
from jaxconv.rollout.quality import QualityRules, review
from jaxconv.rollout.selfplay import Game, Played
from jaxconv.rollout.shared import SharedGames, play
from jaxconv.rollout.summary import decoded, speeds, summarise
from jaxconv.rollout.terminal import talk
from jaxconv.rollout.trajectories import to_trajectories
from jaxconv.rollout.world import (
    SEEDS_OF_A_RUN,
    World,
    make_env,
    set_weights,
)
from jaxconv.train import interrupt
from jaxconv.train.alarms import Alarms
from jaxconv.train.loop import Loop, LoopSettings, Pending
from jaxconv.train.mesh import place, tell_of_idle_devices, training_mesh
from jaxconv.train.optimizer import make_optimizer, make_schedule, rates
from jaxconv.train.ppo import PPO
from jaxconv.train.profiling import parse_steps
from jaxconv.train.progress import Progress
from jaxconv.train.starting_point import (
    as_stored,
    is_saved,
    load,
    load_decoder,
    save,
    starting_model,
    stored_bytes,
)
from jaxconv.train.state import TrainState
from jaxconv.train.trainable import join, lora_config, merged, split
from jaxconv.train.workdir import Workdir

LEARNER, TRAINED, FROZEN, SHARP = "learner", "trained", "frozen", "frozen-sharp"

ARENA_GAMES = 1 << 27  # first game id of the arena; self-play counts from 0


def check(config) -> None:
    """Refuses what cannot work, before any work is done."""
    settings.check(config)


def run(config, workdir: Workdir) -> Report:
    """Trains, evaluates, exports and reports; a stage whose output is there is skipped."""
    idle = tell_of_idle_devices(config, "warm_start.rows", "minibatching.rows")
    start, tokenizer = starting_model(
        config, workdir.artifacts / "tokenizer", lambda: scripted_words(config)
    )
    workdir.refuse_small_scratch(stored_bytes(start.decoder))
    world = World(config, take_apart(tokenizer), start.decoder.config)
    frozen = imitate(config, workdir, world, start, tokenizer)
    notes = left_out(workdir)
    trained, early = self_play(config, workdir, world, frozen)
    trained = as_stored(trained)  # what is exported is what is evaluated
    export(config, workdir, world, trained, tokenizer)
    say_the_same(config, workdir, world, trained)
    report, talks = compete(config, workdir, world, trained, frozen)
    episodes.write(workdir, config.env.name, partial(make_env, config), talks)
    report.notes += notes + early + idle
    report.artifacts |= {
        "export": "export",
        "episodes": f"artifacts/{episodes.FILE}",
        "warm_start": "artifacts/warm_start",
        "metrics": "metrics.jsonl",
    }
    self_play_report.add_training(report, workdir)
    self_play_report.write_model_card(workdir, config, report)
    return report


# ---------------------------------------------------------------- 3. self-play


def self_play(
    config, workdir: Workdir, world: World, frozen: ActorCritic
) -> tuple[ActorCritic, list[str]]:
    """PPO on the model's conversations with itself. Returns the model and notes for the report."""
    ppo, optimizer, rate = learner(config)
    frozen = place(frozen, ppo.mesh)
    trained, resting = split(frozen, lora_config(config), jax.random.key(config.seed))
    conversations = workdir.checkpoints / "self_play_conversations"
    work = Iterations(config, world, ppo, frozen, resting, rate, conversations)
    settings = LoopSettings(
        "self_play",
        config.self_play.iterations,
        checkpoint_every=config.checkpoint.every,
        keep=config.checkpoint.keep,
        headline=("reward/mean", "score/mean"),
        profile=parse_steps(config.profile.steps),
        ahead=0,  # the next conversations need the weights that these numbers are about
        dtype=world.decoder.dtype,
    )
    start = jax.tree.map(lambda x: x.copy(), trained)
    start = TrainState.create(start, optimizer, mesh=ppo.mesh)
    outcome = Loop(work, start, settings, workdir).run()
    work.close()
    return merged(loosened(outcome.model), loosened(resting)), outcome.notes


class Iterations:
    """Self-play as the work of a loop: a step is an iteration, conversations and updates."""

    def __init__(
        self,
        config,
        world: World,
        ppo: PPO,
        frozen: ActorCritic,
        resting: Decoder | None,
        rate: np.ndarray,
        conversations: PurePath,
    ):
        self._config, self._world, self._ppo = config, world, ppo
        # Of an adapter the resting base is the frozen model's decoder: no second copy.
        self._frozen, self._resting, self._rate = frozen, resting, rate
        self._engines = world.engines(frozen)
        self._games = SharedGames(world.table({LEARNER: self._engines}), conversations)
        self._alarms = Alarms()

    def step(
        self, state: TrainState, done: int, save: Callable[[], None]
    ) -> tuple[TrainState, Pending]:
        clock = [time.monotonic()]
        # The host takes part in a conversation: engines send it every burst.
        with jax.transfer_guard("allow"):
            set_weights(self._engines, join(state.model, self._resting))
            jax.block_until_ready([engine.weights for engine in self._engines])
            clock.append(time.monotonic())
            played = self._games.play(
                schedule(self._config, done),
                save,
                self._config.checkpoint.rollout_seconds,
                f"self-play stopped in iteration {done + 1} of {self._config.self_play.iterations}",
            )
        clock.append(time.monotonic())
        trajectories, metrics = appraise(self._config, self._world, played)
        state, learned, finite = self._ppo.iterate(
            state,
            trajectories,
            reference=self._frozen,
            learn_policy=done >= self._config.self_play.critic_warmup,
            seed=(self._config.seed, done),
            resting=self._resting,
        )
        clock.append(time.monotonic())
        lengths, architecture = trajectories.lengths, self._world.decoder
        sampled, steps = decoded(self._engines)
        flops = {
            "rollout": rollout_flops(architecture, lengths, sampled),
            "train": self._ppo.flops(architecture, lengths, trains_weights=self._resting is None),
        }
        metrics |= learned
        metrics |= speeds(self._engines, sampled, steps, len(played), lengths, clock, flops)
        metrics["policy/learning_rate"] = self._rate[done]
        names = self._ppo.tensor_names
        return state, Pending(metrics, finite, names, sum(lengths), sum(flops.values()))

    def evaluate(self, state: TrainState) -> dict[str, float]:
        return {}  # the arena does it, at the end

    def verdict(self, step: int, metrics: dict[str, float]) -> str | None:
        if step <= self._config.self_play.critic_warmup:
            return None
        why = self._alarms.sound(metrics, self._config.alarm)
        return why and (
            f"Self-play stopped early: {why}. The model after iteration {step} is what was "
            "measured and exported."
        )

    def snapshot(self) -> tuple[dict, dict]:
        """The alarms, and the games when there are any under way."""
        return {}, {"alarms": dataclasses.asdict(self._alarms), "games": self._games.snapshot()}

    def like(self, host: dict) -> dict:
        return {}

    def restore(self, arrays: dict, host: dict) -> None:
        self._alarms = Alarms(**host["alarms"])
        self._games.restore(host["games"])

    def close(self) -> None:
        self._games.close()


def learner(
    config, devices: Sequence[jax.Device] | None = None
) -> tuple[PPO, optax.GradientTransformation, np.ndarray]:
    """The PPO update, its optimizer, and the learning rate at the start of every iteration; on
    other devices than those of this run if they are given."""
    s = config.self_play
    coefficients, credit, minibatching = settings.ppo_parts(config)
    updates = minibatching.epochs * minibatching.minibatches
    schedule = make_schedule(
        s.learning_rate, kind=s.schedule, steps=s.iterations * updates, warmup=s.warmup
    )
    optimizer = make_optimizer(
        schedule,
        kind=s.optimizer,
        b2=s.b2,
        weight_decay=s.weight_decay,
        clip_norm=s.clip_norm,
    )
    ppo = PPO(
        optimizer,
        coefficients=coefficients,
        credit=credit,
        minibatching=minibatching,
        temperature=config.rollout.temperature,
        value_gradient=s.value_gradient,
        teams=len(teams(config)),
        mesh=training_mesh(config, minibatching.rows, devices),
    )
    return ppo, optimizer, rates(schedule, s.iterations * updates)[::updates]


def appraise(
    config, world: World, played: Sequence[Played]
) -> tuple[Trajectories, dict[str, float]]:
    """What conversations teach, and what they were like as numbers."""
    verdicts, flagged = review(played, world.template.end, QualityRules(**config.quality))
    metrics = summarise(played, LEARNER)
    metrics |= {f"quality/{name}": share for name, share in flagged.items()}
    punish(played, verdicts, config.self_play.invalid_penalty)
    trajectories = to_trajectories(
        played, verdicts, teams(config), pad_streams=64, pad_tokens=64, pad_turns=8
    )
    return trajectories, metrics


def teams(config) -> list[str]:
    """Names of the environment's teams: advantages are whitened within each."""
    env = make_env(config)
    env.reset(0)
    return sorted(set(env.teams.values()))


def schedule(config, iteration: int) -> list[Game]:
    """The games of one iteration: self-play, and a share in which all seats but one are scripts."""
    training, _ = envs.temperaments(config.env.name)
    env = make_env(config)
    games = []
    for i in range(config.self_play.games):
        game = iteration * config.self_play.games + i
        seed = config.seed * SEEDS_OF_A_RUN + SELF_PLAY_SEEDS + game
        rng = Random(f"cast {seed}")  # the environment draws its episode from the seed itself
        env.reset(seed)
        seats = range(len(env.agents))
        cast = [LEARNER for _ in seats]
        if rng.random() < config.self_play.script_share:
            own = rng.choice(seats)
            cast = [LEARNER if seat == own else rng.choice(training) for seat in seats]
        games.append(Game(game, seed, tuple(cast)))
    return games


def punish(games: Sequence[Played], verdicts, penalty: float) -> None:
    """Takes `penalty` from the reward of every turn that nobody understood.

    Not from flagged turns: their own advantage is zero, so it would be the turns before that pay.
    """
    for game, kept in zip(games, verdicts, strict=True):
        for seat, rewards in enumerate(game.turn_rewards):
            for turn, keep in enumerate(kept[seat]):
                if keep and not game.valid[seat][turn]:
                    rewards[turn] -= penalty


# ---------------------------------------------------------------- 4. arena


def compete(
    config, workdir: Workdir, world: World, trained: ActorCritic, frozen: ActorCritic
) -> tuple[Report, list[Played]]:
    """Plays the study of `cross_play` and reports it.

    Returns also the talks of the frozen and of the trained model with itself.
    """
    training, held_out = envs.temperaments(config.env.name)
    study = cross_play.Study(
        trained=TRAINED,
        frozen=FROZEN,
        sharp=SHARP,
        scripts=training,
        held_out=held_out,
        players=tuple(config.env.players),
        games=config.arena.games,
        script_games=config.arena.script_games,
        league=config.arena.league,
        seed=config.seed,
    )
    policies = {TRAINED: world.engines(trained), FROZEN: world.engines(frozen)}
    policies[SHARP] = world.twins(policies[FROZEN], config.arena.sharp_temperature)
    pairings = study.pairings()

    def on_progress(done: int, total: int) -> None:
        progress.update(done, {})
        if interrupt.noticed():
            raise Stopped(f"the arena stopped after {done} of {total} games; it starts again")

    with Progress(workdir, "arena", sum(p.games for p in pairings)) as progress:
        results = arena.play_all(
            lambda players: world.table(policies, players),
            pairings,
            seed=world.first_seed + ARENA_SEEDS,
            first_id=ARENA_GAMES,
            on_progress=on_progress,
        )
    report = cross_play.evaluate(study, results)
    report.kernels = world.kernels()
    same = [
        results[arena.Pairing((name,) * study.players[0], study.games)]
        for name in (FROZEN, TRAINED)
    ]
    self_play_report.add_transcripts(report, *same)
    return report, [*same[0], *same[1]]


# ---------------------------------------------------------------- 5. export


def export(config, workdir: Workdir, world: World, trained: ActorCritic, tokenizer) -> None:
    """Writes a Hugging Face folder whose `generate` stops and samples as self-play did."""

    def there() -> bool:
        workdir.fetch_export()
        return is_saved(workdir.export)

    if not processes.of_process_0("is the export there", there):
        ends = dict.fromkeys((world.template.end, *trained.decoder.config.eos_token_ids))
        generation = {
            "eos_token_id": list(ends),
            "do_sample": True,
            "temperature": config.rollout.temperature,
            "max_new_tokens": config.rollout.turn_budget,
        }
        kept = hf.generation_config(config.model.path) if config.model.path else {}
        save(trained, tokenizer, workdir.export, kept | generation)


def say_the_same(config, workdir: Workdir, world: World, trained: ActorCritic) -> None:
    """Plays some games with the exported checkpoint: every word must be that of the model."""
    games = [
        Game(2 * ARENA_GAMES - 1 - i, world.first_seed + ARENA_SEEDS + i, (LEARNER,))
        for i in range(16)
    ]
    workdir.fetch_export()
    reloaded = load(workdir.export, config)
    said = [
        [g.transcript for g in play(games, world.table({LEARNER: world.engines(model)}))]
        for model in (trained, reloaded)
    ]
    if said[0] != said[1]:
        raise Failed(f"{workdir.export} does not say what the trained model says")


def evaluate(config, workdir: Workdir) -> Report:
    """`--eval_only`: the arena again, with the exported checkpoint."""
    world, trained = exported(config, workdir)
    frozen = load(workdir.artifacts / "warm_start", config)
    return compete(config, workdir, world, trained, frozen)[0]


def chat(config, workdir: Workdir) -> None:
    """`--chat`: a person takes the first seat against the exported checkpoint."""
    if processes.count() > 1:
        raise Refused(f"--chat needs one process; {processes.count()} were started")
    talk(*exported(config, workdir))


def exported(config, workdir: Workdir) -> tuple[World, ActorCritic]:
    workdir.fetch_export()
    if not is_saved(workdir.export):
        raise Refused(f"{workdir.export} holds no export; train first")
    trained = load(workdir.export, config)
    tokenizer = load_decoder(workdir.export, config)[1]
    return World(config, take_apart(tokenizer), trained.decoder.config), trained


# ---------------------------------------------------------------- before there is a model


def planned(config, devices: Sequence[jax.Device]) -> list[Planned]:
    """Self-play of a run on these devices, its arguments shapes alone."""
    ppo, optimizer, _ = learner(config, devices)
    return planned_self_play(config, devices, ppo, optimizer)
