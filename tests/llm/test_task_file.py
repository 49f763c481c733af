"""Tasks from small files: what they become, and what is refused with file and field."""

import textwrap

import pytest

from jaxconv.data.conversation import Conversation, Message
from jaxconv.errors import Refused
from jaxconv.llm import run_tasks
from jaxconv.llm.answers import parse
from jaxconv.llm.backends.rules import Rules
from jaxconv.llm.failures import InvalidAnswer
from jaxconv.llm.task_file import load_task

YAML = """
name: mood
prompt: mood.md
output:
  mood: {type: label, labels: {happy: is glad and thanks, angry: complains and is angry}}
  topics: {type: labels, labels: [money, love], max_items: 1}
  score: {type: integer, minimum: 1, maximum: 5}
  proof: {type: quote, max_words: 4}
  share: {type: number}
"""
TALK = Conversation(
    "t", (Message("user", "thanks a lot, I am so glad"), Message("assistant", "ok"))
)


def write(folder, text, name="task.yaml"):
    (folder / "mood.md").write_text("{{ label_list(labels.mood) }}\n{{ transcript(turns) }}")
    (folder / name).write_text(textwrap.dedent(text))
    return folder / name


def test_a_yaml_file_is_a_task(tmp_path):
    task = load_task(write(tmp_path, YAML))
    input = task.make_input(TALK)
    good = '{"mood": "happy", "topics": ["love"], "score": 5, "proof": "so glad", "share": 0.5}'
    value = parse(task.task, input, good)
    assert (value.mood, value.topics, value.score) == ("happy", ["love"], 5)
    assert task.label_fields == ("mood",)
    content = task.task.request(input, model="m").messages[1]["content"]
    assert content.startswith("- happy: is glad and thanks\n- angry")
    assert '<turn number="1" role="user">thanks a lot' in content


@pytest.mark.parametrize(
    ("part", "other", "kind", "said"),
    [
        ('"happy"', '"sad"', "outside_labels", "mood"),
        ('["love"]', '["love", "love"]', "wrong_schema", "topics"),
        ("5", "6", "wrong_schema", "score"),
        ('"so glad"', '"so sad"', "failed_check", "proof: it must be words of the conversation"),
        ('"so glad"', '"thanks a lot, I am"', "failed_check", "proof: it has 5 words"),
        ('"so glad"', '"so glad", "more": 1', "wrong_schema", "more"),
        ("0.5", '"nan"', "wrong_schema", "share: Input should be a finite number"),
    ],
)
def test_answers_that_do_not_fit_are_refused(tmp_path, part, other, kind, said):
    task = load_task(write(tmp_path, YAML))
    good = '{"mood": "happy", "topics": ["love"], "score": 5, "proof": "so glad", "share": 0.5}'
    with pytest.raises(InvalidAnswer) as invalid:
        parse(task.task, task.make_input(TALK), good.replace(part, other))
    assert invalid.value.kind == kind and said in str(invalid.value)


def test_a_shortlist_offers_some_and_only_those_may_be_given(tmp_path):
    text = """
    name: mood
    prompt: "{{ label_list(labels.mood) }}"
    output:
      mood:
        type: label
        shortlist: 2
        labels: {glad: glad and thankful, angry: angry and loud, lost: lost the card}
    """
    task = load_task(write(tmp_path, text))
    input = task.make_input(TALK)
    offered = [label.name for label in input.labels["mood"]]
    assert len(offered) == 2 and "glad" in offered
    (missing,) = {"glad", "angry", "lost"} - set(offered)
    with pytest.raises(InvalidAnswer, match=f"mood: '{missing}' is not offered; it may be glad"):
        parse(task.task, input, f'{{"mood": "{missing}"}}')
    assert run_tasks(task.task, {"t": input}, Rules())["t"].value.mood == "glad"


def test_a_python_file_is_a_task(tmp_path):
    text = """
    from pydantic import BaseModel
    from jaxconv.llm import Prompt, Task
    from jaxconv.llm.conversations import ConversationInput

    class Turns(BaseModel):
        turns: int

    TASK = Task(
        name="turns", input=ConversationInput, output=Turns,
        prompt=Prompt("turns", "How many? {{ transcript(turns) }}"),
        checks=(lambda i, o: None if o.turns == len(i.turns) else "count again",),
        rules=lambda i: Turns(turns=len(i.turns)),
    )
    """
    task = load_task(write(tmp_path, text, "task.py"))
    input = task.make_input(TALK)
    assert run_tasks(task.task, {"t": input}, Rules())["t"].value.turns == 2
    with pytest.raises(InvalidAnswer, match="count again"):
        parse(task.task, input, '{"turns": 3}')


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("name: mood", "nome: mood"), "task.yaml, name: Field required"),
        (("type: integer", "type: date"), "task.yaml, output.score.type: Input should be"),
        (("labels: [money, love]", "labels: [money]"), "output.topics.labels: there must be two"),
        (("max_words: 4", "maximum: 4"), "output.proof.maximum: type quote has none"),
        (("mood.md", "nowhere.md"), "nowhere.md: no such file"),
        (("mood.md", '"{{ talk }}"'), "no field fills the slot 'talk'; it may be turns, labels"),
        (("output:", "output: ["), "task.yaml: while parsing"),
    ],
)
def test_what_is_no_task_is_refused(tmp_path, change, said):
    with pytest.raises(Refused) as refusal:
        load_task(write(tmp_path, YAML.replace(*change)))
    assert said in str(refusal.value) and "\n" not in str(refusal.value)


def test_other_files_are_refused(tmp_path):
    with pytest.raises(Refused, match="no such file"):
        load_task(tmp_path / "none.yaml")
    with pytest.raises(Refused, match="must define TASK"):
        load_task(write(tmp_path, "TASK = 1", "task.py"))
