"""Conversations and pairs as token ids: what is learned, what is cut, what is refused."""

import dataclasses
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxconv.data.conversation import Conversation, Message, PreferencePair, ToolCall
from jaxconv.data.examples import POLICIES, Outcome, encode, encode_pair
from jaxconv.data.readers import FORMATS
from jaxconv.data.template import take_apart
from jaxconv.data.tokenizer import train_tokenizer
from jaxconv.errors import Refused

tokenizer = train_tokenizer(["how are you today? fine, and you?"] * 5, 300)
template = take_apart(tokenizer)

SYSTEM, USER, REPLY = (Message(role, f"the {role}") for role in ("system", "user", "assistant"))


def rendering(messages):
    dicts = [{"role": m.role, "content": m.content} for m in messages]
    return tokenizer.apply_chat_template(dicts, tokenize=True, return_dict=False)


def learned(example):
    return example.tokens[example.mask].tolist()


def said(messages):
    """What is to be learned of messages."""
    return [
        i
        for m in messages
        if m.role == "assistant"
        for i in (*template.encode(m.content), template.end)
    ]


words = st.text("how are you?\n<|end|>", min_size=1, max_size=20)
exchange = st.builds(
    lambda user, reply: [Message("user", user), Message("assistant", reply)], words, words
)
talks = st.builds(
    lambda system, exchanges: (*system, *itertools.chain(*exchanges)),
    st.lists(st.builds(Message, st.just("system"), words), max_size=1),
    st.lists(exchange, min_size=1, max_size=6),
)
plain_talks = talks.filter(lambda talk: all("<" not in m.content for m in talk))


@given(plain_talks)
@settings(deadline=None)
def test_an_example_is_the_templates_rendering(messages):
    (example,), outcome = encode(
        Conversation("a", messages), template, max_length=10**6, policy="refuse"
    )
    assert outcome == "whole" == Outcome.WHOLE
    assert example.tokens.tolist() == rendering(messages)
    assert (example.tokens.dtype, example.mask.dtype) == ("int32", "bool")
    assert learned(example) == said(messages)


@given(talks, st.integers(5, 200))
@settings(deadline=None)
def test_split_learns_every_turn_that_fits_once(messages, max_length):
    examples, outcome = encode(
        Conversation("a", messages), template, max_length=max_length, policy="split"
    )
    systems, rest = ((), messages) if messages[0].role != "system" else (messages[:1], messages[1:])
    # By its definition: an exchange is learned if it fits alone with the system message.
    fits = [
        len(template.render_view((*systems, *rest[i : i + 2]))[0]) <= max_length
        for i in range(0, len(rest), 2)
    ]
    kept = [m for i, m in enumerate(rest) if fits[i // 2]]
    assert list(itertools.chain(*map(learned, examples))) == said(kept)
    assert all(len(e.tokens) <= max_length for e in examples)
    if all(fits):
        assert outcome == ("whole" if len(examples) == 1 else "split")
    else:
        assert outcome == ("split_in_part" if any(fits) else "left_out")
    begin = template.render(systems, begins=True)
    assert all(e.tokens[: len(begin)].tolist() == begin for e in examples)


@given(talks, st.integers(5, 200))
@settings(deadline=None)
def test_truncation_keeps_the_longest_end_that_fits(messages, max_length):
    examples, outcome = encode(
        Conversation("a", messages), template, max_length=max_length, policy="truncate_left"
    )
    systems, rest = ((), messages) if messages[0].role != "system" else (messages[:1], messages[1:])
    ends = [template.render_view((*systems, *rest[i:])) for i in range(0, len(rest), 2)]
    fitting = [end for end in ends if len(end[0]) <= max_length]
    if not fitting:
        assert (examples, outcome) == ([], "left_out")
        return
    (example,) = examples
    assert (example.tokens.tolist(), example.mask.tolist()) == fitting[0]
    assert outcome == ("whole" if fitting[0] is ends[0] else "truncated")


def test_too_long_may_be_left_out_or_refused():
    conversation = Conversation("chat 7", (SYSTEM, USER, REPLY))
    n = len(template.render_view(conversation.messages)[0])
    assert encode(conversation, template, max_length=n - 1, policy="leave_out") == ([], "left_out")
    with pytest.raises(Refused, match=f"'chat 7' has {n} tokens; at most {n - 1}"):
        encode(conversation, template, max_length=n - 1, policy="refuse")
    with pytest.raises(Refused, match="'drop'; it must be one of truncate_left, split"):
        encode(conversation, template, max_length=n, policy="drop")


def test_an_exchange_holds_all_that_is_said_before_the_user_speaks_again():
    messages = (USER, REPLY, REPLY, USER, USER, REPLY)
    whole = template.render_view(messages)[0]
    examples, _ = encode(
        Conversation("a", messages), template, max_length=len(whole) - 1, policy="split"
    )
    assert [e.tokens.tolist() for e in examples] == [
        template.render_view(part)[0] for part in (messages[:3], messages[3:])
    ]


def test_nothing_is_learned_of_what_nobody_answered():
    examples, _ = encode(
        Conversation("a", (USER, REPLY, USER)), template, max_length=99, policy="refuse"
    )
    assert examples[0].tokens.tolist() == template.render_view((USER, REPLY))[0]
    asked = Conversation("a", (SYSTEM, USER))
    assert encode(asked, template, max_length=99, policy="refuse") == ([], "nothing_said")


def test_the_first_token_is_never_learned():
    continuing = dataclasses.replace(template, reply=())
    (example,), _ = encode(Conversation("a", (REPLY,)), continuing, max_length=99, policy="refuse")
    assert example.tokens.tolist() == said([REPLY])
    assert not example.mask[0] and example.mask[1:].all()


def test_what_the_template_does_not_render_is_refused_with_the_id():
    alternating = dataclasses.replace(template, opens=False, doubles=False, name="some/model")
    no_system = dataclasses.replace(template, system="it raises")
    called = Message("assistant", "", None, (ToolCall("add", "{}"),))
    for chat, messages, line in (
        (alternating, (REPLY, USER, REPLY), "'some/model' wants a user message before"),
        (alternating, (USER, REPLY, REPLY), "wants a user message between two"),
        (no_system, (SYSTEM, USER, REPLY), "has no system message: it raises"),
        (template, (USER, Message("tool", "4"), REPLY), "does not show tool calls and tool mess"),
        (template, (USER, called), "does not show tool calls and tool messages"),
    ):
        with pytest.raises(Refused, match=f"^conversation 'chat 7': .*{line}"):
            encode(Conversation("chat 7", messages), chat, max_length=99, policy="split")


# ---------------------------------------------------------------- pairs

answers = st.lists(words, min_size=1, max_size=2).map(
    lambda spoken: tuple(Message("assistant", word) for word in spoken)
)


@given(talks, words, answers, answers, st.integers(10, 400))
@settings(deadline=None)
def test_a_pair_shares_its_prompt_and_learns_the_answers(talk, asked, chosen, rejected, max_length):
    prompt = (*talk, Message("user", asked))
    pair = PreferencePair("p", prompt, chosen, rejected)
    example, outcome = encode_pair(pair, template, max_length=max_length, policy="truncate_left")
    systems, rest = ((), prompt) if prompt[0].role != "system" else (prompt[:1], prompt[1:])

    def streams(i):
        return [template.render_view((*systems, *rest[i:], *a))[0] for a in (chosen, rejected)]

    prompts = [streams(i) for i in range(0, len(rest), 2)]
    fitting = [s for s in prompts if sum(map(len, s)) <= max_length]
    if not fitting:
        assert (example, outcome) == (None, "left_out")
        return
    assert outcome == ("whole" if fitting[0] is prompts[0] else "truncated")
    n = example.prompt_length
    for part, ids, answer in zip(
        (example.chosen, example.rejected), fitting[0], (chosen, rejected), strict=True
    ):
        assert part.tokens.tolist() == ids
        assert learned(part) == said(answer)
        assert not part.mask[:n].any() and part.mask[n]
    assert example.chosen.tokens[:n].tolist() == example.rejected.tokens[:n].tolist()
    assert example.chosen.tokens[:n].tolist()[-len(template.reply) :] == list(template.reply)


def test_pairs_without_a_prompt_and_with_empty_answers():
    pair = PreferencePair("p", (), (Message("assistant", ""),), (REPLY,))
    example, outcome = encode_pair(pair, template, max_length=99, policy="refuse")
    assert outcome == "whole" and example.prompt_length == len(template.reply)
    assert learned(example.chosen) == [template.end]


def test_long_pairs_by_policy():
    pair = PreferencePair("pair 7", (USER, REPLY, USER), (REPLY,), (SYSTEM,))
    pair = dataclasses.replace(pair, rejected=(Message("assistant", "no"),))
    whole, _ = encode_pair(pair, template, max_length=999, policy="refuse")
    n = len(whole.chosen.tokens) + len(whole.rejected.tokens)
    found = {
        policy: encode_pair(pair, template, max_length=n - 1, policy=policy)[1]
        for policy in POLICIES
        if policy != "refuse"
    }
    assert found == {"truncate_left": "truncated", "split": "truncated", "leave_out": "left_out"}
    with pytest.raises(Refused, match=f"pair 'pair 7' has {n} tokens; at most {n - 1}"):
        encode_pair(pair, template, max_length=n - 1, policy="refuse")


@pytest.mark.parity
def test_a_pair_is_what_trl_makes_of_it():
    pytest.importorskip("torch")
    data_utils = pytest.importorskip("trl.data_utils")
    start = [SYSTEM, USER, REPLY, USER]
    more = [Message("assistant", "fine"), Message("user", "and you?"), Message("assistant", "ok")]
    for chosen, rejected in (([*start, REPLY], [*start, *more]), (more, [*more, USER, REPLY])):
        row = {
            name: [{"role": m.role, "content": m.content} for m in messages]
            for name, messages in (("chosen", chosen), ("rejected", rejected))
        }
        (pair,) = FORMATS["preference"].read(row, "a")
        theirs = data_utils.extract_prompt(row)
        assert [m["content"] for m in theirs["prompt"]] == [m.content for m in pair.prompt]
        texts = data_utils.apply_chat_template(theirs, tokenizer)
        example, _ = encode_pair(pair, template, max_length=999, policy="refuse")
        n = example.prompt_length
        prompt = tokenizer.encode(texts["prompt"], add_special_tokens=False)
        assert example.chosen.tokens[:n].tolist() == prompt
        for part, name in ((example.chosen, "chosen"), (example.rejected, "rejected")):
            answer = tokenizer.encode(texts[name], add_special_tokens=False)
            assert [*part.tokens[n:], *template.after_end] == answer
