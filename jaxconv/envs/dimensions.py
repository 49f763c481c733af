"""The seven SOTOPIA-Eval dimensions, their ranges, and the two ways to make one number of them.

Names and ranges: Zhou et al., "SOTOPIA: Interactive Evaluation for Social Intelligence in Language
Agents", ICLR 2024, section 3.
"""

from collections.abc import Mapping

from jaxconv.errors import Refused

DIMENSIONS: dict[str, tuple[float, float]] = {
    "believability": (0.0, 10.0),
    "relationship": (-5.0, 5.0),
    "knowledge": (0.0, 10.0),
    "secret": (-10.0, 0.0),
    "social_rules": (-10.0, 0.0),
    "financial_and_material_benefits": (-5.0, 5.0),
    "goal": (0.0, 10.0),
}


def overall(dimensions: Mapping[str, float]) -> float:
    """The plain mean of the seven raw dimensions, SOTOPIA's overall score."""
    return sum(dimensions[name] for name in DIMENSIONS) / len(DIMENSIONS)


def normalised(dimensions: Mapping[str, float], weights: Mapping[str, float]) -> float:
    """The weighted mean of the dimensions, each mapped from its range to [0, 1]; itself in [0, 1].

    A training reward: unlike `overall` it does not depend on where a range begins.
    `weights` are those of `complete_weights`.
    """
    total = sum(weights.values())
    return (
        sum(
            weights[name] * (dimensions[name] - low) / (high - low)
            for name, (low, high) in DIMENSIONS.items()
        )
        / total
    )


def complete_weights(weights: Mapping[str, float]) -> dict[str, float]:
    """`weights` with 1 for each dimension not named. Raises Refused for what makes no mean."""
    for name, weight in weights.items():
        if name not in DIMENSIONS:
            raise Refused(f"weights: unknown dimension {name!r}; one of {', '.join(DIMENSIONS)}")
        if not 0 <= weight < float("inf"):
            raise Refused(f"weights: {name} is {weight}; expected a finite number of at least 0")
    complete = {name: float(weights.get(name, 1.0)) for name in DIMENSIONS}
    if sum(complete.values()) == 0:
        raise Refused("weights: all are 0; at least one must be above 0")
    return complete
