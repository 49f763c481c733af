"""What a model is measured by on conversations and pairs that training never sees."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from jaxconv import processes
from jaxconv.data.conversation import Message
from jaxconv.data.template import ChatTemplate
from jaxconv.data.template_tools import Tools
from jaxconv.data.token_store import TokenStore
from jaxconv.errors import Refused
from jaxconv.models.decoder import Decoder
from jaxconv.rollout.replies import replies
from jaxconv.train import atomic, clock, interrupt
from jaxconv.train.likelihood import Scorer

Prompt = Sequence[Message]
Judge = Callable[[Prompt, str], bool]
"""Whether a reply to a prompt has some property."""


@dataclasses.dataclass(frozen=True)
class Scores:
    """How likely a model finds the examples of a store.

    Attributes:
        logprob: float64 [n, streams], nats, summed over the tokens that the assistant says.
        tokens: int [n, streams], how many they are.
    """

    logprob: np.ndarray
    tokens: np.ndarray

    @property
    def margin(self) -> np.ndarray:
        """[n], nats by which the first stream of a pair is likelier than the second."""
        return self.logprob[:, 0] - self.logprob[:, 1]


def wins(margin: np.ndarray) -> np.ndarray:
    """1 where a margin is above 0, ½ where it is 0."""
    return (np.sign(margin) + 1) / 2


@dataclasses.dataclass(frozen=True)
class Marks:
    """What one model got.

    Attributes:
        scores: by store.
        said: one reply a prompt, None where there was no room for one.
        judged: by property, whether each reply has it; a missing reply has none.
    """

    scores: dict[str, Scores]
    said: list[str | None]
    judged: dict[str, np.ndarray]

    def to_json(self) -> dict[str, Any]:
        """Plain values; numbers come back bit for bit."""
        scores = {
            name: {"logprob": s.logprob.tolist(), "tokens": s.tokens.tolist()}
            for name, s in self.scores.items()
        }
        judged = {name: has.tolist() for name, has in self.judged.items()}
        return {"scores": scores, "said": self.said, "judged": judged}

    @classmethod
    def from_json(cls, kept: dict[str, Any]) -> "Marks":
        scores = {
            name: Scores(np.array(s["logprob"], np.float64), np.array(s["tokens"], int))
            for name, s in kept["scores"].items()
        }
        judged = {name: np.array(has, bool) for name, has in kept["judged"].items()}
        return cls(scores, kept["said"], judged)


@dataclasses.dataclass(frozen=True)
class Exam:
    """Held-out examples, and prompts to reply to.

    Attributes:
        stores: tokenised examples, by name.
        units: a label for each held-out record; those with the same label are not independent.
        prompts: conversations that wait for a reply.
        judges: properties of replies, by name.
        template: of the model's tokenizer.
        scorer: of log-probs.
        length: tokens of a conversation with its reply.
        max_tokens: of a reply.
        temperature: of the replies.
        seed: of the replies.
        tools: that each prompt defines; empty where none defines any.
        tensor: devices of a process that hold one copy of the weights to reply with.

    Raises:
        Refused: fewer than two units are left in a store.
    """

    stores: dict[str, TokenStore]
    units: Sequence[str]
    prompts: Sequence[Prompt]
    judges: dict[str, Judge]
    template: ChatTemplate
    scorer: Scorer
    length: int
    max_tokens: int
    temperature: float
    seed: int
    tools: Sequence[Tools] = ()
    tensor: int = 1

    def __post_init__(self):
        for name, store in self.stores.items():
            units = len({self.units[i] for i in store.record})
            if units < 2:
                raise Refused(
                    f"{name}: {units} of the held-out conversations is left; an interval needs at "
                    "least 2, so config.data.held_out or config.batch.width must be larger"
                )

    def kept_marks(self, path: Path, model: Callable[[], Decoder]) -> Marks:
        """Marks at `path`; a model sits the exam, and they are put there first, if they are not."""
        if not processes.of_process_0("are the marks there", path.is_file):
            sitting = model()  # it may have to be trained first
            with clock.spending(clock.EVALUATION):
                marks = self.marks(sitting)
            with processes.process_0_first("the marks"):
                if processes.index() == 0:
                    atomic.write_json(path, marks.to_json())
        return Marks.from_json(json.loads(path.read_text()))

    def marks(self, model: Decoder) -> Marks:
        """Lets a model sit the exam."""
        watch = partial(interrupt.stop_if_requested, "measuring a model")
        scores = {
            name: Scores(*self.scorer(model, None, store, watch))
            for name, store in self.stores.items()
        }
        said = replies(
            model,
            self.template,
            self.prompts,
            length=self.length,
            budget=self.max_tokens,
            temperature=self.temperature,
            seed=self.seed,
            tools=self.tools,
            tensor=self.tensor,
        )
        pairs = list(zip(self.prompts, said, strict=True))
        judged = {
            name: np.array([text is not None and judge(prompt, text) for prompt, text in pairs])
            for name, judge in self.judges.items()
        }
        return Marks(scores, said, judged)
