"""Replies to many prompts at once are those that a loop over one prompt finds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxconv.data.conversation import Message
from jaxconv.data.template import take_apart
from jaxconv.data.tokenizer import train_tokenizer
from jaxconv.models.config import DecoderConfig
from jaxconv.models.decoder import Decoder
from jaxconv.rollout.replies import prompt_ids, replies

LENGTH, BUDGET = 48, 9
tokenizer = train_tokenizer(["how are you today? fine, and you?"] * 5, 280)
template = take_apart(tokenizer)


def prompt(*texts: str, system: str = "") -> list[Message]:
    """User and assistant in turns, the user first."""
    first = [Message("system", system)] if system else []
    roles = ("user", "assistant") * len(texts)
    return first + [Message(role, text) for role, text in zip(roles, texts, strict=False)]


PROMPTS = [
    prompt("hello"),
    prompt("how are you?", "fine", "and today?"),
    prompt("you", system="be brief"),
    prompt("a" * 30),
    prompt("a" * (LENGTH - 5)),  # room for a token and the end of the turn
    prompt("a" * (LENGTH - 4)),
    prompt("a" * 200),
    prompt("a?"),
]


@pytest.fixture(scope="module")
def model():
    """Random weights, loud enough that a text does not repeat one token over and over."""
    config = DecoderConfig(
        family="llama",
        vocab_size=len(tokenizer),
        embed_dim=32,
        num_layers=2,
        num_heads=2,
        num_kv_heads=2,
        head_dim=16,
        mlp_dim=48,
        max_positions=LENGTH,
        eos_token_ids=(tokenizer.eos_token_id,),
    )
    made = jax.jit(Decoder, static_argnums=0)(config, jax.random.key(3))
    return jax.tree.map(lambda w: w + 0.2 * jax.random.normal(jax.random.key(1), w.shape), made)


@jax.jit
def next_token(model, tokens_T, length):
    return jnp.argmax(model.logits(model(tokens_T[None]))[0, length - 1])


def naive(model, messages) -> str | None:
    """The likeliest token, again and again, each time after a whole forward pass."""
    dicts = [{"role": m.role, "content": m.content} for m in messages]
    ids = tokenizer.apply_chat_template(dicts, add_generation_prompt=True, return_dict=False)
    if len(ids) > LENGTH - 2:
        return None
    said = []
    while len(said) < BUDGET and len(ids) + len(said) < LENGTH:
        row = np.zeros(LENGTH, np.int32)
        row[: len(ids) + len(said)] = ids + said
        said.append(int(next_token(model, row, len(ids) + len(said))))
        if said[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode([i for i in said if i != tokenizer.eos_token_id])


def answers(model, prompts, *, temperature=0.0, seed=0):
    return replies(
        model,
        template,
        prompts,
        length=LENGTH,
        budget=BUDGET,
        temperature=temperature,
        seed=seed,
    )


def test_greedy_replies_are_those_of_a_naive_loop(model):
    found = answers(model, PROMPTS)
    assert found == [naive(model, p) for p in PROMPTS]
    assert len(set(filter(None, found))) > 3 and any(len(set(r)) > 3 for r in filter(None, found))


def test_a_prompt_without_room_gets_none(model):
    found = answers(model, PROMPTS)
    assert [i for i, reply in enumerate(found) if reply is None] == [5, 6]


def test_the_ids_are_those_of_the_template_with_a_generation_prompt():
    for messages in PROMPTS:
        dicts = [{"role": m.role, "content": m.content} for m in messages]
        assert prompt_ids(template, messages) == tokenizer.apply_chat_template(
            dicts, add_generation_prompt=True, return_dict=False
        )


def test_more_prompts_than_slots(model):
    many = [prompt("a" * (1 + i % 7), system="b" * (i % 5)) for i in range(150)]
    found = answers(model, many)
    assert None not in found
    for i in range(150):
        assert found[i] == found[many.index(many[i])]
    assert found[142:] == answers(model, many[142:])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_reply_does_not_depend_on_the_other_prompts(model, temperature):
    whole = answers(model, PROMPTS, temperature=temperature)
    assert answers(model, PROMPTS, temperature=temperature) == whole
    others = [*PROMPTS[:4], *(prompt("what else?") for _ in PROMPTS[4:])]
    assert answers(model, others, temperature=temperature)[:4] == whole[:4]


def test_sampled_replies_follow_the_seed(model):
    one, two = (answers(model, PROMPTS, temperature=1.0, seed=seed) for seed in (1, 2))
    assert one != two
    assert [reply is None for reply in one] == [reply is None for reply in two]
