"""Early stop: signs that self-play is about to collapse."""

import dataclasses


@dataclasses.dataclass
class Alarms:
    """What was seen so far. Entropy and the spread of rewards tell of a collapse first."""

    entropy: float | None = None  # of the first iteration
    flat: int = 0  # iterations in a row with hardly any spread of rewards

    def sound(self, metrics: dict[str, float], limits) -> str | None:
        """Why to stop, or None."""
        now = metrics["policy/entropy"]
        # 0 means that no turn counted: the quality filter left all of them out.
        if self.entropy is None and now > 0:
            self.entropy = now
        self.flat = self.flat + 1 if metrics["reward/std"] < limits.reward_std_low else 0
        if now > 0 and now > limits.entropy_high * self.entropy:
            return f"entropy rose from {self.entropy:.3g} to {now:.3g} nats a token"
        if now > 0 and now < limits.entropy_low * self.entropy:
            return f"entropy fell from {self.entropy:.3g} to {now:.3g} nats a token"
        if metrics["game/truncated"] > limits.truncated_high:
            return f"{metrics['game/truncated']:.1%} of the games outgrew the cache"
        if self.flat >= 3:
            return f"the spread of rewards fell to {metrics['reward/std']:.3g}"
        return None
