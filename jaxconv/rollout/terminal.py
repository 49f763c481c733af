"""A person at the keyboard as a player."""

from collections.abc import Sequence
from functools import partial
from random import Random

from jaxconv import envs
from jaxconv.data.conversation import Message
from jaxconv.models.heads import ActorCritic
from jaxconv.rollout.selfplay import Game, SelfPlay
from jaxconv.rollout.world import World, make_env

_PERSON, _MODEL = "person", "model"


class TerminalPlayer:
    """Shows what the agent hears and asks for its words; Ctrl-D or Ctrl-C leaves the program."""

    def __init__(self):
        from rich.console import Console

        self._console = Console()
        self._agent = self._rules = ""

    def sit_down(self, agent: str, rules: str) -> "TerminalPlayer":
        """Speaks for `agent` from now on; the rules are shown below its brief."""
        self._agent, self._rules = agent, rules
        return self

    def act(self, messages: Sequence[Message]) -> str:
        for message in messages:
            if message.role == "system":
                self.read(message.content)
                if self._rules not in message.content:
                    self.read(self._rules)
            else:
                self.hear(message.name or "", message.content)
        return self._console.input(f"[bold green]{_shown(self._agent)} (you):[/] ").strip()

    def hear(self, name: str, text: str) -> None:
        """Shows what somebody said."""
        self._console.print(f"[bold]{_shown(name)}:[/] {_shown(text)}")

    def read(self, text: str) -> None:
        """Shows lines that nobody said."""
        for line in text.splitlines():
            self._console.print(_shown(line))

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        """A person remembers."""


def talk(world: World, model: ActorCritic) -> None:
    """Lets a person in the first seat play one game after another against a model."""
    config, person = world.config, TerminalPlayer()
    table = SelfPlay(
        partial(make_env, config),
        lambda name, env, agent, seed: person.sit_down(
            agent, envs.rules(config.env.name, env, agent)
        ),
        world.template,
        {_MODEL: world.engines(model)},
        turn_budget=config.rollout.turn_budget,
        concurrent=1,
    )
    seed = Random().randrange(1 << 24)
    while True:
        [played] = table.play([Game(seed, seed, (_PERSON, _MODEL))])
        own = max((i for i, (seat, _) in enumerate(played.transcript) if seat == 0), default=-1)
        for seat, text in played.transcript[own + 1 :]:
            person.hear(played.agents[seat], text)
        outcome = played.infos[0]
        person.read(f"{outcome.get('end', 'cut')}: you scored {outcome.get('overall', 0):.2f}")
        for name, value in outcome.get("dimensions", {}).items():
            person.read(f"  {name} {value:.1f}")
        for agent, info in list(zip(played.agents, played.infos, strict=True))[1:]:
            person.read(f"{agent} scored {info.get('overall', 0):.2f}")
        for text, valid in zip(played.texts[0], played.valid[0], strict=True):
            if not valid:
                person.read(f"Not understood, so it did nothing: {text}")
        if input("\nAgain? [y/N] ").strip().lower() != "y":
            return
        seed += 1


def _shown(text: str) -> str:
    from rich.markup import escape

    return escape(printable(text))


def printable(text: str) -> str:
    """`text` without what moves the cursor or changes the terminal: control characters become ?."""
    return "".join(c if c.isprintable() or c == " " else "?" for c in text)
