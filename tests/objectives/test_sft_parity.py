"""Losses and gradients of all weights against torch on `transformers`' model of the same weights.

Ours run in float32 on packed rows; theirs in float64 on padded rows, a conversation a row.
"""

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxconv.data.batches import spread
from jaxconv.data.packing import first_fit, microbatches, pack_tokens
from jaxconv.models.decoder import Decoder
from jaxconv.models.hf import save_pretrained
from jaxconv.models.hf_config import from_hf_dict
from jaxconv.objectives.dpo import dpo_loss
from jaxconv.objectives.segments import pair_logprobs
from jaxconv.objectives.sft import sft_loss
from jaxconv.train.likelihood import token_logprobs
from jaxconv.train.update import accumulate

WIDTH = 40
MODELS = {
    "llama": {"model_type": "llama", "num_key_value_heads": 2},
    "qwen2 tied": {"model_type": "qwen2", "num_key_value_heads": 1, "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "num_key_value_heads": 4, "head_dim": 12},
}


def decoder(name, seed=0):
    sizes = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    model = Decoder(from_hf_dict(sizes | MODELS[name]), jax.random.key(seed))
    rng = np.random.default_rng(seed)  # biases and norms away from 0 and 1
    return jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32), model)


def conversations(seed, lengths):
    """(tokens, whether each is to be learned) of conversations whose replies alternate."""
    rng = np.random.default_rng(seed)
    tokens = [rng.integers(3, 61, n) for n in lengths]
    masks = [(np.arange(n) + rng.integers(0, 5)) % 9 > 4 for n in lengths]
    return tokens, [m & (np.arange(len(m)) > 0) for m in masks]


def packed(tokens, masks, width=WIDTH):
    return pack_tokens(first_fit([len(t) for t in tokens], width), tokens, masks)


def sft(model, batch):
    logprob, _ = token_logprobs(model, batch)
    return sft_loss(logprob, batch.mask)


@jax.jit
def mean_and_gradient(model, batch):
    def mean(model):
        total, denominator, _ = sft(model, batch)
        return total / denominator

    return jax.value_and_grad(mean)(model)


def distance(gradient, other):
    """‖gradient − other‖ / ‖other‖ over all weights together."""
    trees = ([np.asarray(x, np.float64) for x in jax.tree.leaves(t)] for t in (gradient, other))
    squares = [(np.sum((a - b) ** 2), np.sum(b**2)) for a, b in zip(*trees, strict=True)]
    return np.sqrt(sum(a for a, _ in squares) / sum(b for _, b in squares))


def by_name(model, folder):
    """Weights, or a gradient of the same form, under the names and shapes of a checkpoint."""
    save_pretrained(model, None, folder)
    return load_file(folder / "model.safetensors")


def peer(model, folder):
    """The same weights in `transformers`, float64."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch", reason="parity extra is not installed")
    save_pretrained(model, None, folder)
    # read in float64: a later .double() would leave rotary constants that were rounded before
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()


def padded(torch, sequences, fill):
    rows = [torch.as_tensor(np.asarray(s)).long() for s in sequences]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=fill)


def assert_gradients_agree(ours, theirs):
    """To 1e-5 of the norm of the whole gradient, and each tensor to 1e-4 of its own."""
    theirs = {name: p.grad.numpy() for name, p in theirs.named_parameters() if name in ours}
    assert ours.keys() == theirs.keys()
    assert distance(ours, theirs) < 1e-5
    for name, gradient in ours.items():
        assert distance(gradient, theirs[name]) < 1e-4, name


@pytest.mark.parity
@pytest.mark.parametrize("name", MODELS)
def test_sft_equals_transformers_with_one_denominator_for_unequal_batches(name, tmp_path):
    torch = pytest.importorskip("torch", reason="parity extra is not installed")
    model = decoder(name)
    tokens, masks = conversations(0, [9, 31, 17, 5, 24, 12, 38])
    theirs = peer(model, tmp_path / "model")
    count = sum(int(m.sum()) for m in masks)
    expected = 0.0
    for part in (slice(0, 2), slice(2, 7)):
        ids = padded(torch, tokens[part], fill=0)
        labels = [np.where(m, t, -100) for t, m in zip(tokens[part], masks[part], strict=True)]
        loss = theirs(
            input_ids=ids,
            attention_mask=padded(torch, [np.ones(len(t)) for t in tokens[part]], fill=0),
            labels=padded(torch, labels, fill=-100),
            num_items_in_batch=count,
        ).loss
        loss.backward()
        expected += loss.item()

    value, gradient = mean_and_gradient(model, packed(tokens, masks))
    assert float(value) == pytest.approx(expected, rel=1e-5)
    assert_gradients_agree(by_name(gradient, tmp_path / "gradient"), theirs)


def test_packed_equals_one_row_each():
    model = decoder("qwen3")
    tokens, masks = conversations(1, [8, 21, 13, 5, 30, 11])
    batch = packed(tokens, masks)
    assert len(batch.tokens) < len(tokens)
    rows = [packed([t], [m]) for t, m in zip(tokens, masks, strict=True)]
    alone = jax.tree.map(lambda *x: np.concatenate(x), *rows)
    value, gradient = mean_and_gradient(model, batch)
    expected, expected_gradient = mean_and_gradient(model, alone)
    assert float(value) == pytest.approx(float(expected), rel=1e-5)
    assert distance(gradient, expected_gradient) < 1e-5


def test_accumulated_equals_the_whole_batch():
    model = decoder("llama")
    tokens, masks = conversations(2, [33, 36, 7, 30, 3, 28])
    batch = packed(tokens, masks)
    rows = microbatches(batch, 1)
    count = len(batch.tokens)
    learned = batch.mask.sum(axis=1)
    assert len(set(learned)) > 1

    @jax.jit
    def at_once(model):
        row = [jax.tree.map(lambda x, i=i: x[i], rows) for i in range(count)]
        return jax.grad(lambda model: sum(sft(model, r)[0] for r in row) / learned.sum())(model)

    run = jax.jit(lambda model, rows: accumulate(sft, model, rows, count))
    gradient, denominator, metrics = run(model, rows)
    assert denominator == learned.sum()
    gradient = jax.tree.map(lambda g: g / denominator, gradient)
    assert distance(gradient, at_once(model)) < 1e-6
    value, expected = mean_and_gradient(model, batch)
    assert float(metrics.sums["nll"] / denominator) == pytest.approx(float(value), rel=1e-6)
    # matrix products of another shape are rounded otherwise, by about 1e-6 in float32
    assert distance(gradient, expected) < 1e-5


@pytest.mark.parity
@pytest.mark.parametrize("kind", ["sigmoid", "ipo", "simpo"])
def test_dpo_of_packed_pairs_equals_torch_on_padded_rows(kind, tmp_path):
    torch = pytest.importorskip("torch", reason="parity extra is not installed")
    policy, reference = decoder("llama"), decoder("llama", seed=1)
    tokens, masks = conversations(3, [12, 17, 20, 9, 15, 14, 6, 19])
    beta = 0.5
    lengths = np.reshape([len(t) for t in tokens], (-1, 2))  # chosen and rejected take turns
    packing = first_fit(lengths.sum(axis=1), 2 * WIDTH)
    assert packing.rows < len(lengths)
    batch = pack_tokens(spread(packing, lengths), tokens, masks)

    def loss(policy, reference):
        own, ref = (
            pair_logprobs(token_logprobs(model, batch)[0], batch.mask, batch.segment_ids)
            for model in (policy, reference)
        )
        total, denominator, _ = dpo_loss(
            own.chosen,
            own.rejected,
            ref.chosen,
            ref.rejected,
            beta=beta,
            kind=kind,
            mask=own.present,
            chosen_tokens=own.chosen_tokens,
            rejected_tokens=own.rejected_tokens,
        )
        return total / denominator, denominator

    (value, count), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(policy, reference)
    assert count == len(lengths)

    theirs = peer(policy, tmp_path / "policy")
    ids = padded(torch, tokens, fill=0)
    counted = padded(torch, masks, fill=0)[:, 1:]

    there = padded(torch, [np.ones(len(t)) for t in tokens], fill=0)

    def logprobs(model):
        logits = model(ids, attention_mask=there).logits
        each = torch.log_softmax(logits[:, :-1], -1).gather(-1, ids[:, 1:, None])[..., 0]
        return (each * counted).sum(1)

    ratio = logprobs(theirs)
    if kind != "simpo":
        with torch.no_grad():
            ref = logprobs(peer(reference, tmp_path / "reference"))
        ratio = ratio - ref
    if kind != "sigmoid":
        ratio = ratio / counted.sum(1)
    ahead = ratio[0::2] - ratio[1::2]
    if kind == "ipo":
        expected = ((ahead - 1 / (2 * beta)) ** 2).mean()
    else:
        expected = -torch.nn.functional.logsigmoid(beta * ahead).mean()
    expected.backward()
    assert float(value) == pytest.approx(expected.item(), rel=1e-5)
    assert_gradients_agree(by_name(gradient, tmp_path / "gradient"), theirs)
