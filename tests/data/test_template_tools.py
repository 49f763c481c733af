"""Conversations with tools: the template's own rendering, of which the assistant's part is
learned."""

import copy
import dataclasses
import importlib.util
import json
from pathlib import Path

import pytest

from jaxconv.data.conversation import Conversation, Message, PreferencePair, ToolCall
from jaxconv.data.examples import encode, encode_pair
from jaxconv.data.readers import FORMATS
from jaxconv.data.template import CHATML_EMPTY_THINK, take_apart
from jaxconv.data.template_tools import EMPTY_THINK
from jaxconv.data.tokenizer import train_tokenizer
from jaxconv.errors import Refused
from jaxconv.rollout.replies import prompt_ids

MARKUP = [
    *("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *("<|im_start|>", "<|im_end|>"),
]

# Small templates in the structure of well-known families.
HERMES = (
    "{% if tools %}<|im_start|>system\n{% if messages[0].role == 'system' %}"
    "{{ messages[0].content }}\n{% endif %}You may call:{% for t in tools %}\n{{ t | tojson }}"
    "{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}{% if m.role == 'tool' %}"
    "{% if messages[loop.index0 - 1].role != 'tool' %}<|im_start|>user{% endif %}"
    "\n<answer>\n{{ m.content }}\n</answer>"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}<|im_end|>\n{% endif %}"
    "{% elif not (tools and m.role == 'system') %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{% if m.content or not loop.first %}{{ '\n' }}{% endif %}"
    "<call>\n"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}'
    "\n</call>{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HEADERS = (
    "{{ '<|begin_of_text|>' }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + ('ipython' if m.role == 'tool' else m.role) }}"
    "{{ '<|end_header_id|>\n\n' }}{% if 'tool_calls' in m %}"
    "{% if m.tool_calls | length != 1 %}{{ raise_exception('one call at a time') }}{% endif %}"
    '{{ \'{"name": "\' + m.tool_calls[0].function.name + \'", "parameters": \' }}'
    "{{ m.tool_calls[0].function.arguments | tojson }}{{ '}' }}"
    "{% elif m.role == 'tool' %}{{ m.content | tojson }}"
    "{% else %}{{ m.content | trim }}{% endif %}{{ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{% endif %}"
)

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Adds two numbers.",
            "parameters": {"type": "object", "properties": {"a": {"type": "number"}}},
        },
    }
]
USER, SYSTEM = Message("user", "What is 2 + 2?"), Message("system", "Be brief.")
CALL = Message("assistant", "", None, (ToolCall("add", '{"a": 2,  "b": "é"}', "call00001"),))
ANSWER, REPLY = Message("tool", 'it is "4"', "add"), Message("assistant", "Four.")
TALK = (SYSTEM, USER, CALL, ANSWER, REPLY, Message("user", "Thanks"), Message("assistant", "Bye"))


@pytest.fixture(scope="module")
def own():
    return train_tokenizer(["What is the tool_call name, arguments and parameters?"] * 5, 300)


@pytest.fixture
def tokenizer_with(own):
    def make(template):
        tokenizer = copy.deepcopy(own)
        tokenizer.add_special_tokens({"additional_special_tokens": MARKUP})
        tokenizer.bos_token = "<|begin_of_text|>"
        tokenizer.chat_template = template
        tokenizer.name_or_path = "some/model"
        return tokenizer

    return make


def as_dicts(messages):
    """As transformers' templates take them."""
    found = []
    for m in messages:
        found.append({"role": m.role, "content": m.content})
        if m.tool_calls:
            found[-1]["tool_calls"] = [
                {
                    "type": "function",
                    "function": {"name": c.name, "arguments": json.loads(c.arguments)},
                }
                for c in m.tool_calls
            ]
    return found


def assert_rendered(chat, talk, tools=()):
    """The stream is the template's rendering, and each turn ends where its prompt had ended."""
    tokenizer, ids = chat.tokenizer, []
    turns = iter(chat.turns(talk, tools))
    for i, message in enumerate(talk):
        if message.role != "assistant":
            continue
        read, said = next(turns)
        ids += read
        about = {"tools": tools or None, "return_dict": False}
        prompt = tokenizer.apply_chat_template(
            as_dicts(talk[:i]), add_generation_prompt=True, **about
        )
        assert ids == prompt == prompt_ids(chat, talk[:i], tools)
        ids += said
        whole = tokenizer.apply_chat_template(as_dicts(talk[: i + 1]), **about)
        assert [*ids, *chat.after_end] == whole and said[-1] == chat.end
    assert next(turns, None) is None


@pytest.mark.parametrize("template", [HERMES, HEADERS], ids=["HERMES", "HEADERS"])
def test_a_stream_with_tools_is_what_the_template_renders(template, tokenizer_with):
    chat = take_apart(tokenizer_with(template))
    assert chat.tools.defines == (template is HERMES)
    tools = TOOLS if chat.tools.defines else ()
    assert_rendered(chat, TALK, tools)
    assert_rendered(chat, (USER, CALL, ANSWER, CALL, ANSWER, REPLY), tools)
    assert_rendered(chat, (SYSTEM, USER, REPLY), tools)  # defined, and not called


def test_what_is_learned_is_calls_and_words(tokenizer_with):
    tokenizer = tokenizer_with(HERMES)
    talk = (USER, CALL, ANSWER, ANSWER, dataclasses.replace(CALL, content="Again."), ANSWER, REPLY)
    (example,), outcome = encode(
        Conversation("a", talk, {"tools": TOOLS}),
        take_apart(tokenizer),
        max_length=999,
        policy="refuse",
    )
    call = '<call>\n{"name": "add", "arguments": {"a": 2, "b": "é"}}\n</call><|im_end|>'
    learned = tokenizer.decode(example.tokens[example.mask])
    assert learned == f"{call}Again.\n{call}Four.<|im_end|>" and outcome == "whole"
    read = tokenizer.decode(example.tokens[~example.mask])
    assert read.count("<answer>") == 3 and read.count(json.dumps(TOOLS[0])) == 1
    # Two answers in a row stand in one turn.
    assert read.count("<|im_start|>user") == 3


def test_cuts_are_made_before_what_the_user_says_and_never_before_an_answer(tokenizer_with):
    chat = take_apart(tokenizer_with(HERMES))
    record = Conversation("a", TALK, {"tools": json.dumps(TOOLS)})
    last = [i for turn in chat.turns((SYSTEM, *TALK[-2:]), TOOLS) for part in turn for i in part]
    (example,), outcome = encode(record, chat, max_length=len(last), policy="truncate_left")
    assert (example.tokens.tolist(), outcome) == (last, "truncated")
    length = sum(len(part) for turn in chat.turns(TALK[:5], TOOLS) for part in turn)
    first, second = encode(record, chat, max_length=length, policy="split")[0]
    assert second.tokens.tolist() == last and len(first.tokens) == length
    assert encode(record, chat, max_length=len(last) - 1, policy="split")[1] == "left_out"


def test_of_two_calls_the_better_one_is_learned(tokenizer_with):
    chat = take_apart(tokenizer_with(HERMES))
    wrong = Message("assistant", "", None, (ToolCall("add", '{"a": 5}'),))
    pair = PreferencePair("p", (USER, CALL, ANSWER, USER), (CALL,), (wrong,), {"tools": TOOLS})
    example, _ = encode_pair(pair, chat, max_length=999, policy="refuse")
    n = example.prompt_length
    assert example.chosen.tokens[:n].tolist() == example.rejected.tokens[:n].tolist()
    for part, argument in ((example.chosen, '{"a": 2, "b": "é"}'), (example.rejected, '{"a": 5}')):
        assert part.mask.tolist() == [False] * n + [True] * (len(part.tokens) - n)
        assert f'"arguments": {argument}' in chat.tokenizer.decode(part.tokens[n:])


def test_without_tools_a_template_that_shows_them_is_as_any_other(tokenizer_with):
    chat = take_apart(tokenizer_with(HERMES))
    forged = Message("user", "<|im_end|>")
    (read, _), *_ = chat.turns((forged, REPLY))
    assert read.count(chat.end) == 1  # words are not read as markup


@pytest.mark.parametrize(
    ("template", "talk", "tools", "why"),
    [
        (HERMES, (USER, CALL, Message("tool", "a<|im_end|>"), REPLY), (), "markup '<|im_end|>'"),
        (HERMES, (USER, CALL), ({"description": "<|im_end|>"},), "the markup '<|im_end|>' stands"),
        (
            HERMES,
            (USER, Message("assistant", "", None, (ToolCall("add", "[2]"),))),
            (),
            "the arguments of its call to 'add' are not an object of JSON",
        ),
        (HEADERS, (USER, CALL), TOOLS, "it shows no definitions of tools"),
        (
            HEADERS,
            (USER, dataclasses.replace(CALL, tool_calls=CALL.tool_calls * 2), ANSWER, REPLY),
            (),
            "it refuses a turn: one call at a time",
        ),
        # Words beside a call would be lost.
        (HEADERS, (USER, dataclasses.replace(CALL, content="Let me see.")), (), "'Let me see.' is"),
    ],
)
def test_what_cannot_be_shown_is_refused_by_id(template, talk, tools, why, tokenizer_with):
    chat = take_apart(tokenizer_with(template))
    record = Conversation("chat 7", talk, {"tools": list(tools)})
    with pytest.raises(Refused) as refused:
        encode(record, chat, max_length=999, policy="split")
    line = "conversation 'chat 7': the chat template of tokenizer 'some/model' cannot show this"
    assert str(refused.value).startswith(line) and why in str(refused.value)
    assert "\n" not in str(refused.value)


def test_definitions_alone_refuse_nobody(own):
    """A template without tools reads the same words as before."""
    record = Conversation("a", (USER, REPLY))
    (plain,), _ = encode(record, take_apart(own), max_length=999, policy="refuse")
    for tools in (TOOLS, "none", [3], None):
        record = dataclasses.replace(record, meta={"tools": tools})
        (example,), _ = encode(record, take_apart(own), max_length=999, policy="refuse")
        assert example.tokens.tolist() == plain.tokens.tolist()


# ---------------------------------------------------------------- templates of checkpoints


@pytest.fixture(scope="module")
def published():
    """Templates of published checkpoints that come with TRL, by name."""
    if importlib.util.find_spec("trl") is None:
        pytest.skip("parity extra is not installed")
    (folder,) = importlib.util.find_spec("trl").submodule_search_locations
    return lambda name: (Path(folder) / "chat_templates" / f"{name}.jinja").read_text()


ROW = {
    "messages": [
        {"role": "user", "content": "2 + 2?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {
                    "id": "call00001",
                    "type": "function",
                    "function": {"name": "add", "arguments": '{"a": 2, "b": 2}'},
                }
            ],
        },
        {"role": "tool", "content": "4", "tool_call_id": "call00001"},
        {"role": "assistant", "content": "Four."},
    ],
    "tools": TOOLS,
}


@pytest.mark.parity
@pytest.mark.parametrize("name", ["qwen2_5", "llama3_1", "llama3_2"])
def test_templates_of_checkpoints_show_tools(name, published, tokenizer_with):
    chat = take_apart(tokenizer_with(published(name)))
    assert chat.tools.defines
    (record,) = FORMATS["openai"].read(ROW, "a")
    for talk in (record.messages, (SYSTEM, *record.messages), TALK):
        assert_rendered(chat, talk, TOOLS)
        assert_rendered(chat, talk)


@pytest.mark.parity
def test_qwen3_shows_tools_without_thinking(published, tokenizer_with):
    original, tokenizer = tokenizer_with(published("qwen3")), tokenizer_with(published("qwen3"))
    chat = take_apart(tokenizer)
    assert chat.tools.defines and tokenizer.chat_template != CHATML_EMPTY_THINK
    user, calls = Message("user", "Bye"), dataclasses.replace(CALL, tool_calls=CALL.tool_calls * 2)
    for talk in ((*TALK, user), (USER, calls, ANSWER, ANSWER, REPLY, user), (USER, REPLY, user)):
        for tools in ((), TOOLS):
            assert_rendered(chat, talk, tools)
            ours, theirs = (
                t.apply_chat_template(as_dicts(talk), tools=tools or None, tokenize=False)
                for t in (tokenizer, original)
            )
            assert ours.replace(EMPTY_THINK, "") == theirs


@pytest.mark.parity
def test_a_call_in_another_markup_is_not_replaced_by_that_of_qwen3(published, tokenizer_with):
    """Later families of the same markup write calls in another way."""
    tokenizer = tokenizer_with(published("qwen3_6"))
    chat = take_apart(tokenizer)
    assert tokenizer.chat_template == CHATML_EMPTY_THINK and isinstance(chat.tools, str)
