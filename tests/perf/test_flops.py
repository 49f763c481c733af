"""The formulas, worked out by hand for one small and one well-known model."""

import dataclasses
from types import SimpleNamespace

import pytest

from jaxconv.models.config import DecoderConfig
from jaxconv.perf import flops
from jaxconv.perf.chips import CHIPS

SMALL = DecoderConfig(
    family="llama",
    vocab_size=10,
    embed_dim=4,
    num_layers=3,
    num_heads=2,
    num_kv_heads=1,
    head_dim=6,
    mlp_dim=5,
    max_positions=32,
)
# Per layer: q and o [4, 12], k and v [4, 6], gate, up and down [4, 5]; the head [4, 10].
WEIGHTS = 3 * (2 * 4 * 12 + 2 * 4 * 6 + 3 * 4 * 5) + 4 * 10
QWEN3_0_6B = DecoderConfig(
    family="qwen3",
    vocab_size=151936,
    embed_dim=1024,
    num_layers=28,
    num_heads=16,
    num_kv_heads=8,
    head_dim=128,
    mlp_dim=3072,
    max_positions=40960,
    qk_norm=True,
    tie_embeddings=True,
    dtype="bfloat16",
)


def test_a_row_counts_the_pairs_that_causal_attention_has():
    pairs = sum(range(1, 8))  # of 7 tokens
    assert pairs == 7 * 8 / 2
    forward = 2 * (7 * 2 * WEIGHTS + 3 * 4 * 12 * pairs)
    assert flops.forward_flops(SMALL, 2, 7) == forward
    assert flops.training_flops(SMALL, 2, 7) == 3 * forward
    # Below an adapter the weights have no gradient.
    resting = flops.training_flops(SMALL, 2, 7, trains_weights=False)
    assert resting == 3 * forward - 2 * 7 * 2 * WEIGHTS


def test_a_window_counts_its_keys():
    sliding = dataclasses.replace(
        SMALL, family="mistral", sliding_window=3, sliding_layers=(True,) * 3
    )
    pairs = 1 + 2 + 3 * 5
    assert flops.forward_flops(sliding, 1, 7) == 7 * 2 * WEIGHTS + 3 * 4 * 12 * pairs


def test_what_remat_runs_again():
    tokens, pairs = 2 * 7, 2 * 28
    attention = 3 * 4 * 12 * pairs
    maps = 3 * (2 * 4 * 12 + 2 * 4 * 6 + 2 * 4 * 5)  # all but `down`
    again = {
        remat: flops.recomputed_flops(dataclasses.replace(SMALL, remat=remat), 2, 7)
        for remat in ("none", "dots", "full")
    }
    assert again == {"none": 0, "dots": attention, "full": attention + 2 * maps * tokens}


def test_kernels_of_splash_attention_count_their_products():
    product = 2 * 2 * 12 * 28  # of 2 rows of 7 tokens, 12 wide
    assert flops.splash_flops(SMALL, 2, 7) == {
        "splash_mha_fwd": 2 * product,
        "splash_mha_dq": 3 * product,
        "splash_mha_dkv": 4 * product,
    }
    sliding = dataclasses.replace(
        SMALL, family="mistral", sliding_window=3, sliding_layers=(True,) * 3
    )
    narrow = 2 * 2 * 12 * (1 + 2 + 3 * 5)
    assert flops.splash_flops(sliding, 2, 7)["splash_mha_fwd"] == 2 * narrow


def test_generation_fills_the_cache_and_then_reads_it():
    body = WEIGHTS - 4 * 10  # a prefill computes no logits
    pairs = 4 + 5 + 6
    assert flops.prefill_flops(SMALL, 2, 3, start=3) == 2 * (3 * 2 * body + 3 * 4 * 12 * pairs)
    assert flops.decode_flops(SMALL, 5, 9) == 5 * (2 * WEIGHTS + 3 * 4 * 12 * 9)
    assert flops.kv_cache_bytes(SMALL, 5, 9) == 2 * 3 * 1 * 6 * 4 * 5 * 9


def test_a_well_known_model():
    """6 N + 6 L Q T a token in training, and 2 L K h 2 bytes of cache a token."""
    per_token = flops.training_flops(QWEN3_0_6B, 1, 2048) / 2048
    norms = 28 * (2 * 1024 + 2 * 128) + 1024
    weights = QWEN3_0_6B.num_parameters - norms
    assert per_token == pytest.approx(6 * weights + 6 * 28 * 2048 * 2049)
    assert flops.kv_cache_bytes(QWEN3_0_6B, 1, 1) == 112 << 10


def test_the_ceiling_of_decoding_is_memory_and_then_compute():
    h200 = CHIPS["h200"]
    read = 2 * QWEN3_0_6B.num_parameters + 64 * 1000 * (112 << 10)
    assert flops.decode_bytes(QWEN3_0_6B, 64, 1000) == read
    rate = flops.decode_rate_ceiling(QWEN3_0_6B, 64, 1000, h200)
    assert rate == pytest.approx(64 * 4.8e12 / read)
    assert flops.decode_rate_ceiling(QWEN3_0_6B, 64, 1000, h200, 4) == pytest.approx(4 * rate)
    many = flops.decode_rate_ceiling(QWEN3_0_6B, 4096, 1, h200)
    assert many == pytest.approx(989e12 / QWEN3_0_6B.flops_per_token(1))
    # An embedding of its own is read a row at a time.
    untied = dataclasses.replace(QWEN3_0_6B, tie_embeddings=False)
    assert flops.decode_bytes(untied, 64, 1000) == read


def test_mfu_is_the_share_of_the_peak():
    v5e = CHIPS["v5e"]
    assert flops.mfu(8 * 197e12, seconds=2.0, chip=v5e, devices=8) == 0.5
    assert flops.mfu(494e12, seconds=1.0, chip=CHIPS["h100"], devices=1, dtype="float32") == 1


def test_streams_count_each_by_itself_and_no_padding():
    lengths = [7, 3, 3, 1]
    forward = sum(flops.forward_flops(SMALL, 1, n) for n in lengths)
    assert flops.stream_flops(SMALL, lengths) == pytest.approx(forward, rel=1e-12)
    training = flops.stream_training_flops(SMALL, lengths)
    assert training == pytest.approx(3 * forward, rel=1e-12)
    resting = flops.stream_training_flops(SMALL, lengths, trains_weights=False)
    assert resting == pytest.approx(3 * forward - 14 * 2 * WEIGHTS, rel=1e-12)
    assert flops.stream_flops(SMALL, []) == 0


def test_a_rollout_needs_logits_of_what_it_samples_alone():
    heard = flops.prefill_flops(SMALL, 1, 5)
    sampled = sum(flops.decode_flops(SMALL, 1, context) for context in (6, 7))
    assert flops.rollout_flops(SMALL, [7], 2) == pytest.approx(heard + sampled, rel=1e-12)


def test_a_peak_that_nobody_knows_is_not_made_up(monkeypatch):
    assert flops.rates_of(6e12, 2.0, "float32") == {"flops_per_s": 3e12}  # a CPU
    devices = [SimpleNamespace(device_kind="TPU v5e")] * 4
    monkeypatch.setattr(flops.jax, "devices", lambda: devices)
    monkeypatch.setattr(flops.jax, "device_count", lambda: 4)
    found = flops.rates_of(4 * 197e12, 2.0, "bfloat16")
    assert found == {"flops_per_s": 2 * 197e12, "mfu": pytest.approx(0.5)}
