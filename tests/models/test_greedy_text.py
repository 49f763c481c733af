"""Every family's export in the hands of `transformers`: the greedy text of our own engine."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxconv.data.packing import TokenBatch
from jaxconv.data.tokenizer import train_tokenizer
from jaxconv.models.config import FAMILIES
from jaxconv.models.decode import unstack
from jaxconv.models.decoder import Decoder
from jaxconv.models.heads import ActorCritic, ValueHead
from jaxconv.models.hf import load_pretrained, save_pretrained
from jaxconv.models.hf_config import from_hf_dict
from jaxconv.rollout.engine import Engine, EngineShape, Sampling
from jaxconv.train.actor_critic import evaluate_tokens

torch = pytest.importorskip("torch", reason="parity extra is not installed")
pytestmark = pytest.mark.parity

SIZES = {
    "vocab_size": 280,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
OWN = {
    "qwen3": {"tie_word_embeddings": True},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "mistral": {"sliding_window": 8},
    "gemma2": {
        "sliding_window": 8,
        "query_pre_attn_scalar": 21,
        "tie_word_embeddings": False,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    },
    "gemma3_text": {
        "sliding_window": 8,
        "sliding_window_pattern": 2,
        "query_pre_attn_scalar": 21,
        "tie_word_embeddings": False,
        "rope_local_base_freq": 100.0,
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
        "final_logit_softcapping": 3.0,
    },
}
PROMPTS = ("hello there, how are you?", "the price is far", "and")
NEW_TOKENS = 20
SHAPE = EngineShape(
    slots=4, lengths=(64,), burst=16, leave=1.0, prefill_rows=(4,), prefill_tokens=(32,)
)


def said_by_engine(model, prompts, stop_ids, sampling):
    """Turns of the engine after each prompt, in the prompts' order."""
    config = model.decoder.config
    engine = Engine(config, SHAPE, stop_ids=stop_ids, key=jax.random.key(0), sampling=sampling)
    engine.weights = unstack(model)
    slots = {}
    for i, prompt in enumerate(prompts):
        slot = engine.open(i)
        slots[slot] = i
        engine.say(slot, prompt, NEW_TOKENS)
    turns = {}
    while engine.speaking:
        engine.dispatch()
        turns |= {slots[turn.slot]: turn for turn in engine.collect()}
    return [turns[i] for i in range(len(prompts))]


def random_model(family):
    """Random weights, loud enough that a text does not repeat one token over and over."""
    config = from_hf_dict(SIZES | {"model_type": family} | OWN.get(family, {}))
    model = jax.jit(Decoder, static_argnums=0)(config, jax.random.key(3))
    return jax.tree.map(lambda w: w + 0.3 * jax.random.normal(jax.random.key(1), w.shape), model)


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_generates_the_engine_s_greedy_text(family, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    words = train_tokenizer(["hello there", "how are you", "the price is far"] * 3, 280)
    save_pretrained(random_model(family), words, tmp_path, max_shard_bytes=40_000)
    assert (tmp_path / "model.safetensors.index.json").is_file()
    decoder, tokenizer = load_pretrained(tmp_path)
    model = ActorCritic(decoder, ValueHead(decoder.config.embed_dim))
    prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    ends = decoder.config.eos_token_ids
    ours = said_by_engine(model, prompts, ends, Sampling(temperature=0.0))

    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    their_tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert type(theirs).__name__.lower().startswith(family.removesuffix("_text"))
    for prompt, turn in zip(PROMPTS, ours, strict=True):
        read = their_tokenizer(prompt, return_tensors="pt")
        out = theirs.generate(**read, do_sample=False, max_new_tokens=NEW_TOKENS)
        new = out[0, read["input_ids"].shape[1] :].tolist()
        assert turn.tokens == new
        assert tokenizer.decode(turn.tokens) == their_tokenizer.decode(new)
    assert len(set(ours[0].tokens)) > 5


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text"])
def test_the_engine_and_the_trainer_bound_the_logits(family):
    """Sampled log-probs, those of a forward pass and those that training sees are the same."""
    model = ActorCritic(random_model(family), ValueHead(SIZES["hidden_size"]))
    prompt = [5, 6, 7]
    (turn,) = said_by_engine(model, [prompt], (), Sampling())
    row = jnp.asarray([[*prompt, *turn.tokens]])
    logits = model.decoder.logits(model.decoder(row))
    assert jnp.abs(logits).max() <= 3.0 and jnp.abs(logits).max() > 2.5
    expected = jax.nn.log_softmax(logits)[0, jnp.arange(2, row.shape[1] - 1), row[0, 3:]]
    np.testing.assert_allclose(turn.logprobs, expected, atol=1e-4)
    inputs = row[:, :-1]
    whole = jnp.ones_like(inputs)
    batch = TokenBatch(inputs, row[:, 1:], jnp.cumsum(whole, 1) - 1, whole, whole.astype(bool))
    logprob, _, _ = evaluate_tokens(model, batch)
    np.testing.assert_allclose(logprob[0, 2:], expected, atol=1e-4)
