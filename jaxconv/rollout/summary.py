"""What a batch of finished conversations looks like, as numbers to log."""

import resource
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from jaxconv import processes
from jaxconv.perf.flops import rates_of
from jaxconv.rollout.engine import Engine
from jaxconv.rollout.selfplay import Played


def summarise(games: Sequence[Played], policy: str) -> dict[str, float]:
    """Means over the seats that `policy` played.

    `reward/*` is what the environment paid; `score/*` the overall score and `dimension/*` its parts
    where the environment measures them; `secret/leaked` the share of seats that gave theirs away;
    `turn/*` the policy's own turns; `end/*` the share of games
    by reason; `diversity/*` how much the words differ from game to game.
    """
    seats = [
        (game, seat)
        for game in games
        for seat in range(len(game.agents))
        if game.game.player(seat) == policy
    ]
    rewards = np.array([game.rewards[seat] for game, seat in seats])
    out = {"reward/mean": rewards.mean(), "reward/std": rewards.std()}
    for number in sorted({seat for _, seat in seats}):
        out[f"reward/seat_{number}"] = np.mean(
            [game.rewards[seat] for game, seat in seats if seat == number]
        )
    for team in sorted({game.teams[seat] for game, seat in seats}):
        out[f"reward/team_{team}"] = np.mean(
            [game.rewards[seat] for game, seat in seats if game.teams[seat] == team]
        )
    measured = [game.infos[seat] for game, seat in seats if "dimensions" in game.infos[seat]]
    if measured:
        out["score/mean"] = np.mean([info["overall"] for info in measured])
        for name in measured[0]["dimensions"]:
            out[f"dimension/{name}"] = np.mean([info["dimensions"][name] for info in measured])
        if "secret" in measured[0]["dimensions"]:
            out["secret/leaked"] = np.mean([info["dimensions"]["secret"] < 0 for info in measured])

    turns = [
        (text, valid)
        for game, seat in seats
        for text, valid in zip(game.texts[seat], game.valid[seat], strict=True)
    ]
    tokens = sum(t >= 0 for game, seat in seats for t in game.streams[seat].turn)
    out["turn/invalid"] = 1.0 - np.mean([valid for _, valid in turns]) if turns else 0.0
    out["turn/tokens"] = tokens / max(len(turns), 1)
    out["turn/per_agent"] = len(turns) / len(seats)
    out["game/turns"] = np.mean([len(game.transcript) for game in games])
    out["game/truncated"] = np.mean([game.truncated for game in games])
    ends = Counter(str(game.infos[0].get("end", "cut")) for game in games)
    for reason, count in sorted(ends.items()):
        out[f"end/{reason}"] = count / len(games)
    out["diversity/distinct_2"] = _distinct([text for text, _ in turns], 2)
    out["diversity/distinct_turns"] = len({text for text, _ in turns}) / max(len(turns), 1)
    return {name: float(value) for name, value in out.items()}


def _distinct(texts: Sequence[str], n: int) -> float:
    """Share of different word n-grams among all (Li et al. 2016, "distinct-n")."""
    grams = Counter(
        tuple(words[i : i + n])
        for words in map(str.split, texts)
        for i in range(len(words) - n + 1)
    )
    return len(grams) / max(sum(grams.values()), 1)


def decoded(engines: Sequence[Engine]) -> tuple[int, int]:
    """Tokens sampled, and slot-steps that took, on the engines of all processes."""
    own = sum(engine.sampled for engine in engines), sum(engine.steps for engine in engines)
    sampled, steps = zip(*processes.gather("tokens sampled", own), strict=True)
    return sum(sampled), sum(steps)


def speeds(
    engines: Sequence[Engine],
    sampled: int,
    steps: int,
    games: int,
    lengths: Sequence[int],
    clock: Sequence[float],
    flops: Mapping[str, float],
) -> dict[str, float]:
    """Seconds by phase, rates, the share of slot-steps that sampled a token, and memory.

    Rates are those of all processes together; memory is that of this one.

    Args:
        engines: of this process.
        sampled, steps: of `decoded`.
        games: how many were played.
        lengths: tokens of each stream that was trained on.
        clock: seconds at the start and after each phase: weights, rollout, training.
        flops: model FLOPs of "rollout" and "train".
    """
    sync, rollout, train = np.diff(clock)
    out = {
        "time/sync_s": sync,
        "time/rollout_s": rollout,
        "time/train_s": train,
        "speed/games_per_s": games / rollout,
        "speed/sampled_tokens_per_s": sampled / rollout,
        "speed/trained_tokens_per_s": sum(lengths) / train,
        "speed/slot_occupancy": sampled / max(steps, 1),
        "memory/host_peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    for phase, seconds in (("rollout", rollout), ("train", train)):
        rates = rates_of(flops[phase], seconds, engines[0].config.dtype)
        out |= {f"speed/{phase}_{name}": rate for name, rate in rates.items()}
    # A CPU keeps no account of its own.
    devices = {device for engine in engines for device in engine.group.devices}
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in devices]
    if all(peaks):
        out["memory/device_peak_mib"] = max(peaks) / 2**20
    return out
