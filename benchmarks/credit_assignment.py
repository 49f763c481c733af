"""Which advantage estimator learns most from a long conversation that is paid once, at its end?

    python benchmarks/credit_assignment.py            # runs what is missing, then prints the table
    python benchmarks/credit_assignment.py --table    # prints the table of the finished runs

The world is `relay_world.Relay`: two agents, twelve own turns each, one model for both. For each
seed a small model imitates noisy scripts, its critic learns how their episodes end, and every
variant starts from that same model and sees the same game seeds. A run's gain is the mean score of
the trained model minus that of the warm start on held-out games, paired by game.

Finished runs stand in the JSON file and are not run again, so the script may be stopped any time.
"""

import argparse
import dataclasses
import functools
import json
import os
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
import optax
from relay_world import Relay, scripted_episode

from jaxconv.data.plan import plan_counted
from jaxconv.data.template import take_apart
from jaxconv.data.tokenizer import train_tokenizer
from jaxconv.data.trajectories import Trajectories
from jaxconv.errors import Refused
from jaxconv.evals.statistics import CONFIDENCE, Estimate, paired_difference
from jaxconv.models.config import DecoderConfig
from jaxconv.models.decode import unstack
from jaxconv.models.decoder import Decoder
from jaxconv.models.heads import ActorCritic, ValueHead
from jaxconv.objectives.ppo import PPOCoefficients
from jaxconv.rollout.engine import Engine, EngineShape
from jaxconv.rollout.selfplay import Game, Played, SelfPlay
from jaxconv.rollout.trajectories import to_trajectories
from jaxconv.train import atomic, compile_cache
from jaxconv.train.mesh import data_mesh, replicate, share_rows
from jaxconv.train.optimizer import make_optimizer, make_schedule
from jaxconv.train.ppo import PPO, Credit, Minibatching
from jaxconv.train.state import TrainState
from jaxconv.train.update import make_update
from jaxconv.train.warm_start import Example, pack_examples, warm_start_loss

RESULTS = Path(__file__).parent / "results" / "credit_assignment.json"
DEFAULT = "first, λ_turn .95"
VARIANTS = {
    "token GAE, λ 1": Credit(estimator="token", lam_token=1.0),
    "token GAE, λ .95": Credit(estimator="token", lam_token=0.95),
    DEFAULT: Credit(),
    "last, λ_turn .95": Credit(anchor="last"),
    "first, λ_turn .5": Credit(lam_turn=0.5),
    "first, λ_turn .95, λ_token .95": Credit(lam_token=0.95),
}
SEEDS = range(5)
LEARNER = "learner"

# Episodes of one run never share a seed across its stages, nor with another run's.
SEEDS_OF_A_RUN = 1 << 32
WARM_START_SEEDS, SELF_PLAY_SEEDS, HELD_OUT_SEEDS = (i << 28 for i in range(3))


@dataclasses.dataclass(frozen=True)
class Settings:
    """Sizes of every run; they stand in the results and results of others are refused."""

    turns: int = 12  # of each agent
    skill: float = 0.7  # of the imitated scripts, a letter
    embed_dim: int = 64
    layers: int = 2
    heads: int = 2
    mlp_dim: int = 128
    dialogues: int = 2000
    warm_start_steps: int = 400
    warm_start_streams: int = 32
    warm_start_rate: float = 4e-3
    iterations: int = 16
    games: int = 32  # an iteration
    held_out: int = 256  # games
    learning_rate: float = 5e-4
    critic_warmup: int = 2  # iterations that train the critic's head alone
    value_gradient: float = 1.0  # of the critic into the trunk, in imitation too: it shall read
    entropy_coef: float = 0.0
    epochs: int = 2
    minibatches: int = 2
    slots: int = 32
    turn_budget: int = 4  # tokens; a right turn has three, two letters and the end
    cache: tuple[int, ...] = (128, 160)  # tokens; the last holds twelve turns of the full budget
    rows: int = 4  # packed rows of a micro-batch
    width: int = 256  # tokens of a packed row: two streams


class Bench:
    """What all runs share: tokens, the model's shape, and engines that are compiled once."""

    def __init__(self, settings: Settings):
        self.settings = s = settings
        corpus = [scripted_episode(s.turns, s.skill, seed) for seed in range(100)]
        words = (m.content for e in corpus for view in e.views.values() for m in view)
        tokenizer = train_tokenizer(words, 350)
        self.template = take_apart(tokenizer)
        self.decoder = DecoderConfig(
            family="llama",
            vocab_size=len(tokenizer),
            embed_dim=s.embed_dim,
            num_layers=s.layers,
            num_heads=s.heads,
            num_kv_heads=s.heads,
            head_dim=s.embed_dim // s.heads,
            mlp_dim=s.mlp_dim,
            max_positions=s.cache[-1],
            tie_embeddings=True,
            unroll_layers=True,
        )
        shape = EngineShape(
            slots=s.slots,
            lengths=s.cache,
            burst=s.turn_budget,
            leave=1.0,
            prefill_rows=(s.slots // 2, s.slots),
            prefill_tokens=(16,),
        )
        self._engines = [
            Engine(self.decoder, shape, stop_ids=[self.template.end], key=jax.random.key(0))
            for _ in range(2)
        ]
        self._table = SelfPlay(
            lambda: Relay(s.turns),
            _no_scripts,
            self.template,
            {LEARNER: self._engines},
            turn_budget=s.turn_budget,
            concurrent=s.slots,
        )
        self._optimizer = make_optimizer(
            optax.constant_schedule(s.learning_rate), b2=0.99, weight_decay=0.0, clip_norm=0.5
        )
        self._ppo = PPO(
            self._optimizer,
            coefficients=PPOCoefficients(
                clip_low=0.2,
                clip_high=0.28,
                value_clip=0.0,
                value_coef=0.5,
                entropy_coef=s.entropy_coef,
                kl_coef=0.0,
            ),
            credit=VARIANTS[DEFAULT],
            minibatching=Minibatching(s.epochs, s.minibatches, s.rows, s.width),
            temperature=1.0,
            value_gradient=s.value_gradient,
            teams=1,
        )

    def play(self, model: ActorCritic, games: Sequence[Game]) -> list[Played]:
        """Both seats by `model`; what is said depends on the model and the games alone."""
        weights = jax.device_put(unstack(model), jax.local_devices()[0])
        for engine in self._engines:
            engine.weights = weights
        return self._table.play(games)

    def held_out(self, model: ActorCritic, seed: int) -> list[Played]:
        """The same games for every model of a seed, by game and by sampling key."""
        first = seed * SEEDS_OF_A_RUN + HELD_OUT_SEEDS
        n = self.settings.held_out
        return self.play(model, [Game((1 << 27) + i, first + i, (LEARNER,)) for i in range(n)])

    def warm_start(self, seed: int) -> ActorCritic:
        """A model from scratch that imitates noisy scripts and expects what they earn."""
        s = self.settings
        first = seed * SEEDS_OF_A_RUN + WARM_START_SEEDS
        examples = [
            Example(*self.template.render_view(view), episode.rewards[agent])
            for episode in (
                scripted_episode(s.turns, s.skill, first + i) for i in range(s.dialogues)
            )
            for agent, view in episode.views.items()
        ]
        decoder = jax.jit(Decoder, static_argnums=0)(self.decoder, jax.random.key(seed))
        optimizer = make_optimizer(
            make_schedule(s.warm_start_rate, kind="cosine", steps=s.warm_start_steps, warmup=20),
            b2=0.95,
            weight_decay=0.01,
            clip_norm=1.0,
        )
        mean = float(np.mean([e.outcome for e in examples]))
        mesh = data_mesh(s.rows)
        # The critic shapes the trunk, to learn who was right; PPO alone is too short for that.
        loss = functools.partial(warm_start_loss, value_gradient=s.value_gradient)
        update = make_update(loss, optimizer, mesh)
        model = replicate(ActorCritic(decoder, ValueHead(s.embed_dim, mean)), mesh)
        state = TrainState.create(model, optimizer)
        placements = plan_counted(
            [len(e.tokens) for e in examples],
            examples=s.warm_start_streams,
            rows_multiple=s.rows,
            width=s.width,
            seed=seed,
            steps=s.warm_start_steps,
        )
        for placement in placements:
            chosen = [examples[i] for i in placement.records]
            batch, count = pack_examples(chosen, width=s.width, rows=s.rows, multiple=4)
            state, _ = update(state, share_rows(batch, mesh), np.int32(count))
        return state.model

    def self_play(self, warm: ActorCritic, credit: Credit, seed: int) -> tuple[ActorCritic, dict]:
        """PPO from `warm`; returns the model and, by iteration, what was logged."""
        s = self.settings
        ppo = self._ppo
        ppo.credit = credit  # read anew in every iteration; the compiled update knows none of it
        warm = replicate(warm, ppo.mesh)
        state = TrainState.create(jax.tree.map(lambda x: x.copy(), warm), self._optimizer)
        first = seed * SEEDS_OF_A_RUN + SELF_PLAY_SEEDS
        log = {"score": [], "right": [], "explained_variance": [], "entropy": []}
        for iteration in range(s.iterations):
            ids = range(iteration * s.games, (iteration + 1) * s.games)
            played = self.play(state.model, [Game(i, first + i, (LEARNER,)) for i in ids])
            keep = [[[True] * stream.turns for stream in game.streams] for game in played]
            trajectories = to_trajectories(
                played, keep, ["relay"], pad_streams=64, pad_tokens=64, pad_turns=8
            )
            state, metrics, _ = ppo.iterate(
                state,
                trajectories,
                reference=None,
                learn_policy=iteration >= s.critic_warmup,
                seed=(seed, iteration),
            )
            log["score"].append(float(np.mean(scores(played))))
            log["right"].append(float(np.mean([game.infos[0]["right"] for game in played])))
            log["explained_variance"].append(explained_variance(trajectories))
            log["entropy"].append(metrics["policy/entropy"])
        return state.model, log


def _no_scripts(name: str, env: Relay, agent: str, seed: int):
    raise Refused(f"player {name!r} is not the model")


def scores(played: Sequence[Played]) -> np.ndarray:
    """The outcome of each game, which is the same for both agents."""
    return np.array([game.infos[0]["score"] for game in played])


def explained_variance(t: Trajectories) -> float | None:
    """1 − Var(outcome − value) / Var(outcome) over the own tokens, with the critic as it sampled.

    Unlike one against the critic's targets, it means the same for every estimator. None where all
    outcomes are the same and there is nothing to explain.
    """
    own = t.turn_ids >= 0
    outcome = np.broadcast_to(t.turn_rewards.sum(1, keepdims=True), own.shape)[own]
    if np.ptp(outcome) == 0:
        return None
    return float(1 - np.var(outcome - t.value[own]) / np.var(outcome))


def run_missing(settings: Settings, output: Path) -> dict:
    """Runs every variant on every seed that is not in `output` yet; writes after each run."""
    results = read(settings, output)
    bench = None
    for seed in SEEDS:
        missing = [name for name in VARIANTS if run_name(name, seed) not in results["runs"]]
        if not missing:
            continue
        bench = bench or Bench(settings)
        began = time.monotonic()
        warm = bench.warm_start(seed)
        before = bench.held_out(warm, seed)
        print(
            f"seed {seed}: warm start {scores(before).mean():.3f}, "
            f"right {np.mean([g.infos[0]['right'] for g in before]):.3f}, "
            f"{time.monotonic() - began:.0f} s",
            flush=True,
        )
        for name in missing:
            began = time.process_time()
            trained, log = bench.self_play(warm, VARIANTS[name], seed)
            after = bench.held_out(trained, seed)
            gain = paired_difference(scores(after), scores(before), seed=seed, unit="score")
            results["runs"][run_name(name, seed)] = {
                "variant": name,
                "seed": seed,
                "warm_start": float(scores(before).mean()),
                "trained": float(scores(after).mean()),
                "gain": dataclasses.asdict(gain),
                "log": {
                    key: [x if x is None else round(x, 5) for x in values]
                    for key, values in log.items()
                },
                "cpu_s": round(time.process_time() - began, 1),
            }
            atomic.write_text(output, compact_json(results))
            print(f"{run_name(name, seed)}: gain {gain}", flush=True)
    return results


def run_name(variant: str, seed: int) -> str:
    return f"{variant} / seed {seed}"


def read(settings: Settings, path: Path) -> dict:
    """Finished runs, or an empty record; refuses those of other settings."""
    now = json.loads(json.dumps(dataclasses.asdict(settings)))  # tuples become lists
    if not path.is_file():
        return {
            "settings": now,
            "variants": {name: dataclasses.asdict(credit) for name, credit in VARIANTS.items()},
            "machine": f"{platform.machine()} CPU, {os.cpu_count()} cores, jax {jax.__version__}",
            "runs": {},
        }
    results = json.loads(path.read_text())
    # A field that the estimators got since has the value that they had before.
    same = results["variants"].keys() == VARIANTS.keys() and all(
        getattr(VARIANTS[name], field) == value
        for name, credit in results["variants"].items()
        for field, value in credit.items()
    )
    if results["settings"] != now or not same:
        raise Refused(
            f"{path} holds runs with other settings or variants; name another file with --output"
        )
    return results


def compact_json(results: Mapping) -> str:
    """One line a run, so that the file stays short and its differences readable."""
    dump = functools.partial(json.dumps, ensure_ascii=False, allow_nan=False)
    head = [f" {dump(key)}: {dump(value)}," for key, value in results.items() if key != "runs"]
    runs = [f"  {dump(key)}: {dump(run)}" for key, run in results["runs"].items()]
    return "\n".join(["{", *head, ' "runs": {', ",\n".join(runs), " }", "}", ""])


def over_seeds(values: Sequence[float], unit: str) -> Estimate:
    """Mean with Student's t interval. Seeds are the independent unit: each value holds the noise of
    its warm start, of its training and of its finite number of held-out games."""
    from scipy import stats

    x = np.asarray(values)
    half = stats.t.ppf((1 + CONFIDENCE) / 2, len(x) - 1) * x.std(ddof=1) / np.sqrt(len(x))
    return Estimate(x.mean(), (x.mean() - half, x.mean() + half), len(x), unit)


def table(results: Mapping) -> Iterator[str]:
    """Markdown: a row a variant, over the seeds that are finished for it and for the default."""
    runs = results["runs"]
    warm_up = results["settings"]["critic_warmup"]
    yield "| variant | gain | minus default | seeds above it | curve | explained variance |"
    yield "|---|---|---|---|---|---|"

    def shown(values: Sequence[float]) -> str:
        if len(values) < 2:
            return ", ".join(f"{x:+.3f}" for x in values) or "–"
        e = over_seeds(values, "score")
        return f"{e.value:+.3f} [{e.ci95[0]:+.3f}, {e.ci95[1]:+.3f}]"

    for name in VARIANTS:
        mine = {r["seed"]: r for r in runs.values() if r["variant"] == name}
        default = {r["seed"]: r for r in runs.values() if r["variant"] == DEFAULT}
        pairs = [
            mine[s]["gain"]["value"] - default[s]["gain"]["value"]
            for s in sorted(mine.keys() & default.keys())
        ]
        curve = [np.mean(r["log"]["score"][warm_up:]) - r["warm_start"] for r in mine.values()]
        explained = [
            x
            for r in mine.values()
            for x in r["log"]["explained_variance"][warm_up:]
            if x is not None
        ]
        versus = ("–", "–")
        if name != DEFAULT:
            versus = (shown(pairs), f"{sum(x > 0 for x in pairs)} of {len(pairs)}")
        yield " | ".join(
            [
                f"| {name}",
                shown([r["gain"]["value"] for r in mine.values()]),
                *versus,
                shown(curve),
                f"{np.median(explained):.2f} |" if explained else "– |",
            ]
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=RESULTS, help="JSON of the finished runs")
    parser.add_argument("--table", action="store_true", help="only print what is finished")
    arguments = parser.parse_args()
    settings = Settings()
    if arguments.table:
        results = read(settings, arguments.output)
    else:
        compile_cache.enable()
        results = run_missing(settings, arguments.output)
    print(f"\n{len(results['runs'])} of {len(VARIANTS) * len(SEEDS)} runs\n")
    print("\n".join(table(results)))


if __name__ == "__main__":
    main()
