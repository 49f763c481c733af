"""Records: what they must be, and that they come back from disk as they were."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxconv.data.conversation import (
    Conversation,
    Invalid,
    Message,
    PreferencePair,
    ToolCall,
    check,
    parse_line,
    read_jsonl,
    to_line,
    write_jsonl,
)
from jaxconv.errors import Refused

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
plain = st.none() | st.booleans() | st.integers() | st.floats(-1e300, 1e300) | text
meta = st.dictionaries(text, st.recursive(plain, lambda x: st.lists(x, max_size=3), max_leaves=4))
calls = st.lists(st.builds(ToolCall, text, text, st.none() | text), max_size=2).map(tuple)
system = st.lists(st.builds(Message, st.just("system"), text), max_size=1)
heard = st.builds(Message, st.sampled_from(["user", "tool"]), text, st.none() | text)
spoken = st.builds(Message, st.just("assistant"), text.filter(str.strip), st.none() | text, calls)
talk = st.builds(lambda s, m: (*s, *m), system, st.lists(heard | spoken, max_size=4))
conversations = st.builds(
    lambda name, messages, last, meta: Conversation(name, (*messages, last), meta),
    text, talk, spoken, meta,
)  # fmt: skip
answer = st.lists(st.builds(Message, st.just("assistant"), text), min_size=1, max_size=2).map(tuple)
pairs = st.builds(PreferencePair, text, talk, answer, answer, meta).filter(
    lambda pair: pair.chosen != pair.rejected
)


@given(st.lists(conversations, max_size=4) | st.lists(pairs, max_size=4))
@settings(deadline=None)
def test_records_come_back_from_disk_as_they_were(tmp_path_factory, records):
    path = tmp_path_factory.getbasetemp() / "records.jsonl"
    for record in records:
        check(record)
    assert write_jsonl(path, records) == len(records)
    assert list(read_jsonl(path)) == records
    assert path.read_bytes().count(b"\n") == len(records)


USER, REPLY, SYSTEM = Message("user", "Hi"), Message("assistant", "Hello"), Message("system", "Be")
CALL = (ToolCall("add", "{}"),)


@pytest.mark.parametrize(
    ("messages", "field", "reason"),
    [
        ((), "messages", "empty_conversation"),
        ((USER,), "messages", "no_assistant_message"),
        ((USER, Message("assistant", " \n")), "messages[1].content", "empty_assistant_message"),
        ((Message("bot", "Hi"), REPLY), "messages[0].role", "unknown_role"),
        ((USER, SYSTEM, REPLY), "messages[1].role", "system_not_first"),
        ((SYSTEM, SYSTEM, REPLY), "messages[1].role", "two_system_messages"),
        (
            (Message("user", "", None, CALL), REPLY),
            "messages[0].tool_calls",
            "misplaced_tool_calls",
        ),
    ],
)
def test_conversations_that_are_none(messages, field, reason):
    with pytest.raises(Invalid) as invalid:
        check(Conversation("a", messages))
    assert (invalid.value.field, invalid.value.reason) == (field, reason)
    assert str(invalid.value).startswith(field)


def test_an_assistant_may_call_a_tool_without_words():
    check(Conversation("a", (USER, Message("assistant", "", None, CALL), Message("tool", ""))))


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected", "field", "reason"),
    [
        ((USER,), (), (REPLY,), "chosen", "empty_answer"),
        ((USER,), (REPLY,), (USER, REPLY), "rejected[0].role", "different_prompts"),
        ((USER,), (REPLY, USER), (REPLY,), "chosen[1].role", "no_answer"),
        ((USER,), (REPLY,), (REPLY,), "chosen", "no_preference"),
        ((USER, SYSTEM), (REPLY,), (REPLY,), "prompt[1].role", "system_not_first"),
        ((USER,), (REPLY,), (REPLY, Message("x", "")), "rejected[1].role", "unknown_role"),
    ],
)
def test_pairs_that_are_none(prompt, chosen, rejected, field, reason):
    with pytest.raises(Invalid) as invalid:
        check(PreferencePair("a", prompt, chosen, rejected))
    assert (invalid.value.field, invalid.value.reason) == (field, reason)


def test_an_answer_of_a_pair_may_be_empty_and_its_prompt_too():
    check(PreferencePair("a", (), (Message("assistant", ""),), (REPLY, REPLY)))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"a": "\xff"}', "invalid_utf8"),
        (b"{", "invalid_json"),
        (b'{"a": NaN}', "invalid_json"),
        (b'{"a": 1e999}', "invalid_json"),
        (b"[" * 100_000, "invalid_json"),
        (b'{"a": ' + b"9" * 5000 + b"}", "invalid_json"),
        (b'{"a": "\\ud83d"}', "invalid_unicode"),
        (b"[]", "wrong_type"),
    ],
)
def test_lines_that_are_no_rows(line, reason):
    with pytest.raises(Invalid) as invalid:
        parse_line(line)
    assert invalid.value.reason == reason


def test_whole_surrogate_pairs_are_characters():
    assert parse_line(b'{"a": "\\ud83d\\ude00"}') == {"a": "\N{GRINNING FACE}"}


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"id": 3}, r"id: it is a whole number; it must be text"),
        ({"meta": None}, r"meta: it is null; it must be an object"),
        ({"messages": "Hi"}, r"messages: it is text; it must be a list"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\]\.content: it is not there"),
        (
            {"messages": [{"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}]},
            r"messages\[0\]\.tool_calls\[0\]\.arguments: it is not there",
        ),
    ],
)
def test_a_bad_file_is_refused_with_its_line_and_field(tmp_path, change, field):
    path = tmp_path / "chats.jsonl"
    good = json.loads(to_line(Conversation("a", (USER, REPLY))))
    path.write_text(f"{json.dumps(good)}\n{json.dumps(good | change)}\n")
    with pytest.raises(Refused, match=rf"chats\.jsonl, line 2, {field}"):
        list(read_jsonl(path))


def test_what_is_not_json_is_not_written(tmp_path):
    path = tmp_path / "chats.jsonl"
    write_jsonl(path, [Conversation("a", (USER, REPLY))])
    with pytest.raises(ValueError):
        write_jsonl(path, [Conversation("b", (USER, REPLY), {"x": float("nan")})])
    assert [c.id for c in read_jsonl(path)] == ["a"]
