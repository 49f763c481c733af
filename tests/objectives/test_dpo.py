"""Preference losses: what is known exactly, and TRL's own trainers on the same log-probs."""

import itertools
from collections import defaultdict
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxconv.objectives.dpo import KINDS, REFERENCE_FREE, dpo_loss, finish_metrics

OF_DIFFERENCES = ("sigmoid", "sigmoid_norm", "robust", "hinge", "ipo", "exo_pair", "discopop")
SORTED = ("aot", "aot_unpaired")
SIDES = ("chosen", "rejected")
SETTINGS = {kind: {"beta": 0.3, "kind": kind} for kind in KINDS}
SETTINGS["exo_pair"]["label_smoothing"] = 1e-3
SETTINGS["simpo"]["gamma"] = 0.4


def pairs(seed, B=7, dtype=np.float64):
    """Summed log-probs and token counts of B pairs, as keyword arguments of the loss."""
    rng = np.random.default_rng(seed)
    tokens_2B = rng.integers(1, 9, size=(2, B))
    policy_2B = -(rng.gamma(2.0, 0.7, size=(2, B)) * tokens_2B)
    ref_2B = policy_2B + rng.normal(size=(2, B))
    return {
        "policy_chosen": policy_2B[0].astype(dtype),
        "policy_rejected": policy_2B[1].astype(dtype),
        "ref_chosen": ref_2B[0].astype(dtype),
        "ref_rejected": ref_2B[1].astype(dtype),
        "chosen_tokens": tokens_2B[0],
        "rejected_tokens": tokens_2B[1],
    }


def value_and_gradient(batch, **settings):
    """The mean loss, and its gradient in both of the policy's log-probs."""

    def mean(policy_2B):
        rest = {k: v for k, v in batch.items() if not k.startswith("policy")}
        total, denominator, _ = dpo_loss(*policy_2B, **rest, **settings)
        return total / denominator

    policy_2B = jnp.stack([batch["policy_chosen"], batch["policy_rejected"]])
    return jax.value_and_grad(mean)(policy_2B)


# ---- exact


def test_at_the_reference_it_is_ln_2():
    x, y = np.array([-3.0, -40.0, -0.1], np.float32), np.array([-9.0, -1.0, -0.1], np.float32)
    total, denominator, metrics = dpo_loss(x, y, x, y, beta=0.1)
    assert denominator == 3
    np.testing.assert_allclose(total, 3 * np.log(2), rtol=1e-7)
    finished = finish_metrics(metrics, denominator)
    assert finished["loss"] == pytest.approx(np.log(2))
    assert finished["rewards/accuracy"] == 0.5
    assert finished["rewards/margin"] == 0.0
    for epsilon in (0.1, 0.4):
        smoothed = dpo_loss(x, y, x, y, beta=0.1, label_smoothing=epsilon)[0]
        np.testing.assert_allclose(smoothed, 3 * np.log(2), rtol=1e-6)


def test_by_hand():
    # β h is 2 and −1: z = 3
    pair = [np.array([x], np.float32) for x in (-6.0, -12.0, -10.0, -10.0)]
    total, _, metrics = dpo_loss(*pair, beta=0.5)
    assert float(total) == pytest.approx(np.log1p(np.exp(-3.0)), rel=1e-6)
    np.testing.assert_allclose(dpo_loss(*pair, beta=0.5, kind="hinge")[0], 0.0)
    np.testing.assert_allclose(dpo_loss(*pair, beta=0.5, kind="ipo")[0], (6.0 - 1.0) ** 2)
    finished = finish_metrics(metrics, np.float32(1))
    assert finished == {
        "loss": pytest.approx(float(total)),
        "pairs": 1,
        "rewards/chosen": 2.0,
        "rewards/rejected": -1.0,
        "rewards/margin": 3.0,
        "rewards/accuracy": 1.0,
        "rewards/abs_max": 2.0,
        "logps/chosen": -6.0,
        "logps/rejected": -12.0,
    }


def test_swapping_the_answers_negates_the_margin():
    batch = pairs(0)
    swap = {"chosen": "rejected", "rejected": "chosen"}
    swapped = {}
    for name, x in batch.items():
        side = next(s for s in swap if s in name)
        swapped[name.replace(side, swap[side])] = x
    one, other = (dpo_loss(**b, beta=0.1)[2].sums for b in (batch, swapped))
    np.testing.assert_allclose(one["rewards/margin"], -other["rewards/margin"], rtol=1e-5)
    np.testing.assert_allclose(one["rewards/accuracy"] + other["rewards/accuracy"], 7.0)


def test_robust_loss_is_unbiased_under_flipped_labels():
    batch, epsilon = pairs(1), 0.2
    order = ("policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected")
    right = [batch[name] for name in order]
    flipped = [right[i] for i in (1, 0, 3, 2)]
    robust = {"beta": 0.3, "kind": "robust", "label_smoothing": epsilon}
    expected = (1 - epsilon) * dpo_loss(*right, **robust)[0]
    expected += epsilon * dpo_loss(*flipped, **robust)[0]
    np.testing.assert_allclose(expected, dpo_loss(*right, beta=0.3)[0], rtol=1e-5)


def test_length_normalised_kinds_read_sums_and_counts():
    batch = pairs(2)
    means = {
        name: x / batch["chosen_tokens" if "chosen" in name else "rejected_tokens"]
        for name, x in batch.items()
        if "tokens" not in name
    }
    for kind in ("sigmoid_norm", "ipo", "simpo", "orpo"):
        np.testing.assert_allclose(
            dpo_loss(**batch, beta=0.3, kind=kind)[0],
            dpo_loss(**means, beta=0.3, kind=kind)[0],
            rtol=1e-5,
        )


def test_sft_is_divided_by_chosen_tokens():
    batch = pairs(3)
    total, denominator, metrics = dpo_loss(**batch, beta=1.0, kind="sft")
    assert denominator == batch["chosen_tokens"].sum()
    np.testing.assert_allclose(total, -batch["policy_chosen"].sum(), rtol=1e-6)
    finished = finish_metrics(metrics, denominator)
    np.testing.assert_allclose(finished["loss"], total / denominator, rtol=1e-6)
    np.testing.assert_allclose(finished["logps/chosen"], batch["policy_chosen"].mean(), rtol=1e-6)


def test_alpha_divergence_meets_its_neighbours():
    batch = pairs(4)
    with jax.enable_x64():

        def loss(**settings):
            return dpo_loss(**batch, beta=0.3, **settings)[0]

        np.testing.assert_allclose(
            loss(divergence="alpha", alpha=0.0), loss(divergence="forward_kl"), rtol=1e-12
        )
        assert loss(divergence="alpha", alpha=1.0) == loss()
        np.testing.assert_allclose(loss(divergence="alpha", alpha=1.0 + 2e-6), loss(), rtol=1e-4)


# ---- masks, pieces, precision


@pytest.mark.parametrize("kind", KINDS)
def test_a_pair_that_is_not_there_contributes_nothing(kind):
    batch = pairs(5, B=4)
    value, gradient_2B = value_and_gradient(batch, **SETTINGS[kind])
    mask = np.array([0, 1, 1, 0, 1, 1, 0], bool)
    padded = {}
    for name, x in batch.items():
        padded[name] = np.full(7, np.nan if x.dtype.kind == "f" else 0, x.dtype)
        padded[name][mask] = x
    got, got_2B = value_and_gradient(padded, mask=mask, **SETTINGS[kind])
    np.testing.assert_allclose(got, value, rtol=1e-6)
    np.testing.assert_allclose(got_2B[:, mask], gradient_2B, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(got_2B[:, ~mask], 0.0)


@pytest.mark.parametrize("kind", KINDS)
def test_no_pair_at_all_is_finite(kind):
    batch = {name: np.full(3, np.nan) for name in pairs(0)}
    loss = jax.jit(lambda batch: dpo_loss(**batch, mask=jnp.zeros(3), **SETTINGS[kind]))
    total, denominator, metrics = loss(batch)
    assert total == 0 and denominator == 0
    finished = finish_metrics(metrics, denominator)
    assert all(np.isfinite(x) for name, x in finished.items() if name != "rewards/abs_max")


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 999), cut=st.integers(1, 6), kind=st.sampled_from(KINDS))
def test_pieces_add_up(seed, cut, kind):
    batch = pairs(seed)
    if kind in SORTED:  # these match quantiles within a call; equal pieces have equal quantiles
        batch, cut = {name: np.tile(x, 2) for name, x in batch.items()}, 7
    whole = dpo_loss(**batch, **SETTINGS[kind])
    parts = [
        dpo_loss(**{name: x[part] for name, x in batch.items()}, **SETTINGS[kind])
        for part in (slice(None, cut), slice(cut, None))
    ]
    np.testing.assert_allclose(parts[0][0] + parts[1][0], whole[0], rtol=1e-4)
    assert parts[0][1] + parts[1][1] == whole[1]
    merged = finish_metrics(parts[0][2].merge(parts[1][2]), whole[1])
    for name, x in finish_metrics(whole[2], whole[1]).items():
        np.testing.assert_allclose(merged[name], x, rtol=1e-4, atol=1e-5)


def test_any_shape_of_pairs():
    batch = pairs(6, B=6)
    square = {name: x.reshape(2, 3) for name, x in batch.items()}
    for kind in KINDS:
        np.testing.assert_allclose(
            dpo_loss(**square, **SETTINGS[kind])[0], dpo_loss(**batch, **SETTINGS[kind])[0], 1e-6
        )


def test_gradient_enters_the_policy_through_the_loss_alone():
    batch = {name: x.astype(np.float32) for name, x in pairs(7).items()}
    by_reference = jax.grad(lambda r: dpo_loss(**(batch | {"ref_chosen": r}), beta=0.1)[0])
    np.testing.assert_array_equal(by_reference(batch["ref_chosen"]), 0.0)
    for name in ("loss", "rewards/margin"):
        by_metric = jax.grad(
            lambda p, name=name: dpo_loss(**(batch | {"policy_chosen": p}), beta=0.1)[2].sums[name]
        )
        np.testing.assert_array_equal(by_metric(batch["policy_chosen"]), 0.0)


def test_half_precision_is_computed_in_float32_and_extremes_stay_finite():
    batch = {name: jnp.asarray(x, jnp.bfloat16) for name, x in pairs(8).items()}
    total, denominator, metrics = dpo_loss(**batch, beta=0.1)
    assert {total.dtype, denominator.dtype} == {jnp.dtype("float32")}
    assert {x.dtype for x in jax.tree.leaves(metrics)} == {jnp.dtype("float32")}
    far = {name: np.full(1, -1e4 if "chosen" in name else -1.0) for name in batch}
    total, gradient_2B = value_and_gradient(far, beta=0.1)
    assert np.isfinite(total) and np.all(np.isfinite(gradient_2B))


FAR = [
    *({"kind": kind, "divergence": "forward_kl"} for kind in OF_DIFFERENCES),
    *({"kind": kind, "divergence": "alpha", "alpha": 0.1} for kind in OF_DIFFERENCES),
    *({"kind": kind, "divergence": "alpha", "alpha": 2.5} for kind in OF_DIFFERENCES),
    {"kind": "discopop"},
]


@pytest.mark.parametrize("options", FAR, ids=lambda options: "-".join(map(str, options.values())))
def test_answers_far_from_the_reference_are_finite_and_keep_their_order(options):
    """e^(±h) of these is no number in float32. The second of two answers is the better one."""
    if options["kind"] == "exo_pair":
        options = options | {"label_smoothing": 1e-3}
    for near, far in ((300.0, 400.0), (-400.0, -300.0)):
        batch = {
            "policy_chosen": np.float32([far, near, near]),
            "policy_rejected": np.float32([near, far, near]),
            "ref_chosen": np.zeros(3, np.float32),
            "ref_rejected": np.zeros(3, np.float32),
        }
        one = {name: x[:1] for name, x in batch.items()}
        other = {name: x[1:2] for name, x in batch.items()}
        right, right_2B = value_and_gradient(one, beta=1.5, **options)
        wrong, wrong_2B = value_and_gradient(other, beta=1.5, **options)
        total, gradient_2B = value_and_gradient(batch, beta=1.5, **options)
        for x in (right, wrong, total, right_2B, wrong_2B, gradient_2B):
            assert np.isfinite(x).all()
        if options["kind"] != "ipo":  # which does not want one answer far above the other
            assert right <= wrong
            assert (wrong_2B[0] <= 0).all() and (wrong_2B[1] >= 0).all()
        equal = {name: x[2:] for name, x in batch.items()}
        at_the_reference = {name: np.zeros(1, np.float32) for name in batch}
        np.testing.assert_allclose(
            value_and_gradient(equal, beta=1.5, **options)[0],
            value_and_gradient(at_the_reference, beta=1.5, **options)[0],
            rtol=1e-6,
        )


@pytest.mark.parametrize("kind", sorted(REFERENCE_FREE))
def test_reference_free_kinds_do_not_read_one(kind):
    batch = pairs(9)
    without = batch | {"ref_chosen": None, "ref_rejected": None}
    assert dpo_loss(**batch, **SETTINGS[kind])[0] == dpo_loss(**without, **SETTINGS[kind])[0]


# ---- refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "dpo"}, "kind is 'dpo'; it may be one of sigmoid, "),
        ({"beta": 0.0}, "beta is 0.0"),
        ({"kind": "hinge", "label_smoothing": 0.1}, "label_smoothing is 0.1 but kind 'hinge'"),
        ({"kind": "ipo", "label_smoothing": 0.1}, "label_smoothing is 0.1 but kind 'ipo'"),
        ({"kind": "robust", "label_smoothing": 0.5}, r"label_smoothing is 0.5; .*\[0, 0.5\)"),
        ({"label_smoothing": -0.1}, "label_smoothing is -0.1"),
        ({"kind": "exo_pair"}, "label_smoothing is 0 but kind 'exo_pair'"),
        ({"gamma": 0.5}, "gamma is 0.5 but kind 'sigmoid' has none"),
        ({"kind": "simpo", "gamma": -0.5}, "gamma is -0.5"),
        ({"kind": "discopop", "tau": 0.0}, "tau is 0.0"),
        ({"divergence": "kl"}, "divergence is 'kl'"),
        ({"kind": "nca_pair", "divergence": "js"}, "divergence is 'js' but kind 'nca_pair'"),
        ({"ref_chosen": None}, "kind 'sigmoid' needs ref_chosen and ref_rejected"),
        ({"ref_chosen": np.zeros(3)}, r"ref_chosen has shape \(3,\)"),
        ({"mask": np.ones((7, 1))}, r"mask has shape \(7, 1\)"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(settings, message):
    with pytest.raises(ValueError, match=message) as error:
        dpo_loss(**(pairs(0) | {"beta": 0.1} | settings))
    assert "\n" not in str(error.value)


# ---- TRL


def trl_dpo(batch, *, beta, kind, label_smoothing, divergence="reverse_kl", alpha=0.5):
    """Loss, gradient and logged means from TRL's trainer, given what its models would have said.

    The whole log-prob of an answer is put on its first token: TRL sums over the others as well.
    """
    torch = pytest.importorskip("torch", reason="parity extra is not installed")
    DPOTrainer = pytest.importorskip("trl", reason="parity extra is not installed").DPOTrainer
    names = {"js": "js_divergence", "alpha": "alpha_divergence"}
    tokens = torch.tensor(np.concatenate([batch["chosen_tokens"], batch["rejected_tokens"]]))
    position = torch.arange(int(tokens.max()) + 3)
    completion = ((position >= 2) & (position < 2 + tokens[:, None])).long()
    policy = np.concatenate([batch["policy_chosen"], batch["policy_rejected"]])
    policy = torch.tensor(policy, requires_grad=True)
    logprobs = policy[:, None] * (position[1:] == 2)
    zeros = torch.zeros_like(logprobs)

    def model(**_):
        return SimpleNamespace(
            log_probs=logprobs, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool()
        )

    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(
            device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x
        ),
        args=SimpleNamespace(discopop_tau=0.05),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type=names.get(divergence, divergence),
        f_alpha_divergence_coef=alpha,
        loss_types=[kind],
        loss_weights=[1.0],
        beta=beta,
        label_smoothing=label_smoothing,
        use_weighting=False,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {
        "input_ids": torch.ones_like(completion),
        "attention_mask": torch.ones_like(completion),
        "completion_mask": completion,
        "ref_chosen_logps": torch.tensor(batch["ref_chosen"]),
        "ref_rejected_logps": torch.tensor(batch["ref_rejected"]),
    }
    loss = DPOTrainer._compute_loss(trainer, model, inputs, return_outputs=False)
    loss.backward()
    logged = {name: x[0] for name, x in trainer._metrics["train"].items()}
    return loss.item(), policy.grad.numpy().reshape(2, -1), logged


def trl_cpo(batch, *, beta, kind, label_smoothing, gamma=0.0, alpha=0.0):
    """The same from TRL's CPO trainer, which takes log-probs averaged beforehand for SimPO."""
    torch = pytest.importorskip("torch", reason="parity extra is not installed")
    cpo = pytest.importorskip("trl.experimental.cpo", reason="parity extra is not installed")
    policy = [
        torch.tensor(batch[f"policy_{s}"], requires_grad=True) for s in ("chosen", "rejected")
    ]
    counts = [torch.tensor(batch[f"{s}_tokens"]) for s in ("chosen", "rejected")]
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(device="cpu"),
        alpha=alpha,
        beta=beta,
        loss_type={"cpo": "sigmoid"}.get(kind, kind),
        label_smoothing=label_smoothing,
        simpo_gamma=gamma,
    )
    given = [p / n if kind == "simpo" else p for p, n in zip(policy, counts, strict=True)]
    losses, rewards_chosen, _ = cpo.CPOTrainer.cpo_loss(trainer, *given)
    losses.mean().backward()
    return losses.mean().item(), np.stack([p.grad.numpy() for p in policy]), rewards_chosen.mean()


TRL_KINDS = [kind for kind in KINDS if kind not in ("cpo", "simpo", "orpo")]
TRL_SMOOTHING = {"robust": 0.1, "exo_pair": 1e-3, "aot": 0.2, "aot_unpaired": 0.2}


@pytest.mark.parity
@pytest.mark.parametrize("kind", TRL_KINDS)
def test_value_and_gradient_equal_trls(kind):
    for seed, beta in itertools.product(range(3), (0.1, 1.3)):
        batch = pairs(seed)
        options = {"beta": beta, "kind": kind, "label_smoothing": TRL_SMOOTHING.get(kind, 0.0)}
        expected, expected_2B, logged = trl_dpo(batch, **options)
        with jax.enable_x64():
            value, gradient_2B = value_and_gradient(batch, **options)
            assert value.dtype == np.float64
            metrics = dpo_loss(**batch, **options)[2]
            np.testing.assert_allclose(value, expected, rtol=1e-6)
            np.testing.assert_allclose(gradient_2B, expected_2B, rtol=1e-6, atol=1e-12)
            ours = finish_metrics(metrics, 1.0)
        theirs = {"margin": "margins", "accuracy": "accuracies"}
        for name in () if kind in REFERENCE_FREE else ("chosen", "rejected", "margin", "accuracy"):
            name, peer = f"rewards/{name}", f"rewards/{theirs.get(name, name)}"
            assert float(ours[name]) == pytest.approx(logged[peer], rel=1e-6)
        assert float(ours["logps/chosen"]) == pytest.approx(logged["logps/chosen"], rel=1e-6)


@pytest.mark.parity
@pytest.mark.parametrize("divergence", ["forward_kl", "js"])
@pytest.mark.parametrize("kind", ["sigmoid", "sigmoid_norm", "hinge", "ipo", "robust", "discopop"])
def test_other_divergences_equal_trls(kind, divergence):
    options = {"beta": 0.3, "kind": kind, "label_smoothing": TRL_SMOOTHING.get(kind, 0.0)}
    expected, expected_2B, _ = trl_dpo(pairs(10), **options, divergence=divergence)
    with jax.enable_x64():
        value, gradient_2B = value_and_gradient(pairs(10), **options, divergence=divergence)
        np.testing.assert_allclose(value, expected, rtol=1e-6)
        np.testing.assert_allclose(gradient_2B, expected_2B, rtol=1e-6, atol=1e-12)


@pytest.mark.parity
@pytest.mark.parametrize("alpha", [0.5, 1.7])
def test_the_alpha_divergence_equals_trls_which_has_it_in_float32(alpha):
    options = {"beta": 0.3, "kind": "sigmoid", "label_smoothing": 0.0}
    options |= {"divergence": "alpha", "alpha": alpha}
    batch = pairs(11, dtype=np.float32)
    expected, expected_2B, _ = trl_dpo(batch, **options)
    value, gradient_2B = value_and_gradient(batch, **options)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient_2B, expected_2B, rtol=1e-5, atol=1e-7)


@pytest.mark.parity
@pytest.mark.parametrize("kind", ["cpo", "simpo"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("alpha", [0.0, 0.25])
def test_reference_free_forms_equal_trls(kind, label_smoothing, alpha):
    options = {"beta": 2.0, "kind": kind, "label_smoothing": label_smoothing}
    options |= {"gamma": 0.7} if kind == "simpo" else {}
    expected, expected_2B, rewards = trl_cpo(pairs(12), **options, alpha=alpha)
    with jax.enable_x64():
        # AlphaPO's transformed reward is an α-divergence from the uniform measure
        shaped = options | {"divergence": "alpha", "alpha": 1.0 - alpha}
        value, gradient_2B = value_and_gradient(pairs(12), **shaped)
        np.testing.assert_allclose(value, expected, rtol=1e-6)
        np.testing.assert_allclose(gradient_2B, expected_2B, rtol=1e-6, atol=1e-12)
        if alpha == 0.0:
            ours = finish_metrics(dpo_loss(**pairs(12), **options)[2], 1.0)["rewards/chosen"]
            assert float(ours) == pytest.approx(float(rewards), rel=1e-6)


@pytest.mark.parity
def test_conservative_dpo_equals_trls_smoothed_logistic_on_log_ratios():
    # TRL's DPO trainer smooths no labels of "sigmoid" any more; its CPO trainer has the formula.
    batch = pairs(13)
    ratios = {
        f"policy_{s}": batch[f"policy_{s}"] - batch[f"ref_{s}"] for s in ("chosen", "rejected")
    }
    options = {"beta": 0.4, "label_smoothing": 0.15}
    expected, expected_2B, _ = trl_cpo(batch | ratios, kind="cpo", **options)
    with jax.enable_x64():
        value, gradient_2B = value_and_gradient(batch, kind="sigmoid", **options)
        np.testing.assert_allclose(value, expected, rtol=1e-6)
        np.testing.assert_allclose(gradient_2B, expected_2B, rtol=1e-6, atol=1e-12)


@pytest.mark.parity
def test_odds_ratio_equals_trls_which_has_it_in_float32():
    torch = pytest.importorskip("torch", reason="parity extra is not installed")
    orpo = pytest.importorskip("trl.experimental.orpo", reason="parity extra is not installed")
    batch = pairs(14, dtype=np.float32)
    means = [torch.tensor(batch[f"policy_{s}"] / batch[f"{s}_tokens"]) for s in SIDES]
    trainer = SimpleNamespace(accelerator=SimpleNamespace(device="cpu"), beta=0.3)
    theirs, *_ = orpo.ORPOTrainer.odds_ratio_loss(trainer, *means)
    ours, count, _ = dpo_loss(**batch, beta=0.3, kind="orpo")
    # theirs is subtracted from the likelihood loss
    np.testing.assert_allclose(ours / count, -theirs.mean().item(), rtol=1e-5)
