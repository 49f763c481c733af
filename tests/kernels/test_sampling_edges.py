"""Edge cases of logits and parameters in the Pallas kernels, interpreted: a row for each case."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxconv_kernels.sampling import gpu, spec, tpu, xla

pytestmark = pytest.mark.slow

VOCAB = 4_931  # of three cells, and no multiple of 128
FEW = [4, 2047, 2048, VOCAB - 1]
RNG = np.random.default_rng(0)
PLAIN = RNG.normal(size=VOCAB) * 3
TIED = np.round(PLAIN)
BEST = int(PLAIN.argmax())
INFINITE = np.where(np.arange(VOCAB) == 3000, np.inf, PLAIN)
NAN = np.where(RNG.random(VOCAB) < 0.5, np.nan, PLAIN)
MINUS = np.where(RNG.random(VOCAB) < 0.5, -np.inf, PLAIN)
ONE_HOT = np.where(np.arange(VOCAB) == 4000, 0.0, -np.inf)
SOME = np.where(np.isin(np.arange(VOCAB), FEW), 1.0, -np.inf)
NONE = np.full(VOCAB, -np.inf)
EQUAL = np.full(VOCAB, 0.5)
OFF = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}

# Logits, parameters, tokens that may come (None: any that is finite), flags.
CASES = [
    (NAN, {}, None, 0),
    (NAN, {"top_k": 30, "top_p": 0.9}, None, spec.FILTERED),
    (INFINITE, {}, {3000}, spec.INFINITE),
    (INFINITE, {"top_k": 5}, {3000}, spec.INFINITE),
    (MINUS, {"min_p": 0.1}, None, spec.FILTERED),
    (NONE, {}, {0}, spec.EMPTY),
    (NONE, {"top_p": 0.9}, {0}, spec.EMPTY),
    (np.full(VOCAB, np.nan), {"top_k": 2}, {0}, spec.EMPTY),
    (ONE_HOT, {}, {4000}, 0),
    (ONE_HOT, {"top_k": 5, "top_p": 0.9, "min_p": 0.1}, {4000}, spec.FILTERED),
    (EQUAL, {}, None, 0),
    (EQUAL, {"top_k": 3, "top_p": 0.5}, None, spec.FILTERED | spec.FALLBACK),
    (PLAIN, {"top_k": 1}, {BEST}, spec.FILTERED),
    (PLAIN, {"top_k": VOCAB}, None, 0),
    (SOME, {"top_k": 10}, set(FEW), spec.FILTERED),
    (SOME, {"top_k": 10, "top_p": 0.99}, set(FEW), spec.FILTERED),
    (PLAIN, {"top_p": 0.0}, {BEST}, spec.FILTERED),
    (PLAIN, {"top_p": 1.0}, None, 0),
    (PLAIN, {"min_p": 1.0}, {BEST}, spec.FILTERED),
    (PLAIN, {"temperature": 0.0}, {BEST}, spec.GREEDY),
    (TIED, {"temperature": 0.0, "top_k": 9}, {int(TIED.argmax())}, spec.GREEDY),
    (PLAIN, {"temperature": 1e-3}, {BEST}, 0),
    (PLAIN, {"temperature": 100.0}, None, 0),
    (PLAIN, {"temperature": 100.0, "top_k": 7}, set(np.argsort(PLAIN)[-7:]), spec.FILTERED),
]


@functools.cache
def compiled(name, dtype):
    """A form of the sampler, interpreted where it is a kernel."""
    if name == "gpu":
        try:
            from jax.experimental.pallas.mosaic_gpu import InterpretGPUParams
        except ImportError:
            pytest.skip("this version of jax cannot interpret Mosaic GPU kernels on a CPU")
        form = functools.partial(gpu.sample, interpret=InterpretGPUParams())
    else:
        form = {"tpu": functools.partial(tpu.sample, interpret=True), "xla": xla.sample}[name]

    def call(logits, keys_B2, parameters):
        return form(logits, keys_B2, spec.row_parameters(*logits.shape, **parameters), None)

    options = {"xla_backend_optimization_level": 0} if name == "tpu" else {}
    return jax.jit(call, compiler_options=options)


def draw(name, cases, dtype="float32", first_seed=0):
    logits = jnp.asarray(np.stack([case[0] for case in cases]), dtype)
    parameters = {
        key: np.array([(OFF | case[1])[key] for case in cases], np.asarray(value).dtype)
        for key, value in OFF.items()
    }
    parameters = {
        key: x.astype(np.int32 if key == "top_k" else np.float32) for key, x in parameters.items()
    }
    seeds = jnp.arange(first_seed, first_seed + len(cases))
    keys_B2 = jax.vmap(lambda seed: jax.random.key_data(jax.random.key(seed)))(seeds)
    return compiled(name, dtype)(logits, keys_B2, parameters)


FORMS = ["tpu", "gpu"]


@pytest.mark.parametrize("name", FORMS)
def test_edge_cases_end_as_they_should_and_as_in_the_xla_form(name):
    got, expected = draw(name, CASES), draw("xla", CASES)
    for i, (x, _, tokens, flags) in enumerate(CASES):
        token = int(got.token[i])
        assert token in tokens if tokens is not None else np.isfinite(x[token]), i
        assert got.flags[i] == flags, i
    for field in ("token", "threshold", "flags"):
        np.testing.assert_array_equal(getattr(got, field), getattr(expected, field), field)
    for field in ("logprob_raw", "logprob_processed", "kept_mass"):
        arrays = getattr(got, field), getattr(expected, field)
        np.testing.assert_allclose(*arrays, rtol=1e-6, atol=1e-6, err_msg=field)


@pytest.mark.parametrize("name", FORMS)
def test_log_probs_are_within_2e6_of_float64(name):
    finite = [case for case in CASES if np.isfinite(case[0].max()) and case[3] != spec.GREEDY]
    cases = (finite * 2)[: len(CASES)]
    got = draw(name, cases, first_seed=100)
    for i, (x, parameters, *_) in enumerate(cases):
        x = np.float64(np.float32(x))
        token = int(got.token[i])
        mass = np.exp(x - x.max())
        expected = x[token] - x.max() - np.log(np.nansum(mass))
        assert abs(got.logprob_raw[i] - expected) <= 2e-6, i
        # As the specification has it: the inverse of a temperature is a float32.
        scale = np.float64(np.float32(1) / np.float32(parameters.get("temperature", 1)))
        kept = x >= got.threshold[i]
        z = (x - x.max()) * scale
        expected = z[token] - np.log(np.exp(z[kept]).sum())
        assert abs(got.logprob_processed[i] - expected) <= 2e-6, i


def test_tied_bfloat16_logits_all_stay_and_a_row_is_the_same_in_another_batch():
    shifted = PLAIN + 40  # so that bfloat16 rounds to quarters
    ks = (3, 20, 60)
    cases = [(shifted, {"top_k": k}, None, spec.FILTERED) for k in ks] * 6
    got = draw("tpu", cases, "bfloat16")
    x = np.asarray(jnp.asarray(shifted, "bfloat16").astype(jnp.float32))
    for i, k in enumerate(ks):
        assert got.threshold[i] == np.sort(x)[-k]
        assert (x >= got.threshold[i]).sum() > k
        mass = np.exp(np.float64(x) - x.max())
        kept = mass[x >= got.threshold[i]].sum() / mass.sum()
        assert got.kept_mass[i] == pytest.approx(kept, rel=1e-5)
    alone = draw("tpu", cases[:2], "bfloat16")
    for one, all_of_them in zip(alone, got, strict=True):
        np.testing.assert_array_equal(one, all_of_them[:2])
