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
from collections.abc import Sequence
from pathlib import Path
from random import Random

import jax
import numpy as np

from jaxconv import envs
from jaxconv.data.template import ChatTemplate, take_apart
from jaxconv.data.tokenizer import train_tokenizer
from jaxconv.errors import Failed, Refused, Stopped
from jaxconv.evals import arena, cross_play, self_play_report
from jaxconv.evals.report import Report
from jaxconv.models import hf
from jaxconv.models.config import DecoderConfig
from jaxconv.models.decode import unstack
from jaxconv.models.decoder import Decoder
from jaxconv.models.heads import ActorCritic, ValueHead
from jaxconv.objectives import whitening
from jaxconv.objectives.advantages import check_pair
from jaxconv.objectives.ppo import PPOCoefficients
from jaxconv.rollout.engine import Engine, EngineShape, Sampling
from jaxconv.rollout.quality import QualityRules, review
from jaxconv.rollout.selfplay import Game, Played, SelfPlay
from jaxconv.rollout.summary import summarise
from jaxconv.rollout.terminal import TerminalPlayer, printable
from jaxconv.rollout.trajectories import to_trajectories
from jaxconv.train import compile_cache, interrupt, warm_start
from jaxconv.train.checkpoint import Checkpoints
from jaxconv.train.config import config_value
from jaxconv.train.mesh import replicate
from jaxconv.train.metrics import MetricsWriter
from jaxconv.train.optimizer import make_optimizer
from jaxconv.train.ppo import PPO, Credit, Minibatching
from jaxconv.train.profiling import Profiler, parse_steps
from jaxconv.train.progress import Progress
from jaxconv.train.state import TrainState
from jaxconv.train.workdir import Workdir

LEARNER, TRAINED, FROZEN, SHARP = "learner", "trained", "frozen", "frozen-sharp"

# Episodes of one run never share a seed across its stages, nor with another run's.
SEEDS_OF_A_RUN = 1 << 32
WARM_START_SEEDS, HELD_OUT_SEEDS, SELF_PLAY_SEEDS, ARENA_SEEDS = (i << 28 for i in range(4))
UNROLLED_LAYERS = 4  # models of up to so many layers run them as straight-line code
ARENA_GAMES = 1 << 27  # first game id of the arena; self-play counts from 0

AT_LEAST = {
    "seed": 0,
    "warm_start.dialogues": 1,
    "warm_start.held_out": 1,
    "warm_start.steps": 0,
    "warm_start.streams": 1,
    "warm_start.evaluate_every": 1,
    "warm_start.rows": 1,
    "rollout.slots": 1,
    "rollout.engines": 1,
    "rollout.lengths": 1,
    "rollout.burst": 1,
    "rollout.prefill_rows": 1,
    "rollout.prefill_tokens": 1,
    "rollout.turn_budget": 1,
    "self_play.iterations": 0,
    "self_play.games": 1,
    "minibatching.epochs": 1,
    "minibatching.minibatches": 1,
    "minibatching.rows": 1,
    "minibatching.capacity": 1,
    "quality.repeated_ngram": 1,
    "quality.repeats": 2,
    "checkpoint.every": 1,
    "checkpoint.warm_start_every": 1,
    "checkpoint.keep": 1,
}
"""The least value of fields that count something."""

FRACTIONS = (
    "self_play.script_share",
    "self_play.value_gradient",
    "credit.gamma_turn",
    "credit.lam_turn",
    "credit.gamma_token",
    "credit.lam_token",
)


def run(config, workdir: Workdir) -> Report:
    """Trains, evaluates, exports and reports; a stage whose output is there is skipped."""
    began = time.monotonic()
    compiled = compile_cache.stats()
    start, tokenizer = starting_model(config, workdir)
    world = World(config, take_apart(tokenizer), start.decoder.config)
    frozen = imitate(config, workdir, world, start, tokenizer)
    trained, notes = self_play(config, workdir, world, frozen)
    trained = as_stored(trained)  # what is exported is what is evaluated
    export(config, workdir, trained, tokenizer)
    report = compete(config, workdir, world, trained, frozen)
    say_the_same(config, workdir, world, trained)
    report.notes += notes
    self_play_report.add_training(report, workdir)
    self_play_report.add_cost(report, time.monotonic() - began, compile_cache.stats() - compiled)
    self_play_report.write_model_card(workdir, config, report)
    return report


def check(config) -> None:
    """Refuses what cannot work, before any work is done."""
    _training, _held_out = envs.temperaments(config.env.name)
    for field, least in AT_LEAST.items():
        value = config_value(config, field)
        if min(value if isinstance(value, tuple | list) else (value,), default=least - 1) < least:
            raise Refused(f"config.{field}={value}; it must be at least {least}")
    for field in FRACTIONS:
        if not 0 <= (value := config_value(config, field)) <= 1:
            raise Refused(f"config.{field}={value}; it must be from 0 to 1")
    for field in ("rollout.temperature", "arena.sharp_temperature"):
        if not (value := config_value(config, field)) > 0:
            raise Refused(f"config.{field}={value}; it must be above 0")
    if (mode := config.credit.whitening) not in whitening.MODES:
        raise Refused(f"config.credit.whitening={mode!r}; it may be {', '.join(whitening.MODES)}")
    if config.rollout.slots * config.rollout.engines < 2:
        raise Refused("config.rollout.slots=1 with .engines=1; a conversation needs two slots")
    envs.make(config.env.name, **env_options(config))
    ppo_parts(config)
    QualityRules(**config.quality)
    parse_steps(config.profile.steps)
    shape = engine_shape(config)
    if config.rollout.turn_budget >= shape.lengths[-1]:
        raise Refused(
            f"config.rollout.turn_budget={config.rollout.turn_budget}; "
            f"it must be below the cache length, {shape.lengths[-1]}"
        )
    for width in ("warm_start", "minibatching"):
        if config[width].width < shape.lengths[-1]:
            raise Refused(
                f"config.{width}.width={config[width].width}; a row must hold a whole stream, "
                f"config.rollout.lengths[-1]={shape.lengths[-1]}"
            )
    a = config.arena
    if not 2 <= a.script_games <= a.games:
        raise Refused(
            f"config.arena.script_games={a.script_games}; it must be from 2 to "
            f"config.arena.games={a.games}"
        )


# ---------------------------------------------------------------- settings out of the config


def env_options(config, players: int | None = None) -> dict:
    """Options of the environment; with a fixed number of players for the arena."""
    options = config.env.to_dict()
    del options["name"]
    return options if players is None else options | {"players": (players,)}


def engine_shape(config) -> EngineShape:
    r = config.rollout
    return EngineShape(
        slots=r.slots,
        lengths=tuple(r.lengths),
        burst=r.burst,
        leave=r.leave,
        prefill_rows=tuple(r.prefill_rows),
        prefill_tokens=tuple(r.prefill_tokens),
    )


def ppo_parts(config) -> tuple[PPOCoefficients, Credit, Minibatching]:
    try:
        check_pair(config.credit.anchor, config.credit.deposit)
        return (
            PPOCoefficients(**config.loss),
            Credit(**config.credit),
            Minibatching(**config.minibatching),
        )
    except ValueError as error:
        raise Refused(f"config: {error}") from None


@dataclasses.dataclass(frozen=True)
class World:
    """What every stage needs to let models talk in the environment."""

    config: object
    template: ChatTemplate
    decoder: DecoderConfig

    @property
    def first_seed(self) -> int:
        return self.config.seed * SEEDS_OF_A_RUN

    def engines(self, model: ActorCritic, temperature: float | None = None) -> list[Engine]:
        """Engines for one policy, with its weights."""
        r = self.config.rollout
        engines = [
            Engine(
                self.decoder,
                engine_shape(self.config),
                stop_ids=[self.template.end],
                key=jax.random.key(self.config.seed),
                sampling=Sampling(
                    r.temperature if temperature is None else temperature,
                    r.top_k,
                    r.top_p,
                    r.min_p,
                ),
            )
            for _ in range(r.engines)
        ]
        set_weights(engines, model)
        return engines

    def table(self, policies: dict[str, Sequence[Engine]], players: int | None = None) -> SelfPlay:
        """Where games among policies and scripts are played."""
        config = self.config
        options = env_options(config, players)
        return SelfPlay(
            lambda: envs.make(config.env.name, **options),
            lambda name, env, agent, seed: envs.players(config.env.name, env, name, agent, seed),
            self.template,
            policies,
            turn_budget=config.rollout.turn_budget,
            concurrent=config.rollout.slots * config.rollout.engines // 2,
        )


def set_weights(engines: Sequence[Engine], model: ActorCritic) -> None:
    weights = jax.device_put(unstack(model), jax.local_devices()[0])
    for engine in engines:
        engine.weights = weights


# ---------------------------------------------------------------- 1. tokenizer and model


def starting_model(config, workdir: Workdir) -> tuple[ActorCritic, object]:
    """The checkpoint at `config.model.path`, or a small model with a tokenizer of its own."""
    if config.model.path:
        decoder, tokenizer = load_decoder(config.model.path, config)
        if tokenizer is None:
            raise Refused(f"config.model.path={config.model.path!r} has no tokenizer")
        return ActorCritic(decoder, ValueHead(decoder.config.embed_dim)), tokenizer
    tokenizer = small_tokenizer(config, workdir.artifacts / "tokenizer")
    m = config.model
    decoder = DecoderConfig(
        family=m.family,
        vocab_size=len(tokenizer),
        embed_dim=m.embed_dim,
        num_layers=m.num_layers,
        num_heads=m.num_heads,
        num_kv_heads=m.num_kv_heads,
        head_dim=m.embed_dim // m.num_heads,
        mlp_dim=m.mlp_dim,
        max_positions=config.rollout.lengths[-1],
        tie_embeddings=True,
        attention_bias=m.family == "qwen2",
        qk_norm=m.family == "qwen3",
        eos_token_ids=(tokenizer.eos_token_id,),
        pad_token_id=tokenizer.pad_token_id,
        dtype=m.dtype,
        remat=m.remat,
        unroll_layers=m.num_layers <= UNROLLED_LAYERS,
    )
    model = jax.jit(Decoder, static_argnums=0)(decoder, jax.random.key(config.seed))
    return ActorCritic(model, ValueHead(m.embed_dim)), tokenizer


def small_tokenizer(config, folder: Path):
    """A BPE of the scripts' words, kept in the workdir."""
    import transformers

    if not folder.is_dir():
        corpus = scripted_episodes(config, WARM_START_SEEDS, min(config.warm_start.dialogues, 1000))
        texts = (m.content for e in corpus for view in e.views.values() for m in view)
        partial = folder.with_name(f".{folder.name}.partial")
        train_tokenizer(texts, config.model.vocab_size).save_pretrained(partial)
        partial.rename(folder)
    return transformers.AutoTokenizer.from_pretrained(folder)


def scripted_episodes(config, seeds: int, n: int):
    training, _ = envs.temperaments(config.env.name)
    return envs.scripted_corpus(
        config.env.name, env_options(config), n, config.seed * SEEDS_OF_A_RUN + seeds, training
    )


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
                learning_rate=w.learning_rate,
                schedule="cosine",
                steps=w.steps,
                warmup=w.warmup,
                b2=w.b2,
                weight_decay=w.weight_decay,
                clip_norm=w.clip_norm,
            ),
            examples(config, world, WARM_START_SEEDS, w.dialogues),
            examples(config, world, HELD_OUT_SEEDS, w.held_out),
            warm_start.WarmStart(
                steps=w.steps,
                streams=w.streams,
                width=w.width,
                rows=w.rows,
                evaluate_every=w.evaluate_every,
                checkpoint_every=config.checkpoint.warm_start_every,
                keep=config.checkpoint.keep,
                seed=config.seed,
            ),
            workdir,
        )
    # In full precision, whatever the export will have: a resumed run reads it back.
    exact = dataclasses.replace(world.decoder, stored_dtype="float32")
    save(ActorCritic(run_as(start.decoder, exact), start.value_head), tokenizer, folder)
    return start


def examples(config, world: World, seeds: int, n: int) -> list[warm_start.Example]:
    out = []
    for episode in scripted_episodes(config, seeds, n):
        for agent, view in episode.views.items():
            tokens, own = world.template.render_view(view)
            if any(own) and len(tokens) <= config.warm_start.width:
                out.append(warm_start.Example(tokens, own, episode.rewards[agent]))
    return out


def save(model: ActorCritic, tokenizer, folder: Path) -> None:
    hf.save_pretrained(model.decoder, tokenizer, folder)
    hf.save_value_head(model.value_head, folder)


def is_saved(folder: Path) -> bool:
    """The value head is written last."""
    return (folder / "value_head.safetensors").is_file()


def load(folder: Path, config, decoder: DecoderConfig | None = None) -> ActorCritic:
    """What `save` wrote, run as `decoder` says if it is given."""
    model, _ = load_decoder(folder, config)
    model = model if decoder is None else run_as(model, decoder)
    return ActorCritic(model, hf.load_value_head(folder, model.config.embed_dim))


def load_decoder(path: str | Path, config) -> tuple[Decoder, object]:
    """A checkpoint's decoder, executed as the config says, and its tokenizer."""
    model, tokenizer = hf.load_pretrained(path, dtype=config.model.dtype)
    decoder = dataclasses.replace(
        model.config,
        remat=config.model.remat,
        unroll_layers=model.config.num_layers <= UNROLLED_LAYERS,
    )
    return run_as(model, decoder), tokenizer


def run_as(model: Decoder, decoder: DecoderConfig) -> Decoder:
    """The same weights under a configuration that differs in how they are executed or stored."""
    like = jax.eval_shape(lambda: Decoder(decoder, jax.random.key(0)))
    return jax.tree.unflatten(jax.tree.structure(like), jax.tree.leaves(model))


def as_stored(model: ActorCritic) -> ActorCritic:
    """The model with its weights rounded to what a checkpoint of it holds."""
    dtype = model.decoder.config.stored_dtype
    decoder = jax.tree.map(lambda x: x.astype(dtype).astype(x.dtype), model.decoder)
    return ActorCritic(decoder, model.value_head)


# ---------------------------------------------------------------- 3. self-play


@dataclasses.dataclass
class Alarms:
    """Early stop: the two ways in which self-play collapses announce themselves here first."""

    entropy: float | None = None  # of the first iteration
    flat: int = 0  # iterations in a row with hardly any spread of rewards

    def sound(self, metrics: dict[str, float], limits) -> str | None:
        """Why to stop, or None."""
        now = metrics["policy/entropy"]
        self.entropy = now if self.entropy is None else self.entropy
        self.flat = self.flat + 1 if metrics["reward/std"] < limits.reward_std_low else 0
        if now > limits.entropy_high * self.entropy:
            return f"entropy rose from {self.entropy:.3g} to {now:.3g} nats a token"
        if now < limits.entropy_low * self.entropy:
            return f"entropy fell from {self.entropy:.3g} to {now:.3g} nats a token"
        if self.flat >= 3:
            return f"the spread of rewards fell to {metrics['reward/std']:.3g}"
        return None


def self_play(
    config, workdir: Workdir, world: World, frozen: ActorCritic
) -> tuple[ActorCritic, list[str]]:
    """PPO on the model's conversations with itself. Returns the model and notes for the report."""
    s = config.self_play
    coefficients, credit, minibatching = ppo_parts(config)
    updates = s.iterations * minibatching.epochs * minibatching.minibatches
    optimizer = make_optimizer(
        learning_rate=s.learning_rate,
        schedule="constant",
        steps=updates,
        warmup=s.warmup,
        b2=s.b2,
        weight_decay=s.weight_decay,
        clip_norm=s.clip_norm,
    )
    env = envs.make(config.env.name, **env_options(config))
    env.reset(0)
    teams = sorted(set(env.teams.values()))
    ppo = PPO(
        optimizer,
        coefficients=coefficients,
        credit=credit,
        minibatching=minibatching,
        temperature=config.rollout.temperature,
        value_gradient=s.value_gradient,
        teams=len(teams),
    )
    frozen = replicate(frozen, ppo.mesh)
    state = TrainState.create(jax.tree.map(lambda x: x.copy(), frozen), optimizer)
    engines = world.engines(state.model)
    table = world.table({LEARNER: engines})
    alarms, done, in_flight = Alarms(), 0, None
    notes: list[str] = []  # why self-play stopped early

    with Checkpoints(workdir.checkpoints / "self_play", keep=config.checkpoint.keep) as checkpoints:
        saved = checkpoints.latest()
        if saved is not None:
            host = checkpoints.host(saved)
            like = {"state": state}
            if host["rollout"] is not None:
                like["rollout"] = table.like(host["rollout"])
            arrays, _ = checkpoints.restore(saved, like)
            state, done, alarms = arrays["state"], host["done"], Alarms(**host["alarms"])
            notes = host["notes"]
            if host["rollout"] is not None:
                in_flight = (arrays["rollout"], host["rollout"])

        def save_checkpoint(rollout: bool = False) -> None:
            arrays = {"state": state}
            host = {"done": done, "notes": notes, "rollout": None}
            if rollout:
                arrays["rollout"], host["rollout"] = table.snapshot()
            number = (checkpoints.latest() or 0) + 1
            checkpoints.save(number, arrays, host | {"alarms": dataclasses.asdict(alarms)})

        def stop_if_asked(rollout: bool) -> None:
            if interrupt.requested():
                save_checkpoint(rollout)
                checkpoints.wait()
                raise Stopped(f"self-play stopped in iteration {done + 1} of {s.iterations}")

        with (
            MetricsWriter(workdir, "self_play", resume_at=done) as writer,
            Progress(workdir, "self_play", s.iterations, start=done) as progress,
        ):
            profiler = Profiler(workdir, "self_play", parse_steps(config.profile.steps))
            while done < s.iterations and not notes:
                with profiler.step(done + 1):
                    clock = [time.monotonic()]
                    set_weights(engines, state.model)
                    jax.block_until_ready(engines[0].weights)
                    clock.append(time.monotonic())

                    games = schedule(config, done)
                    if in_flight is None:
                        table.start(games)
                    else:
                        table.restore(*in_flight)
                        in_flight = None
                    last_save = time.monotonic()
                    while table.advance():
                        stop_if_asked(rollout=True)
                        if time.monotonic() - last_save > config.checkpoint.rollout_seconds:
                            save_checkpoint(rollout=True)
                            last_save = time.monotonic()
                    played = table.results(games)
                    clock.append(time.monotonic())

                    verdicts, flagged = review(
                        played, world.template.end, QualityRules(**config.quality)
                    )
                    metrics = summarise(played, LEARNER)
                    metrics |= {f"quality/{k}": v for k, v in flagged.items()}
                    punish(played, s.invalid_penalty)
                    trajectories = to_trajectories(
                        played, verdicts, teams, pad_streams=64, pad_tokens=64, pad_turns=8
                    )
                    state, learned = ppo.iterate(
                        state,
                        trajectories,
                        reference=frozen,
                        learn_policy=done >= s.critic_warmup,
                        seed=(config.seed, done),
                    )
                    clock.append(time.monotonic())
                metrics |= learned | timing(engines, trajectories.lengths, clock)
                if not np.isfinite(metrics["loss"]):
                    raise Failed(
                        f"the loss of self-play iteration {done + 1} is {metrics['loss']}; "
                        f"config.self_play.learning_rate={s.learning_rate} may be too high"
                    )
                done += 1
                writer.write(done, metrics)
                progress.update(
                    done,
                    {
                        name: metrics[f"{name}/mean"]
                        for name in ("reward", "score")
                        if f"{name}/mean" in metrics  # games that are cut have no score
                    },
                    tokens=sum(trajectories.lengths),
                )
                if done > s.critic_warmup and (why := alarms.sound(metrics, config.alarm)):
                    notes.append(f"Self-play stopped early after iteration {done}: {why}.")
                if done % config.checkpoint.every == 0 or done == s.iterations or notes:
                    save_checkpoint()
                stop_if_asked(rollout=False)
    return state.model, notes


def schedule(config, iteration: int) -> list[Game]:
    """The games of one iteration: self-play, and a share with a script in one seat."""
    training, _ = envs.temperaments(config.env.name)
    games = []
    for i in range(config.self_play.games):
        game = iteration * config.self_play.games + i
        seed = config.seed * SEEDS_OF_A_RUN + SELF_PLAY_SEEDS + game
        rng = Random(seed)
        cast = [LEARNER] * max(config.env.players)
        if rng.random() < config.self_play.script_share:
            cast[rng.randrange(min(config.env.players))] = rng.choice(training)
        games.append(Game(game, seed, tuple(cast)))
    return games


def punish(games: Sequence[Played], penalty: float) -> None:
    """Takes `penalty` from the reward of every turn that nobody understood."""
    for game in games:
        for rewards, valid in zip(game.turn_rewards, game.valid, strict=True):
            for turn, understood in enumerate(valid):
                if not understood:
                    rewards[turn] -= penalty


def timing(engines: Sequence[Engine], lengths: Sequence[int], clock: list[float]) -> dict:
    """Seconds by phase, tokens a second, and how many slot-steps sampled a token."""
    sync, rollout, train = np.diff(clock)
    sampled = sum(engine.sampled for engine in engines)
    steps = sum(engine.steps for engine in engines)
    return {
        "time/sync_s": sync,
        "time/rollout_s": rollout,
        "time/train_s": train,
        "speed/sampled_tokens_per_s": sampled / rollout,
        "speed/trained_tokens_per_s": sum(lengths) / train,
        "speed/slot_occupancy": sampled / max(steps, 1),
    }


# ---------------------------------------------------------------- 4. arena


def compete(
    config, workdir: Workdir, world: World, trained: ActorCritic, frozen: ActorCritic
) -> Report:
    """Plays the study of `cross_play` and reports it."""
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
    with Progress(workdir, "arena", sum(p.games for p in pairings)) as progress:
        results = arena.play_all(
            lambda players: world.table(policies, players),
            pairings,
            seed=world.first_seed + ARENA_SEEDS,
            first_id=ARENA_GAMES,
            on_progress=lambda done, total: progress.update(done, {}),
        )
    report = cross_play.evaluate(study, results)
    self_play_report.add_transcripts(
        report,
        *(
            results[arena.Pairing((name,) * study.players[0], study.games)]
            for name in (FROZEN, TRAINED)
        ),
    )
    return report


# ---------------------------------------------------------------- 5. export


def export(config, workdir: Workdir, trained: ActorCritic, tokenizer) -> None:
    if not is_saved(workdir.export):
        save(trained, tokenizer, workdir.export)


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
    return compete(config, workdir, world, trained, load(workdir.artifacts / "warm_start", config))


def chat(config, workdir: Workdir) -> None:
    """`--chat`: a person takes the first seat against the exported checkpoint."""
    world, trained = exported(config, workdir)
    options = env_options(config)
    table = SelfPlay(
        lambda: envs.make(config.env.name, **options),
        lambda name, env, agent, seed: TerminalPlayer(agent),
        world.template,
        {TRAINED: world.engines(trained)},
        turn_budget=config.rollout.turn_budget,
        concurrent=1,
    )
    seed = Random().randrange(1 << 24)
    while True:
        [played] = table.play([Game(seed, seed, ("you", TRAINED))])
        said = played.transcript[-1] if played.transcript else None
        if said and said[0] != 0:
            print(f"{played.agents[said[0]]}: {printable(said[1])}")
        outcome = played.infos[0]
        print(f"\n{outcome.get('end', 'cut')}: you scored {outcome.get('overall', 0):.2f}")
        for name, value in outcome.get("dimensions", {}).items():
            print(f"  {name} {value:.1f}")
        if input("\nAgain? [y/N] ").strip().lower() != "y":
            return
        seed += 1


def exported(config, workdir: Workdir) -> tuple[World, ActorCritic]:
    if not is_saved(workdir.export):
        raise Refused(f"{workdir.export} holds no export; train first")
    trained = load(workdir.export, config)
    _, tokenizer = hf.load_pretrained(workdir.export)
    return World(config, take_apart(tokenizer), trained.decoder.config), trained
