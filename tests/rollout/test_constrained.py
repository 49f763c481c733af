"""JSON within a schema: the answer that a search by hand finds, closed in time, read only once."""

import json
from typing import Literal

import jax
import llguidance
import numpy as np
import pytest
from pydantic import BaseModel, ConfigDict, Field

from jaxconv.data.tokenizer import train_tokenizer
from jaxconv.errors import Refused
from jaxconv.models.config import DecoderConfig
from jaxconv.models.decode import unstack
from jaxconv.rollout.constrained import Constrained, Question
from jaxconv.rollout.engine import Engine, EngineShape
from jaxconv.rollout.grammar import Grammars
from jaxconv.rollout.shape import Sampling

tokenizer = train_tokenizer(['{"label": "good", "score": 12, "note": "it is fine"}'] * 3, 290)
END = tokenizer.eos_token_id
VOCAB = 301  # more than the tokenizer has
LENGTH = 512
SHAPE = EngineShape(slots=4, lengths=(LENGTH,), prefill_rows=(4,), prefill_tokens=(32,))


class Output(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Label(Output):
    label: Literal["good", "goods", "bad"]
    score: int = Field(ge=0, le=99)


class Inner(Output):
    size: int
    kind: Literal["a", "bb"]


class Wide(Output):
    note: str
    tags: list[str]
    inner: Inner
    items: list[Inner] = Field(min_length=1)
    number: float
    sure: bool
    label: Literal["good", "goods", "bad"]
    more: str | None = None


LABEL, WIDE = Label.model_json_schema(), Wide.model_json_schema()


@pytest.fixture(scope="module")
def model(random_decoder):
    config = DecoderConfig(
        family="llama",
        vocab_size=VOCAB,
        embed_dim=32,
        num_layers=1,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        mlp_dim=48,
        max_positions=LENGTH,
    )
    return random_decoder(config)


@pytest.fixture(scope="module")
def weights(model):
    return unstack(model)


@pytest.fixture
def make_writer(model, weights):
    def make() -> Constrained:
        engine = Engine(model.config, SHAPE, stop_ids=[END], key=jax.random.key(0))
        engine.weights = weights
        return Constrained(engine, Grammars(tokenizer, VOCAB, END))

    return make


def question(stream: int, schema=LABEL, *, budget=60, temperature=0.0, kind="") -> Question:
    prompt = tokenizer.encode(f"read this text before you answer: {stream * 7}")
    return Question(stream, prompt, schema, budget, Sampling(temperature), kind)


def write(writer: Constrained, questions) -> dict:
    for name, asked in questions.items():
        writer.ask(name, asked)
    written = {}
    while writer.busy:
        written |= writer.step()
    return written


@jax.jit
def next_logits(model, tokens_T, length):
    return model.logits(model(tokens_T[None]))[0, length - 1]


def searched(model, asked: Question) -> list[int]:
    """The likeliest allowed token, again and again, each time after a whole forward pass."""
    llt = llguidance.LLTokenizer(tokenizer.backend_tokenizer.to_str(), n_vocab=VOCAB, eos_token=END)
    style = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
    grammar = llguidance.LLMatcher.grammar_from_json_schema(asked.schema, overrides=style)
    matcher = llguidance.LLMatcher(llt, grammar)
    said: list[int] = []
    while not matcher.is_stopped():
        ids = asked.prompt + said
        row = np.zeros(LENGTH, np.int32)
        row[: len(ids)] = ids
        logits = np.asarray(next_logits(model, row, len(ids)))
        bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        allowed = np.unpackbits(bits, bitorder="little")[:VOCAB].astype(bool)
        said.append(int(np.argmax(np.where(allowed, logits, -np.inf))))
        assert matcher.consume_token(said[-1])
    return said


@pytest.mark.parametrize("schema", [LABEL, Inner.model_json_schema()], ids=["label", "inner"])
def test_greedy_answers_are_those_of_a_search_by_hand(make_writer, model, schema):
    """Also where an answer's first tokens are certain, and read with the prompt."""
    asked = {i: question(i, schema, budget=200) for i in range(6)}
    written = write(make_writer(), asked)
    for i in asked:
        assert written[i].whole and written[i].tokens == searched(model, asked[i])
        assert written[i].text == tokenizer.decode(written[i].tokens)
        assert written[i].logprobs == [0.0] * len(written[i].tokens)
    assert len({answer.text for answer in written.values()}) > 1


@pytest.mark.parametrize("temperature", [0.0, 1.0, 3.0])
def test_every_answer_parses_and_fits(make_writer, temperature):
    asked = {i: question(i, WIDE, budget=250, temperature=temperature) for i in range(12)}
    written = write(make_writer(), asked)
    assert all(answer.whole for answer in written.values())
    for answer in written.values():
        found = Wide.model_validate_json(answer.text, strict=True)
        assert abs(found.number) <= 1e18
        assert len(answer.tokens) == len(answer.logprobs) <= 250
        assert answer.text.startswith('{"note": "') and ', "tags": [' in answer.text
    if temperature:
        assert all(max(answer.logprobs) <= 0 > min(answer.logprobs) for answer in written.values())


def test_an_answer_depends_on_its_question_alone(make_writer):
    asked = {i: question(i, WIDE, budget=250, temperature=1.0) for i in range(10)}
    together = write(make_writer(), asked)
    for i in (0, 4, 9):
        (alone,) = write(make_writer(), {i: asked[i]}).values()
        assert (alone.tokens, alone.whole) == (together[i].tokens, True)
        np.testing.assert_allclose(alone.logprobs, together[i].logprobs, atol=1e-4)
    again = question(0, WIDE, budget=250, temperature=1.0)
    other = Question(77, again.prompt, WIDE, 250, again.sampling)
    assert write(make_writer(), {0: other})[0].tokens != together[0].tokens


def test_texts_and_lists_are_closed_in_time_and_labels_stay_the_models_choice(make_writer):
    """The model rambles; all budgets that are enough for a short answer give a whole one."""
    labels = set()
    for budget in (125, 140, 170):  # the shortest has 108 tokens, labels may take 17 more
        asked = {i: question(i, WIDE, budget=budget, temperature=2.0) for i in range(8)}
        for answer in write(make_writer(), asked).values():
            assert answer.whole and len(answer.tokens) <= budget
            found = Wide.model_validate_json(answer.text)
            labels |= {found.label, found.sure, *(item.kind for item in found.items)}
    assert labels == {"good", "goods", "bad", True, False, "a", "bb"}


def test_with_room_a_text_is_as_long_as_the_model_makes_it(make_writer, model):
    class Note(Output):
        note: str = Field(max_length=30)

    asked = question(3, Note.model_json_schema(), budget=120)
    (answer,) = write(make_writer(), {0: asked}).values()
    assert answer.tokens == searched(model, asked) and len(answer.tokens) > 20


def test_objects_have_no_fields_that_nobody_asked_for(make_writer):
    """A JSON schema allows them unless it says otherwise; a dictionary is made of them."""

    class Open(BaseModel):
        properties: Literal["a", "bb"]
        counts: dict[str, int] = Field(max_length=2)

    schema = Open.model_json_schema()
    asked = {i: question(i, schema, budget=120, temperature=3.0) for i in range(8)}
    for answer in write(make_writer(), asked).values():
        assert answer.whole and json.loads(answer.text).keys() == {"properties", "counts"}
        Open.model_validate_json(answer.text, strict=True)


def test_an_answer_that_cannot_end_in_its_budget_is_not_whole(make_writer):
    written = write(make_writer(), {b: question(1, WIDE, budget=b) for b in (1, 3, 20)})
    for budget, answer in written.items():
        assert not answer.whole and len(answer.tokens) <= budget
        with pytest.raises(json.JSONDecodeError):
            json.loads(answer.text)


def test_an_answer_without_any_choice_needs_no_model(make_writer):
    class Certain(Output):
        kind: Literal["only"]

    writer = make_writer()
    schema = Certain.model_json_schema()
    written = write(writer, {0: question(0, schema), 1: question(1, LABEL)})
    assert written[0].text == '{"kind": "only"}' and written[0].whole
    assert json.loads(written[1].text)
    assert not write(writer, {0: question(0, schema, budget=2)})[0].whole


def test_prompts_of_one_kind_are_read_once(make_writer):
    plain, sharing = make_writer(), make_writer()
    asked = {i: question(i, temperature=1.0) for i in range(9)}
    expected = write(plain, asked)
    found = write(sharing, {i: question(i, temperature=1.0, kind="k") for i in asked})
    for i in asked:
        assert found[i].tokens == expected[i].tokens
        np.testing.assert_allclose(found[i].logprobs, expected[i].logprobs, atol=1e-5)
    common = len(tokenizer.encode("read this text before you answer: ")) // 16 * 16
    saved = plain._engine.prefilled - sharing._engine.prefilled
    assert common >= 16 and saved == 8 * common


def test_what_nobody_wants_any_more_makes_room(make_writer):
    writer = make_writer()
    for i in range(6):
        writer.ask(i, question(i, WIDE, budget=250))
    assert writer.room == -2
    writer.step()
    writer.drop(0)  # under way
    writer.drop(5)  # waiting
    written = {}
    while writer.busy:
        written |= writer.step()
    assert set(written) == {1, 2, 3, 4} and writer.room == 4


def test_where_the_grammar_engine_gives_up_the_answer_ends_and_says_so(make_writer):
    writer = make_writer()
    for i in range(2):
        writer.ask(i, question(i, WIDE, budget=250))
    broken = writer._waiting[0].writing.matcher
    written = writer.step() | writer.step()
    assert not written and not broken.consume_token(END)  # which no object begins with
    while writer.busy:
        written |= writer.step()
    assert written[1].whole and not written[1].gave_up
    assert not written[0].whole and "doesn't satisfy the grammar" in written[0].gave_up
    assert len(written[0].tokens) == len(written[0].logprobs) < 20


def test_a_schema_without_a_grammar_is_refused(make_writer):
    schema = {"type": "object", "title": "Odd", "properties": {"a": {"type": "nothing"}}}
    with pytest.raises(Refused, match="no grammar can be made of the schema of Odd"):
        make_writer().ask(0, question(0, schema))
