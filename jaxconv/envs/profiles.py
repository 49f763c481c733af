"""Characters and situations with SOTOPIA's field names (Zhou et al., ICLR 2024, section 2)."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class AgentProfile:
    """A character, with SOTOPIA's field names. Everything but the name is private to it."""

    first_name: str
    occupation: str
    personality_and_values: str
    secret: str


@dataclass(frozen=True, slots=True)
class EnvironmentProfile:
    """A situation, with SOTOPIA's field names. Goals stand in seat order, each one private.

    `relationship` is 1, "know by name": an agent knows nothing of the others but their names.
    """

    codename: str
    scenario: str
    agent_goals: tuple[str, ...]
    relationship: int = 1
