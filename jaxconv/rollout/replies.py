"""What a model says next in many conversations, on all devices of a run."""

from collections.abc import Sequence

import jax

from jaxconv import processes
from jaxconv.data.conversation import Message
from jaxconv.data.template import ChatTemplate
from jaxconv.data.template_tools import Tools
from jaxconv.models.decoder import Decoder
from jaxconv.models.device_group import device_groups
from jaxconv.models.handover import hand_over
from jaxconv.rollout.engine import Engine, EngineShape, Sampling
from jaxconv.train import interrupt

_SLOTS = 64


def replies(
    model: Decoder,
    template: ChatTemplate,
    prompts: Sequence[Sequence[Message]],
    *,
    length: int,
    budget: int,
    temperature: float,
    seed: int,
    tools: Sequence[Tools] = (),
    tensor: int = 1,
) -> list[str | None]:
    """One reply to each prompt; every `tensor` devices of every process find some of them.

    Args:
        model: who speaks.
        template: of its tokenizer.
        prompts: conversations whose next message is the assistant's.
        length: tokens that a conversation with its reply may have.
        budget: most tokens of a reply.
        temperature: 0 takes the likeliest token.
        seed: of the sampling; a reply does not depend on the other prompts.
        tools: that each prompt defines; empty where none defines any.
        tensor: devices that hold one copy of the weights.

    Returns:
        A text a prompt; None where the prompt leaves no room for a reply.
    """
    shape = reply_shape(len(prompts), length)
    given = hand_over(model, device_groups(tensor, jax.local_devices()))
    engines = []
    for group, weights in given.items():
        engine = Engine(
            model.config,
            shape,
            stop_ids=[template.end],
            key=jax.random.key(seed),
            sampling=Sampling(temperature),
            group=group,
        )
        engine.weights = weights
        engines.append(engine)
    own = slice(processes.index(), None, processes.count())
    waiting = list(enumerate(prompts))[own][::-1]
    said: list[str | None] = [None] * len(prompts)
    holder: dict[tuple[Engine, int], int] = {}
    while True:
        for engine in engines:
            while waiting and engine.free:
                i, prompt = waiting.pop()
                ids = prompt_ids(template, prompt, tools[i] if tools else ())
                if len(ids) + 2 > length:
                    continue
                slot = engine.open(i)
                holder[engine, slot] = i
                engine.say(slot, ids, budget)
        if not holder:
            break
        interrupt.stop_if_requested("sampling replies")
        busy = [engine for engine in engines if engine.speaking]
        for engine in busy:
            engine.dispatch()
        for engine in busy:
            for turn in engine.collect():
                said[holder.pop((engine, turn.slot))] = template.decode(turn.tokens)
                engine.close(turn.slot)
    everybody = processes.gather("replies", said)
    return [everybody[i % len(everybody)][i] for i in range(len(prompts))]


def reply_shape(prompts: int, length: int) -> EngineShape:
    """The compiled sizes of an engine that replies to so many prompts."""
    return EngineShape(
        slots=min(_SLOTS, prompts),
        lengths=(length,),
        prefill_rows=(16, _SLOTS),
        prefill_tokens=(16, 64, 256),
    )


def prompt_ids(template: ChatTemplate, prompt: Sequence[Message], tools: Tools = ()) -> list[int]:
    """A conversation and the generation prompt after it."""
    *before, (read, _) = template.turns([*prompt, Message("assistant", "")], tools)
    return [i for turn in before for part in turn for i in part] + read
