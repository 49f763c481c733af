"""Which words two sets of texts differ in: log-odds with an informative Dirichlet prior."""

import numpy as np


def log_odds(
    first_W: np.ndarray, second_W: np.ndarray, prior_W: np.ndarray, *, strength: float
) -> tuple[np.ndarray, np.ndarray]:
    """How much more likely each word is in the first set, and how sure that is.

    Monroe, Colaresi and Quinn (2008), "Fightin' Words", equations 16, 20 and 22: the log-odds of a
    word in one set less those in the other, with counts that a prior smooths, and that over its
    standard deviation. Words that are frequent everywhere, or rare, get a small z.

    Args:
        first_W, second_W: counts of W words.
        prior_W: counts of the words in a background; above 0.
        strength: how many words the prior weighs, which is the background scaled to this sum.

    Returns:
        (float64 [W] log-odds ratio, positive where the word is the first set's, float64 [W] z).

    Raises:
        ValueError: shapes that differ, fewer than two words, a prior with a count that is not above
            0.
    """
    first_W, second_W, prior_W = (np.asarray(x, np.float64) for x in (first_W, second_W, prior_W))
    if not first_W.shape == second_W.shape == prior_W.shape:
        raise ValueError(
            f"counts have shapes {first_W.shape}, {second_W.shape}, {prior_W.shape}; one is needed"
        )
    if len(prior_W) < 2:
        raise ValueError(f"there are {len(prior_W)} words; odds need at least 2")
    if not np.all(prior_W > 0) or not strength > 0:
        raise ValueError("every count of the prior and its strength must be above 0")
    alpha_W = prior_W * (strength / prior_W.sum())

    def odds(counts_W: np.ndarray) -> np.ndarray:
        smooth_W = counts_W + alpha_W
        return np.log(smooth_W) - np.log(smooth_W.sum() - smooth_W)

    delta_W = odds(first_W) - odds(second_W)
    variance_W = 1 / (first_W + alpha_W) + 1 / (second_W + alpha_W)
    return delta_W, delta_W / np.sqrt(variance_W)
