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
import json
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from random import Random

import jax
import numpy as np
import optax

from jaxconv import envs
from jaxconv.data.template import take_apart
from jaxconv.data.trajectories import Trajectories
from jaxconv.errors import Failed, Refused, Stopped
from jaxconv.evals import arena, cross_play, episodes, self_play_report
from jaxconv.evals.report import Report
from jaxconv.models.heads import ActorCritic
from jaxconv.rollout import settings
from jaxconv.rollout.quality import QualityRules, review
from jaxconv.rollout.selfplay import Game, Played, SelfPlay
from jaxconv.rollout.summary import speeds, summarise
from jaxconv.rollout.terminal import talk
from jaxconv.rollout.trajectories import to_trajectories
from jaxconv.rollout.world import (
    SEEDS_OF_A_RUN,
    World,
    make_env,
    scripted_episodes,
    set_weights,
)
from jaxconv.train import atomic, interrupt, warm_start
from jaxconv.train.alarms import Alarms
from jaxconv.train.checkpoint import Checkpoints
from jaxconv.train.mesh import replicate
from jaxconv.train.metrics import MetricsWriter
from jaxconv.train.optimizer import make_optimizer, make_schedule
from jaxconv.train.ppo import PPO
from jaxconv.train.profiling import Profiler, parse_steps
from jaxconv.train.progress import Progress
from jaxconv.train.starting_point import (
    as_stored,
    is_saved,
    load,
    load_decoder,
    run_as,
    save,
    starting_model,
)
from jaxconv.train.state import TrainState
from jaxconv.train.workdir import Workdir

LEARNER, TRAINED, FROZEN, SHARP = "learner", "trained", "frozen", "frozen-sharp"
HEADLINE = ("reward", "score")

WARM_START_SEEDS, HELD_OUT_SEEDS, SELF_PLAY_SEEDS, ARENA_SEEDS = (i << 28 for i in range(4))
ARENA_GAMES = 1 << 27  # first game id of the arena; self-play counts from 0


def check(config) -> None:
    """Refuses what cannot work, before any work is done."""
    settings.check(config)


def run(config, workdir: Workdir) -> Report:
    """Trains, evaluates, exports and reports; a stage whose output is there is skipped."""
    if jax.process_count() > 1:
        raise Refused(f"OMAR runs as one process; {jax.process_count()} were started")
    start, tokenizer = starting_model(
        config, workdir.artifacts / "tokenizer", lambda: scripted_words(config)
    )
    world = World(config, take_apart(tokenizer), start.decoder.config)
    frozen = imitate(config, workdir, world, start, tokenizer)
    notes = left_out(workdir)
    trained, early = self_play(config, workdir, world, frozen)
    trained = as_stored(trained)  # what is exported is what is evaluated
    export(config, workdir, world, trained, tokenizer)
    say_the_same(config, workdir, world, trained)
    report, talks = compete(config, workdir, world, trained, frozen)
    episodes.write(workdir, config.env.name, partial(make_env, config), talks)
    report.notes += notes + early
    report.artifacts |= {
        "export": "export",
        "episodes": f"artifacts/{episodes.FILE}",
        "warm_start": "artifacts/warm_start",
        "metrics": "metrics.jsonl",
    }
    self_play_report.add_training(report, workdir)
    self_play_report.write_model_card(workdir, config, report)
    return report


# ---------------------------------------------------------------- 2. warm start


def imitate(config, workdir: Workdir, world: World, start: ActorCritic, tokenizer) -> ActorCritic:
    """Fine-tunes on scripted dialogues, every agent's view one example; the frozen opponent."""
    folder = workdir.artifacts / "warm_start"
    w = config.warm_start
    if is_saved(folder):
        return load(folder, config, world.decoder)
    if w.steps:
        start = warm_start.fit(
            start,
            make_optimizer(
                make_schedule(w.learning_rate, kind="cosine", steps=w.steps, warmup=w.warmup),
                b2=w.b2,
                weight_decay=w.weight_decay,
                clip_norm=w.clip_norm,
            ),
            examples(config, world, workdir, WARM_START_SEEDS, w.dialogues),
            examples(config, world, workdir, HELD_OUT_SEEDS, w.held_out),
            warm_start.WarmStart(
                steps=w.steps,
                streams=w.streams,
                width=w.width,
                rows=w.rows,
                evaluate_every=w.evaluate_every,
                checkpoint_every=config.checkpoint.warm_start_every,
                keep=config.checkpoint.keep,
                seed=config.seed,
                value_gradient=w.value_gradient,
            ),
            workdir,
        )
    # In full precision, whatever the export will have: a resumed run reads it back.
    exact = dataclasses.replace(world.decoder, stored_dtype="float32")
    save(ActorCritic(run_as(start.decoder, exact), start.value_head), tokenizer, folder)
    return start


def examples(
    config, world: World, workdir: Workdir, seeds: int, n: int
) -> list[warm_start.Example]:
    """Every agent's view of scripted dialogues; those longer than a row are left out and counted.

    Raises:
        Refused: none fits.
    """
    width = config.warm_start.width
    out, longer = [], []
    for episode in scripted_episodes(config, seeds, n):
        for agent, view in episode.views.items():
            tokens, own = world.template.render_view(view)
            if len(tokens) > width:
                longer.append(len(tokens))
            elif any(own):
                out.append(warm_start.Example(tokens, own, episode.rewards[agent]))
    if not out:
        raise Refused(
            f"config.warm_start.width={width}; no scripted dialogue fits, "
            f"the longest has {max(longer)} tokens"
        )
    if seeds == WARM_START_SEEDS:
        counts = {"used": len(out), "longer_than_a_row": len(longer), "width": width}
        atomic.write_json(workdir.artifacts / "warm_start_data.json", counts)
    return out


def left_out(workdir: Workdir) -> list[str]:
    """A note when the warm start could not use every dialogue."""
    path = workdir.artifacts / "warm_start_data.json"
    counts = json.loads(path.read_text()) if path.is_file() else {"longer_than_a_row": 0}
    if not counts["longer_than_a_row"]:
        return []
    return [
        f"The warm start left out {counts['longer_than_a_row']} views of dialogues that are longer "
        f"than a row of {counts['width']} tokens, and used {counts['used']}."
    ]


def scripted_words(config) -> Iterator[str]:
    """What a small tokenizer is trained on."""
    dialogues = min(config.warm_start.dialogues, 1000)
    for episode in scripted_episodes(config, WARM_START_SEEDS, dialogues):
        for view in episode.views.values():
            yield from (message.content for message in view)


# ---------------------------------------------------------------- 3. self-play


@dataclasses.dataclass
class Standing:
    """Where self-play stands: what a checkpoint keeps of it."""

    state: TrainState
    done: int = 0  # iterations
    alarms: Alarms = dataclasses.field(default_factory=Alarms)
    notes: list[str] = dataclasses.field(default_factory=list)  # why it stopped early
    rollout: tuple[list[dict], dict] | None = None  # games that were under way

    @classmethod
    def latest(cls, checkpoints: Checkpoints, state: TrainState, table: SelfPlay) -> "Standing":
        """As it was last saved, or at the beginning with `state`."""
        saved = checkpoints.latest()
        if saved is None:
            return cls(state)
        host = checkpoints.host(saved)
        like = {"state": state}
        if host["rollout"] is not None:
            like["rollout"] = table.like(host["rollout"])
        arrays, _ = checkpoints.restore(saved, like)
        rollout = (arrays["rollout"], host["rollout"]) if "rollout" in arrays else None
        return cls(arrays["state"], host["done"], Alarms(**host["alarms"]), host["notes"], rollout)

    def save(self, checkpoints: Checkpoints, table: SelfPlay | None = None) -> None:
        """Saves it, with the games under way at `table` if one is given."""
        arrays: dict = {"state": self.state}
        host = {
            "done": self.done,
            "alarms": dataclasses.asdict(self.alarms),
            "notes": self.notes,
            "rollout": None,
        }
        if table is not None:
            arrays["rollout"], host["rollout"] = table.snapshot()
        checkpoints.save((checkpoints.latest() or 0) + 1, arrays, host)


def self_play(
    config, workdir: Workdir, world: World, frozen: ActorCritic
) -> tuple[ActorCritic, list[str]]:
    """PPO on the model's conversations with itself. Returns the model and notes for the report."""
    s = config.self_play
    ppo, optimizer, rate = learner(config)
    frozen = replicate(frozen, ppo.mesh)
    engines = world.engines(frozen)
    table = world.table({LEARNER: engines})
    start = TrainState.create(jax.tree.map(lambda x: x.copy(), frozen), optimizer)

    with Checkpoints(workdir.checkpoints / "self_play", keep=config.checkpoint.keep) as checkpoints:
        at = Standing.latest(checkpoints, start, table)
        with (
            MetricsWriter(workdir, "self_play", resume_at=at.done) as writer,
            Progress(workdir, "self_play", s.iterations, start=at.done) as progress,
        ):
            profiler = Profiler(workdir, "self_play", parse_steps(config.profile.steps))
            while at.done < s.iterations and not at.notes:
                with profiler.step(at.done + 1):
                    clock = [time.monotonic()]
                    set_weights(engines, at.state.model)
                    jax.block_until_ready([engine.weights for engine in engines])
                    clock.append(time.monotonic())
                    played = converse(config, table, at, checkpoints)
                    clock.append(time.monotonic())
                    trajectories, metrics = appraise(config, world, played)
                    at.state, learned = ppo.iterate(
                        at.state,
                        trajectories,
                        reference=frozen,
                        learn_policy=at.done >= s.critic_warmup,
                        seed=(config.seed, at.done),
                    )
                    clock.append(time.monotonic())
                metrics |= learned | speeds(engines, len(played), trajectories.lengths, clock)
                metrics["policy/learning_rate"] = rate(at.done)
                if not np.isfinite([metrics["loss"], metrics["gradient_norm"]]).all():
                    raise Failed(
                        f"self-play iteration {at.done + 1}: the loss is {metrics['loss']} and the "
                        f"gradient norm {metrics['gradient_norm']}; "
                        f"config.self_play.learning_rate={s.learning_rate} may be too high"
                    )
                at.done += 1
                writer.write(at.done, metrics)
                # Games that are cut have no score.
                shown = {n: metrics[f"{n}/mean"] for n in HEADLINE if f"{n}/mean" in metrics}
                progress.update(at.done, shown, tokens=sum(trajectories.lengths))
                if at.done > s.critic_warmup and (why := at.alarms.sound(metrics, config.alarm)):
                    at.notes.append(
                        f"Self-play stopped early: {why}. The model after iteration {at.done} is "
                        "what was measured and exported."
                    )
                stop = interrupt.requested()
                last = at.done == s.iterations or at.notes
                if stop or last or at.done % config.checkpoint.every == 0:
                    at.save(checkpoints)
                if stop:
                    checkpoints.wait()
                    raise Stopped(f"self-play stopped after iteration {at.done} of {s.iterations}")
    return at.state.model, at.notes


def learner(config) -> tuple[PPO, optax.GradientTransformation, Callable[[int], float]]:
    """The PPO update, its optimizer, and the learning rate after so many iterations."""
    s = config.self_play
    coefficients, credit, minibatching = settings.ppo_parts(config)
    updates = minibatching.epochs * minibatching.minibatches
    schedule = make_schedule(
        s.learning_rate, kind=s.schedule, steps=s.iterations * updates, warmup=s.warmup
    )
    optimizer = make_optimizer(
        schedule, b2=s.b2, weight_decay=s.weight_decay, clip_norm=s.clip_norm
    )
    ppo = PPO(
        optimizer,
        coefficients=coefficients,
        credit=credit,
        minibatching=minibatching,
        temperature=config.rollout.temperature,
        value_gradient=s.value_gradient,
        teams=len(teams(config)),
    )
    return ppo, optimizer, lambda done: float(schedule(done * updates))


def converse(config, table: SelfPlay, at: Standing, checkpoints: Checkpoints) -> list[Played]:
    """Plays the games of an iteration, those of a checkpoint from where they were."""
    games = schedule(config, at.done)
    if at.rollout is None:
        table.start(games)
    else:
        table.restore(*at.rollout)
        at.rollout = None
    last_save = time.monotonic()
    while table.advance():
        if interrupt.requested():
            at.save(checkpoints, table)
            checkpoints.wait()
            iterations = config.self_play.iterations
            raise Stopped(f"self-play stopped in iteration {at.done + 1} of {iterations}")
        if time.monotonic() - last_save > config.checkpoint.rollout_seconds:
            at.save(checkpoints, table)
            last_save = time.monotonic()
    return table.results(games)


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
    policies = {
        TRAINED: world.engines(trained),
        FROZEN: world.engines(frozen),
        SHARP: world.engines(frozen, config.arena.sharp_temperature),
    }
    pairings = study.pairings()

    def on_progress(done: int, total: int) -> None:
        progress.update(done, {})
        if interrupt.requested():
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
    same = [
        results[arena.Pairing((name,) * study.players[0], study.games)]
        for name in (FROZEN, TRAINED)
    ]
    self_play_report.add_transcripts(report, *same)
    return report, [*same[0], *same[1]]


# ---------------------------------------------------------------- 5. export


def export(config, workdir: Workdir, world: World, trained: ActorCritic, tokenizer) -> None:
    """Writes a Hugging Face folder whose `generate` stops and samples as self-play did."""
    if not is_saved(workdir.export):
        ends = dict.fromkeys((world.template.end, *trained.decoder.config.eos_token_ids))
        generation = {
            "eos_token_id": list(ends),
            "do_sample": True,
            "temperature": config.rollout.temperature,
            "max_new_tokens": config.rollout.turn_budget,
        }
        save(trained, tokenizer, workdir.export, generation)


def say_the_same(config, workdir: Workdir, world: World, trained: ActorCritic) -> None:
    """Plays some games with the exported checkpoint: every word must be that of the model."""
    games = [
        Game(2 * ARENA_GAMES - 1 - i, world.first_seed + ARENA_SEEDS + i, (LEARNER,))
        for i in range(16)
    ]
    reloaded = load(workdir.export, config)
    said = [
        [g.transcript for g in world.table({LEARNER: world.engines(model)}).play(games)]
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
    talk(*exported(config, workdir))


def exported(config, workdir: Workdir) -> tuple[World, ActorCritic]:
    if not is_saved(workdir.export):
        raise Refused(f"{workdir.export} holds no export; train first")
    trained = load(workdir.export, config)
    tokenizer = load_decoder(workdir.export, config)[1]
    return World(config, take_apart(tokenizer), trained.decoder.config), trained
