"""What a model is measured by: margins, wins, judged replies."""

import numpy as np
import pytest

from jaxconv.data import token_store
from jaxconv.data.conversation import Message
from jaxconv.data.examples import TokenExample
from jaxconv.errors import Refused
from jaxconv.evals import exam as exams
from jaxconv.evals.exam import Exam, Scores, wins

PROMPTS = [(Message("user", f"question {i}"),) for i in range(3)]


def store(folder, records, streams=1):
    example = TokenExample(np.arange(4, dtype=np.int32), np.arange(4) > 1)
    made = ((record, [example] * streams) for record in records)
    token_store.build(folder, made, {}, streams=streams)
    return token_store.load(folder)


def make_exam(stores, **changed):
    settings = {
        "stores": stores,
        "units": [f"talk {i}" for i in range(10)],
        "prompts": PROMPTS,
        "judges": {},
        "template": "the template",
        "scorer": lambda trained, resting, s, watch: (np.zeros((len(s), s.streams)),) * 2,
        "length": 64,
        "max_tokens": 7,
        "temperature": 0.5,
        "seed": 3,
    }
    return Exam(**settings | changed)


def test_a_margin_is_how_much_likelier_the_first_stream_is():
    scores = Scores(np.array([[-3.0, -5.0], [-4.0, -4.0], [-9.0, -1.5]]), np.ones((3, 2), int))
    assert scores.margin.tolist() == [2.0, 0.0, -7.5]
    assert wins(scores.margin).tolist() == [1.0, 0.5, 0.0]


def test_marks_are_the_scorer_s_the_replies_and_the_judges(tmp_path, monkeypatch):
    asked = {}

    def replies(model, template, prompts, **how):
        asked.update(model=model, template=template, prompts=prompts, **how)
        return ["yes", None, "no, never"]

    def scorer(trained, resting, s, watch):
        assert trained == "the model" and resting is None
        return -np.ones((len(s), s.streams)) * len(s), np.full((len(s), s.streams), 2)

    monkeypatch.setattr(exams, "replies", replies)
    judges = {
        "short": lambda prompt, reply: len(reply) < 5,
        "third": lambda prompt, reply: prompt[0].content == "question 2",
    }
    stores = {"talks": store(tmp_path / "a", range(4)), "pairs": store(tmp_path / "b", [0, 2], 2)}
    marks = make_exam(stores, scorer=scorer, judges=judges).marks("the model")
    assert marks.scores["talks"].logprob.tolist() == [[-4.0]] * 4
    assert marks.scores["pairs"].logprob.tolist() == [[-2.0, -2.0]] * 2
    assert marks.scores["pairs"].tokens.tolist() == [[2, 2]] * 2
    assert marks.said == ["yes", None, "no, never"]
    # A reply that there was no room for has no property, and no judge sees it.
    assert marks.judged["short"].tolist() == [True, False, False]
    assert marks.judged["third"].tolist() == [False, False, True]
    assert asked == {
        "model": "the model",
        "template": "the template",
        "prompts": PROMPTS,
        "length": 64,
        "budget": 7,
        "temperature": 0.5,
        "tensor": 1,
        "seed": 3,
        "tools": (),
    }


def test_marks_are_taken_once_and_come_back_bit_for_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(exams, "replies", lambda *_, **__: ["yes", None, "nö\n"])

    def scorer(trained, resting, s, watch):
        logprob = np.random.default_rng(0).normal(size=(len(s), s.streams)) / 3
        return logprob, np.full((len(s), s.streams), 2)

    models = iter(["the model"])
    stores = {"talks": store(tmp_path / "a", range(4)), "pairs": store(tmp_path / "b", [0, 2], 2)}
    exam = make_exam(stores, scorer=scorer, judges={"short": lambda prompt, reply: True})
    path = tmp_path / "marks" / "start.json"
    first, again = (exam.kept_marks(path, lambda: next(models)) for _ in range(2))
    for found in (first, again):
        plain = exam.marks("the model")
        assert found.said == plain.said and found.scores.keys() == plain.scores.keys()
        for name, scores in plain.scores.items():
            for field in ("logprob", "tokens"):
                one, other = getattr(found.scores[name], field), getattr(scores, field)
                assert one.dtype == other.dtype and one.tobytes() == other.tobytes()
        assert found.judged["short"].dtype == bool
        assert found.judged["short"].tolist() == plain.judged["short"].tolist()


def test_one_record_is_too_few_however_many_examples_it_became(tmp_path):
    said = "talks: 1 of the held-out conversations is left; an interval"
    with pytest.raises(Refused, match=said):
        make_exam({"talks": store(tmp_path / "a", [5, 5, 5])})
    sat = {"talks": store(tmp_path / "b", [5, 5, 6])}
    make_exam(sat)
    with pytest.raises(Refused, match=said):
        make_exam(sat, units=["one talk"] * 10)


def test_scores_of_real_streams(tmp_path):
    """A model that finds every token equally likely."""
    import jax

    from jaxconv.models.config import DecoderConfig
    from jaxconv.models.decoder import Decoder
    from jaxconv.train.likelihood import Scorer
    from jaxconv.train.mesh import data_mesh

    config = DecoderConfig(
        family="llama",
        vocab_size=32,
        embed_dim=8,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=8,
        mlp_dim=8,
        max_positions=16,
    )
    silent = jax.tree.map(np.zeros_like, Decoder(config, jax.random.key(0)))
    stores = {"pairs": store(tmp_path / "a", range(3), 2)}
    scorer = Scorer(data_mesh(2), rows=2, width=16)
    logprob, tokens = make_exam(stores, scorer=scorer).scorer(silent, None, stores["pairs"])
    assert tokens.tolist() == [[2, 2]] * 3
    np.testing.assert_allclose(logprob, -2 * np.log(32), rtol=1e-6)
