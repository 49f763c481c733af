"""Published formats, row by row: what each field becomes, and what is no row of them."""

import json

import pytest

from jaxconv.data.conversation import Conversation, Invalid, Message, PreferencePair, ToolCall
from jaxconv.data.readers import FORMATS

USER, REPLY = Message("user", "Hi"), Message("assistant", "Hello")


def read(name, row):
    return FORMATS[name].read(row, "file:7")


def openai(*messages, **more):
    return {"messages": list(messages), **more}


def m(role, content, **more):
    return {"role": role, "content": content, **more}


# ---------------------------------------------------------------- OpenAI


def test_openai_messages():
    row = openai(
        m("developer", "Be brief."),
        m("user", [{"type": "text", "text": " What is "}, {"type": "text", "text": "2+2?"}]),
        m(
            "assistant",
            None,
            tool_calls=[
                {
                    "id": "call_1",
                    "type": "function",
                    "function": {"name": "add", "arguments": '{"a": 2,  "b": 2}'},
                }
            ],
        ),
        m("tool", "4", tool_call_id="call_1"),
        m("assistant", "4.", name=None, weight=1),
        m("user", "Thanks", name="ann"),
        id=12,
        tools=[{"type": "function"}],
    )
    assert read("openai", row) == [
        Conversation(
            "12",
            (
                Message("system", "Be brief."),
                Message("user", " What is 2+2?"),
                Message("assistant", "", None, (ToolCall("add", '{"a": 2,  "b": 2}', "call_1"),)),
                Message("tool", "4", "add"),
                Message("assistant", "4."),
                Message("user", "Thanks", "ann"),
            ),
            {"tools": [{"type": "function"}]},
        )
    ]


def test_openai_functions_of_before_tools():
    call = {"name": "add", "arguments": {"a": "é"}}
    row = openai(m("assistant", None, function_call=call), m("function", "4", name="add"))
    (conversation,) = read("openai", row)
    assert conversation.id == "file:7"
    assert conversation.messages == (
        Message("assistant", "", None, (ToolCall("add", '{"a": "é"}'),)),
        Message("tool", "4", "add"),
    )


@pytest.mark.parametrize(
    ("message", "field", "reason"),
    [
        (m("bot", "Hi"), "messages[0].role", "unknown_role"),
        (m("assistant", None), "messages[0].content", "wrong_type"),
        ({"role": "user"}, "messages[0].content", "missing_field"),
        ("Hi", "messages[0]", "wrong_type"),
        (m("assistant", "Hi", weight=0), "messages[0].weight", "unsupported_weight"),
        (
            m("user", [{"type": "image_url", "image_url": {}}]),
            "messages[0].content[0].type",
            "unsupported_part",
        ),
        (m("tool", "4", tool_call_id="x"), "messages[0].tool_call_id", "unknown_tool_call"),
        (m("assistant", "", tool_calls={}), "messages[0].tool_calls", "wrong_type"),
        (
            m("assistant", "", tool_calls=[{"function": {"name": "f"}}]),
            "messages[0].tool_calls[0].function.arguments",
            "wrong_type",
        ),
    ],
)
def test_openai_messages_that_are_none(message, field, reason):
    with pytest.raises(Invalid) as invalid:
        read("openai", openai(message, m("assistant", "Hello")))
    assert (invalid.value.field, invalid.value.reason) == (field, reason)


# ---------------------------------------------------------------- ShareGPT


def test_sharegpt():
    row = {
        "id": "abc_0",
        "system": "Be brief.",
        "conversations": [
            {"from": "human", "value": "Hi\n"},
            {"from": "function_call", "value": '{"name": "now", "arguments": {}}'},
            {"from": "observation", "value": "12:00"},
            {"from": "gpt", "value": "Noon", "markdown": None},
        ],
        "lang": "en",
    }
    assert read("sharegpt", row) == [
        Conversation(
            "abc_0",
            (
                Message("system", "Be brief."),
                Message("user", "Hi\n"),
                Message("assistant", "", None, (ToolCall("now", "{}"),)),
                Message("tool", "12:00"),
                Message("assistant", "Noon"),
            ),
            {"lang": "en"},
        )
    ]


@pytest.mark.parametrize(
    ("turn", "field", "reason"),
    [
        ({"from": "alien", "value": "Hi"}, "conversations[0].from", "unknown_role"),
        ({"from": "gpt", "value": None}, "conversations[0].value", "wrong_type"),
        ({"from": "function_call", "value": "now"}, "conversations[0].value", "invalid_tool_call"),
        ({"role": "user", "content": "Hi"}, "conversations[0].from", "missing_field"),
    ],
)
def test_sharegpt_turns_that_are_none(turn, field, reason):
    with pytest.raises(Invalid) as invalid:
        read("sharegpt", {"conversations": [turn, {"from": "gpt", "value": "Hello"}]})
    assert (invalid.value.field, invalid.value.reason) == (field, reason)


# ---------------------------------------------------------------- WildChat


def wildchat_row():
    """With the fields of the published data set."""
    common = {"language": "English", "redacted": False, "toxic": False, "turn_identifier": 17}
    user = {"country": "France", "hashed_ip": "ab", "header": {"user-agent": "x"}, "state": None}
    return {
        "conversation_hash": "c0ffee",
        "model": "gpt-4-0314",
        "timestamp": "2023-04-09T00:02:53+00:00",
        "conversation": [
            {**m("user", "Hi"), **common, **user, "timestamp": None},
            {**m("assistant", "Hello"), **common, "timestamp": "2023-04-09T00:02:53+00:00"},
        ],
        "turn": 1,
        "language": "English",
        "openai_moderation": [{"flagged": False, "category_scores": {"hate": 1e-7}}],
        "detoxify_moderation": [{"toxicity": 0.001}],
        "toxic": False,
        "redacted": False,
        "state": "Île-de-France",
        "country": "France",
    }


def test_wildchat():
    row = wildchat_row()
    (conversation,) = read("wildchat", row)
    assert conversation.id == "c0ffee" and conversation.messages == (USER, REPLY)
    meta = dict(conversation.meta)
    assert [message["turn_identifier"] for message in meta.pop("messages")] == [17, 17]
    assert meta == {k: v for k, v in row.items() if k not in ("conversation", "conversation_hash")}
    assert not meta["toxic"] and not meta["redacted"] and meta["language"] == "English"


def test_wildchat_rows_without_words():
    row = wildchat_row()
    row["conversation"][1]["content"] = None
    with pytest.raises(Invalid, match=r"conversation\[1\]\.content: it is null"):
        read("wildchat", row)
    row["conversation"][1]["content"] = ""
    with pytest.raises(Invalid) as invalid:
        read("wildchat", row)
    assert invalid.value.reason == "empty_assistant_message"


# ---------------------------------------------------------------- TRL's prompts with completions


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Hi", "completion": "Hello"},
        {"prompt": [m("user", "Hi")], "completion": [m("assistant", "Hello")]},
        {"prompt": [m("user", "Hi")], "completion": "Hello"},
        {"prompt": "Hi", "completion": [m("assistant", "Hello")]},
    ],
)
def test_prompts_with_completions(row):
    (conversation,) = read("completion", row | {"id": 3, "source": "web", "label": True})
    meta = {"source": "web", "label": True}
    assert conversation == Conversation("3", (USER, REPLY), meta)


def test_completions_of_several_messages():
    prompt = [m("system", "Be brief."), m("user", "Hi"), m("assistant", "Yes?"), m("user", "2+2")]
    (conversation,) = read("completion", {"prompt": prompt, "completion": [m("assistant", "4")]})
    assert [message.content for message in conversation.messages] == [
        *("Be brief.", "Hi", "Yes?", "2+2", "4")
    ]
    (alone,) = read("completion", {"prompt": "", "completion": "Hello"})
    assert alone.messages == (REPLY,)


@pytest.mark.parametrize(
    ("row", "field", "reason"),
    [
        ({"prompt": "Hi", "completion": None}, "completion", "wrong_type"),
        ({"prompt": 3, "completion": "Hello"}, "prompt", "wrong_type"),
        ({"prompt": "Hi"}, "completion", "missing_field"),
        ({"prompt": "Hi", "completion": []}, "completion", "no_answer"),
        ({"prompt": "Hi", "completion": [m("user", "Hi")]}, "completion", "no_answer"),
        ({"prompt": "Hi", "completion": ""}, "messages[1].content", "empty_assistant_message"),
        ({"prompt": "Hi", "completion": "Go", "label": False}, "label", "unwanted_completion"),
    ],
)
def test_completions_that_are_none(row, field, reason):
    with pytest.raises(Invalid) as invalid:
        read("completion", row)
    assert (invalid.value.field, invalid.value.reason) == (field, reason)


# ---------------------------------------------------------------- SOTOPIA


def episode():
    """In the shape of SOTOPIA's own logs, where the environment repeats what was said."""
    return {
        "pk": "01H",
        "environment": "01E",
        "agents": ["01A", "01B"],
        "tag": "test",
        "models": ["gpt-4", "a", "b"],
        "messages": [
            [["Environment", "Ann", "You are Ann."], ["Environment", "Bob", "You are Bob."]],
            [["Ann", "Environment", 'said: "I say "no"."'], ["Bob", "Environment", "did nothing"]],
            [["Environment", "Ann", "Turn #1"], ["Environment", "Bob", "Turn #1"]],
            [["Ann", "Environment", "did nothing"], ["Bob", "Environment", "[action] nods"]],
            [["Ann", "Environment", "left the conversation"]],
        ],
        "rewards": [[3.5, {"goal": 7}], 2.0],
    }


def test_an_episode_is_a_conversation_for_each_view():
    ann, bob = read("sotopia", episode())
    assert (ann.id, bob.id) == ("01H/Ann", "01H/Bob")
    assert ann.messages == (
        Message("system", "You are Ann."),
        Message("assistant", 'I say "no".'),
        Message("user", "[action] nods", "Bob"),
        Message("assistant", "left the conversation"),
    )
    assert bob.messages == (
        Message("system", "You are Bob."),
        Message("user", 'I say "no".', "Ann"),
        Message("assistant", "[action] nods"),
        Message("user", "left the conversation", "Ann"),
    )
    assert (ann.meta["agent"], ann.meta["reward"]) == ("Ann", [3.5, {"goal": 7}])
    assert (bob.meta["reward"], bob.meta["tag"]) == (2.0, "test")


def test_an_agent_that_says_nothing_has_no_view():
    row = episode()
    row["messages"][3] = []
    assert [view.meta["agent"] for view in read("sotopia", row)] == ["Ann"]
    row["messages"] = row["messages"][:1]
    with pytest.raises(Invalid, match="no agent said anything"):
        read("sotopia", row)


def test_episodes_that_are_none():
    for messages, field, reason in (
        ([], "messages", "empty_conversation"),
        ([[["Ann", "Environment", "Hi"]]], "messages[0]", "no_brief"),
        (
            [[["Environment", "Ann", ""]], [["Eve", "Environment", "Hi"]]],
            "messages[1][0]",
            "no_brief",
        ),
        ([[["Environment", "Ann"]]], "messages[0][0]", "wrong_type"),
        ([[["Environment", "Ann", None]]], "messages[0][0][2]", "wrong_type"),
    ):
        with pytest.raises(Invalid) as invalid:
            read("sotopia", episode() | {"messages": messages})
        assert (invalid.value.field, invalid.value.reason) == (field, reason)


def test_the_views_of_our_own_episodes_are_those_that_were_played():
    from types import SimpleNamespace

    from jaxconv import envs
    from jaxconv.envs.bargaining.scripted import scripted_player
    from jaxconv.envs.episode import play
    from jaxconv.evals.episodes import episode_log

    env = envs.make("bargaining", players=(3,))
    played = play(env, lambda env: {a: scripted_player(env, "fair", a, 1) for a in env.agents}, 5)
    game = SimpleNamespace(
        agents=played.agents,
        brief=[played.views[agent][0].content for agent in played.agents],
        transcript=[(played.agents.index(m.name), m.content) for m in played.transcript],
        infos=[played.infos[agent] for agent in played.agents],
        game=SimpleNamespace(seed=5, player=lambda seat: "fair"),
    )
    row = json.loads(json.dumps(episode_log("bargaining", env, game)))
    views = {view.meta["agent"]: view for view in read("sotopia", row)}
    for agent, view in played.views.items():
        speech = [(m.role, m.name, m.content) for m in views[agent].messages]
        assert speech == [(m.role, m.name, m.content) for m in view]


# ---------------------------------------------------------------- preference pairs

A, B = m("assistant", "yes"), m("assistant", "no")
PAIR = PreferencePair(
    "file:7", (USER,), (Message("assistant", "yes"),), (Message("assistant", "no"),)
)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [m("user", "Hi")], "chosen": [A], "rejected": [B]},
        {"chosen": [m("user", "Hi"), A], "rejected": [m("user", "Hi"), B]},
        {"prompt": "Hi", "chosen": "yes", "rejected": "no"},
        {"prompt": "Hi", "chosen": [A], "rejected": [B]},
        {"prompt": [m("user", "Hi")], "chosen": "yes", "rejected": "no"},
        # The prompt once more, as UltraFeedback's binarised form has it.
        {"prompt": "Hi", "chosen": [m("user", "Hi"), A], "rejected": [m("user", "Hi"), B]},
        {"prompt": None, "chosen": [m("user", "Hi"), A], "rejected": [m("user", "Hi"), B]},
    ],
)
def test_forms_of_pairs(row):
    assert read("preference", row) == [PAIR]


def test_pairs_without_a_prompt():
    (pair,) = read("preference", {"chosen": "yes", "rejected": "no", "score": 0.5, "id": "x"})
    assert pair == PreferencePair("x", (), PAIR.chosen, PAIR.rejected, {"score": 0.5})


def test_all_that_both_share_is_prompt():
    start = [m("system", "Be."), m("user", "a"), m("assistant", "b"), m("user", "c")]
    (pair,) = read("preference", {"chosen": [*start, A], "rejected": [*start, B]})
    assert [message.content for message in pair.prompt] == ["Be.", "a", "b", "c"]
    (pair,) = read(
        "preference", {"prompt": start[:2], "chosen": [*start[2:], A], "rejected": [*start[2:], B]}
    )
    assert len(pair.prompt) == 4 and pair.chosen == PAIR.chosen


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "Hi", "chosen": "yes", "rejected": "yes"}, "no_preference"),
        ({"prompt": "Hi", "chosen": "yes", "rejected": None}, "wrong_type"),
        ({"prompt": "Hi", "chosen": "yes"}, "missing_field"),
        ({"chosen": [m("user", "a"), A], "rejected": [m("user", "b"), B]}, "different_prompts"),
        (
            {"prompt": "c", "chosen": [m("user", "a"), A], "rejected": [m("user", "a"), B]},
            "different_prompts",
        ),
        (
            {"chosen": [m("user", "a"), A, m("user", "b")], "rejected": [m("user", "a"), B]},
            "no_answer",
        ),
        ({"chosen": [], "rejected": [B]}, "empty_answer"),
    ],
)
def test_pairs_that_are_none(row, reason):
    with pytest.raises(Invalid) as invalid:
        read("preference", row)
    assert invalid.value.reason == reason


def hh(chosen, rejected):
    return read("hh_rlhf", {"chosen": chosen, "rejected": rejected})[0]


def test_hh_dialogues_part_at_a_turn():
    start = "\n\nHuman:  one \n\nAssistant: two\n\n\nHuman: three"
    pair = hh(start + "\n\nAssistant: Yes", start + "\n\nAssistant: Yes, or no")
    assert pair.prompt == (
        Message("user", " one "),
        Message("assistant", "two\n"),
        Message("user", "three"),
    )
    assert (pair.chosen, pair.rejected) == (
        (Message("assistant", "Yes"),),
        (Message("assistant", "Yes, or no"),),
    )


def test_odd_hh_dialogues():
    start = "\n\nHuman: one\n\nAssistant: two"
    # An empty answer.
    assert hh("\n\nHuman: one\n\nAssistant: ", start).chosen == (Message("assistant", ""),)
    # Two turns of the assistant's in a row, in the prompt and as an answer.
    pair = hh(start + "\n\nAssistant: three", start + "\n\nAssistant: four\n\nAssistant: five")
    assert (len(pair.prompt), len(pair.chosen), len(pair.rejected)) == (2, 1, 2)
    # One goes on where the other ends.
    pair = hh(start, start + "\n\nHuman: more\n\nAssistant: three")
    assert (len(pair.prompt), len(pair.chosen), len(pair.rejected)) == (1, 1, 3)
    # A speaker's name inside words is words.
    assert hh(start + " Human: x", start).chosen == (Message("assistant", "two Human: x"),)


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        ("Human: a\n\nAssistant: b", "\n\nHuman: a\n\nAssistant: b", "no_turns"),
        ("\n\nHuman: a\n\nAssistant: b", "\n\nHuman: a\n\nAssistant: b", "no_preference"),
        ("\n\nHuman: a\n\nAssistant: b", "\n\nHuman: c\n\nAssistant: b", "different_prompts"),
        ("\n\nHuman: a\n\nAssistant: b\n\nHuman: c", "\n\nHuman: a\n\nAssistant: d", "no_answer"),
    ],
)
def test_hh_dialogues_that_are_no_pair(chosen, rejected, reason):
    with pytest.raises(Invalid) as invalid:
        hh(chosen, rejected)
    assert invalid.value.reason == reason
