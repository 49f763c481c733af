"""Bias and variance of policy-gradient estimators for conversations, by exact enumeration.

    python benchmarks/advantage_bias.py

A conversation of three turns of three binary tokens, with a random bit from the other side between
turns, has 2^11 paths. The policy is tabular: one logit for each prefix that ends before an own
token. So the exact value of every state, the exact policy gradient, and the exact expectation and
variance of every estimator can be written down: no sampling error anywhere.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import numpy as np

from jaxconv.objectives.advantages import hierarchical_advantages, token_gae

KINDS = "aaaoaaaoaaa"  # a: an own token (action), o: a bit of the other side (observation)
IS_ACTION = np.array([kind == "a" for kind in KINDS])
TURN_IDS = np.where(IS_ACTION, np.cumsum(~IS_ACTION), -1).astype(np.int32)
T, N = len(KINDS), 3
TURN_END = np.array([2, 6, 10])


@dataclass(frozen=True)
class Tree:
    """All paths of one random problem. P paths, T positions, N turns, S action prefixes."""

    bits_PT: np.ndarray  # what stands at each position, 0 or 1
    probability_P: np.ndarray  # of the whole path
    turn_rewards_PN: np.ndarray  # mean 1 a conversation, so that a constant error shows
    values_PT: np.ndarray  # exact value of the state before each token
    score_PT: np.ndarray  # d log p(token) / d logit of its prefix; 0 at observations
    prefix_PT: np.ndarray  # which logit that is
    gradient_S: np.ndarray  # exact d E[return] / d logits

    def expectation(self, advantages_PT: np.ndarray) -> tuple[np.ndarray, float]:
        """Mean [S] and total variance of the one-conversation gradient Σ_i A_i ∇ log p(token i)."""
        terms_PT = np.asarray(advantages_PT, np.float64) * self.score_PT
        mean_S = np.zeros_like(self.gradient_S)
        np.add.at(mean_S, self.prefix_PT, self.probability_P[:, None] * terms_PT)
        # a path visits each prefix once, so its squared norm is the sum of its squared terms
        square = np.sum(self.probability_P * np.sum(terms_PT**2, axis=1))
        return mean_S, float(square - np.sum(mean_S**2))

    def relative_error(self, advantages_PT: np.ndarray) -> float:
        """Norm of the bias over the norm of the exact gradient."""
        mean_S, _ = self.expectation(advantages_PT)
        return float(np.linalg.norm(mean_S - self.gradient_S) / np.linalg.norm(self.gradient_S))

    def cosine(self, advantages_PT: np.ndarray) -> float:
        """Cosine between the expected estimate and the exact gradient."""
        mean_S, _ = self.expectation(advantages_PT)
        return float(
            mean_S @ self.gradient_S / np.linalg.norm(mean_S) / np.linalg.norm(self.gradient_S)
        )

    def mean_advantage(self, advantages_PT: np.ndarray) -> float:
        """Expected advantage of a token; 0 for an honest estimator at discount 1."""
        weighted = self.probability_P[:, None] * np.asarray(advantages_PT, np.float64)
        return float(np.sum(weighted[:, IS_ACTION]) / IS_ACTION.sum())

    def noisy_values(self, seed: int, scale: float = 1.0) -> np.ndarray:
        """The exact values with one Gaussian error a state: a critic that is wrong everywhere."""
        error_S = np.random.default_rng(seed).normal(scale=scale, size=self.gradient_S.size)
        return self.values_PT + error_S[self.prefix_PT]


def random_tree(seed: int) -> Tree:
    """A problem with random logits, random observation odds and random rewards after each turn."""
    rng = np.random.default_rng(seed)
    paths = 2**T
    bits_PT = (np.arange(paths)[:, None] >> np.arange(T - 1, -1, -1)) & 1
    # the prefix before position i is a binary number of i bits; offset 2^i − 1 makes ids unique
    number_PT = np.cumsum(bits_PT * 2 ** np.arange(T - 1, -1, -1), axis=1)
    before_PT = np.concatenate([np.zeros((paths, 1), int), number_PT[:, :-1]], axis=1)
    prefix_PT = (before_PT >> np.arange(T, 0, -1)) + 2 ** np.arange(T) - 1
    states = 2**T - 1
    p_one_PT = (1.0 / (1.0 + np.exp(-rng.normal(size=states))))[prefix_PT]
    chosen_PT = np.where(bits_PT == 1, p_one_PT, 1.0 - p_one_PT)

    # a turn's reward depends on everything said up to its end
    turn_rewards_PN = np.stack(
        [
            rng.normal(1.0 / N, 0.7, size=2 ** (e + 1))[number_PT[:, e] >> (T - 1 - e)]
            for e in TURN_END
        ],
        axis=1,
    )
    reward_PT = np.zeros((paths, T))
    reward_PT[:, TURN_END] = turn_rewards_PN

    # backwards: value before i = mean over the bit at i of (reward at i + value before i + 1)
    values_PT, gradient_S = np.zeros((paths, T)), np.zeros(states)
    reach_PT = np.concatenate([np.ones((paths, 1)), np.cumprod(chosen_PT, axis=1)], axis=1)
    after = np.zeros(2**T)  # by number of the prefix that includes the bit
    for i in reversed(range(T)):
        leaf = np.arange(2 ** (i + 1)) << (T - 1 - i)  # one path through each prefix of i + 1 bits
        q = (reward_PT[leaf, i] + after).reshape(-1, 2)  # [prefix before i, bit]
        p = p_one_PT[leaf[::2], i]
        after = (1.0 - p) * q[:, 0] + p * q[:, 1]
        values_PT[:, i] = after[before_PT[:, i] >> (T - i)]
        if IS_ACTION[i]:
            ids = 2**i - 1 + np.arange(2**i)
            gradient_S[ids] = reach_PT[leaf[::2], i] * p * (1.0 - p) * (q[:, 1] - q[:, 0])
    return Tree(
        bits_PT=bits_PT,
        probability_P=reach_PT[:, -1],
        turn_rewards_PN=turn_rewards_PN,
        values_PT=values_PT,
        score_PT=np.where(IS_ACTION, bits_PT - p_one_PT, 0.0),
        prefix_PT=prefix_PT,
        gradient_S=gradient_S,
    )


Estimator = Callable[..., np.ndarray]
compiled_hierarchical = jax.jit(hierarchical_advantages, static_argnames=("anchor", "deposit"))
compiled_token_gae = jax.jit(token_gae)


def hierarchical(anchor: str, deposit: str) -> Estimator:
    """The library's estimator with one valid pair of anchor and deposit."""

    def advantages_PT(tree, values_PT, *, gamma_turn=1.0, lam_turn=1.0, lam_token=1.0):
        paths = len(values_PT)
        advantages, _ = compiled_hierarchical(
            values_PT,
            tree.turn_rewards_PN,
            np.zeros_like(values_PT),
            np.tile(TURN_IDS, (paths, 1)),
            np.tile(IS_ACTION, (paths, 1)),
            np.zeros(paths),
            gamma_turn=gamma_turn,
            lam_turn=lam_turn,
            gamma_token=1.0,
            lam_token=lam_token,
            anchor=anchor,
            deposit=deposit,
        )
        return np.asarray(advantages)

    return advantages_PT


def token_level(tree, values_PT, *, gamma_turn=1.0, lam_turn=1.0, lam_token=1.0) -> np.ndarray:
    """The library's token GAE, each turn's reward on its last token; it knows no turn rates."""
    del gamma_turn, lam_turn
    paths = len(values_PT)
    rewards_PT = np.zeros((paths, T))
    rewards_PT[:, TURN_END] = tree.turn_rewards_PN
    mask_PT = np.tile(IS_ACTION, (paths, 1))
    advantages, _ = compiled_token_gae(
        values_PT, rewards_PT, mask_PT, np.zeros(paths), gamma=1.0, lam=lam_token
    )
    return np.asarray(advantages)


def mismatched(kind: str) -> Estimator:
    """Readings of "turn advantage as a pseudo-reward" that the library refuses to offer.

    "pseudo-reward": V_t = v[e_t]; A_t stands as a reward at e_t and v is subtracted from it again.
    "first + seed": V_t = v[a_t], but A[e_t] := A_t as if it had been measured against v[e_t].
    "last, broadcast": V_t = v[e_t] and every token of the turn gets A_t.
    """

    def advantages_PT(tree, values_PT, *, gamma_turn=1.0, lam_turn=1.0, lam_token=1.0):
        anchor = TURN_END - 2 if kind == "first + seed" else TURN_END
        V_PN = values_PT[:, anchor]
        advantage_PT = np.zeros_like(values_PT)
        A, V_next = 0.0, 0.0
        for t in reversed(range(N)):
            delta = tree.turn_rewards_PN[:, t] + gamma_turn * V_next - V_PN[:, t]
            A, V_next = delta + gamma_turn * lam_turn * A, V_PN[:, t]
            e = TURN_END[t]
            inner = A - values_PT[:, e] if kind == "pseudo-reward" else A
            advantage_PT[:, e] = inner
            for i in (e - 1, e - 2):
                if kind == "last, broadcast":
                    advantage_PT[:, i] = A
                    continue
                inner = values_PT[:, i + 1] - values_PT[:, i] + lam_token * inner
                advantage_PT[:, i] = inner
        return advantage_PT

    return advantages_PT


ESTIMATORS: dict[str, Estimator] = {
    "token GAE": token_level,
    "hierarchical, last + return": hierarchical("last", "return"),
    "hierarchical, last + seed": hierarchical("last", "seed"),
    "hierarchical, first + return": hierarchical("first", "return"),
    "refused: first + seed": mismatched("first + seed"),
    "refused: pseudo-reward, v subtracted again": mismatched("pseudo-reward"),
    "refused: last, broadcast to the turn": mismatched("last, broadcast"),
}

SETTINGS: list[tuple[str, float, dict[str, float]]] = [
    ("all λ = γ = 1, exact critic", 0.0, {}),
    ("all λ = γ = 1, critic noise sd 1", 1.0, {}),
    ("γ_turn 0.95, exact critic", 0.0, {"gamma_turn": 0.95}),
    ("λ_turn 0.5, exact critic", 0.0, {"lam_turn": 0.5}),
    ("λ_turn 0.95, critic noise sd 1", 1.0, {"lam_turn": 0.95}),
    ("λ_turn = λ_token = 0.95, critic noise sd 1", 1.0, {"lam_turn": 0.95, "lam_token": 0.95}),
]


def main(seeds: range = range(5)) -> None:
    """Prints one Markdown table a setting, means over five random problems."""
    trees = [random_tree(seed) for seed in seeds]
    for title, noise, options in SETTINGS:
        print(f"\n**{title}**\n")
        print("| estimator | relative bias | cosine | mean advantage | gradient variance |")
        print("|---|---|---|---|---|")
        for name, estimator in ESTIMATORS.items():
            if name.startswith("refused") and options:
                continue  # biased already without discounts
            rows = []
            for seed, tree in zip(seeds, trees, strict=True):
                values_PT = tree.noisy_values(1000 + seed, noise)
                advantages_PT = estimator(tree, values_PT, **options)
                rows.append(
                    (
                        tree.relative_error(advantages_PT),
                        tree.cosine(advantages_PT),
                        tree.mean_advantage(advantages_PT),
                        tree.expectation(advantages_PT)[1],
                    )
                )
            error, cosine, mean, variance = np.mean(rows, axis=0)
            mean = round(mean, 3) + 0.0  # no minus sign on zero
            print(f"| {name} | {error:.1e} | {cosine:.3f} | {mean:+.3f} | {variance:.2f} |")


if __name__ == "__main__":
    main()
