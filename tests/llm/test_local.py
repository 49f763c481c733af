"""The local backend: whatever a model knows, its answers fit their schema and depend on nothing
else."""

import dataclasses
import enum
import functools
import json
import shutil
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from pydantic import BaseModel, Field

from jaxconv import launch
from jaxconv.data.tokenizer import train_tokenizer
from jaxconv.errors import Failed, Refused
from jaxconv.evals.judges import PairwiseInput, judge_pairs
from jaxconv.llm import Journal, Prompt, Settings, Task, run_tasks
from jaxconv.llm.backends.local import Local
from jaxconv.models.config import DecoderConfig
from jaxconv.models.hf import save_pretrained
from jaxconv.rollout import writers
from jaxconv.rollout.engine import Engine

ROOT = Path(__file__).resolve().parents[2]
CONTEXT = 2048


class Row(BaseModel):
    text: str


class Colour(enum.StrEnum):
    RED = "red"
    DARK_GREEN = "dark green"


class Part(BaseModel):
    name: str
    size: int = Field(ge=-5, le=120)
    colour: Colour


class Everything(BaseModel):
    label: Literal["good", "bad", 'so "so"']
    score: int
    share: float
    sure: bool
    note: str
    tags: list[Literal["x", "y", "z"]] = Field(max_length=3)
    parts: list[Part] = Field(min_length=1, max_length=2)
    main: Part
    other: str | None


class Small(BaseModel):
    label: Literal["good", "bad"]
    score: int = Field(ge=0, le=99)


def task_of(output, **fields) -> Task:
    prompt = "# System\nYou label texts, one after the other.\n# User\n<text>{{ text }}</text>"
    fields = {"max_tokens": 300, **fields}
    return Task(name="label", input=Row, output=output, prompt=Prompt("p.md", prompt), **fields)


SMALL = task_of(Small, max_tokens=40)
SAMPLED = dataclasses.replace(SMALL, temperature=2.0)
ONCE = Settings(concurrency=4, max_attempts=1)


def rows(n: int) -> dict[str, Row]:
    return {f"row-{i}": Row(text=f"text {i} " + "more " * (7 * i % 11)) for i in range(n)}


@pytest.fixture(scope="module")
def save(random_decoder):
    return functools.partial(write, random_decoder)


def write(random_decoder, folder: Path, seed: int = 0) -> Path:
    """A checkpoint of random weights."""
    tokenizer = train_tokenizer(['{"label": "good", "score": 12}, you label texts'] * 3, 300)
    config = DecoderConfig(
        family="llama",
        vocab_size=len(tokenizer) + 7,
        embed_dim=32,
        num_layers=1,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        mlp_dim=48,
        max_positions=CONTEXT,
        eos_token_ids=(tokenizer.eos_token_id,),
    )
    save_pretrained(random_decoder(config, seed), tokenizer, folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def _few_shapes():
    """One of each kind, so that few programs are compiled."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writers, "_LENGTH", CONTEXT)
        patch.setattr(writers, "_PREFILL_ROWS", (4,))
        patch.setattr(writers, "_PREFILL_TOKENS", (64,))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory, save):
    return save(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def backend(folder):
    return Local(folder, slots=4)


def test_every_answer_of_a_random_model_fits_its_schema(backend):
    task = task_of(Everything, temperature=1.5)
    results = run_tasks(task, rows(24), backend, settings=ONCE)
    assert [r.error for r in results.values() if not r.ok] == []
    assert len({r.raw for r in results.values()}) == 24
    for result in results.values():
        assert Everything.model_validate_json(result.raw) == result.value


def test_an_answer_is_the_same_alone_and_in_a_batch(backend):
    together = run_tasks(SAMPLED, rows(12), backend, settings=ONCE)
    assert len({r.raw for r in together.values()}) > 3
    for id in ("row-3", "row-11", "row-0"):
        alone = run_tasks(SAMPLED, {id: rows(12)[id]}, backend, settings=ONCE)
        assert alone[id].raw == together[id].raw


def test_labelling_from_the_command_line_and_again(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = [
        f"--config={ROOT / 'configs' / 'label.py'}",
        "--workdir=run",
        "--config.data.examples=6",
        "--config.llm.backend=local",
        f"--config.llm.model={folder}",
        "--config.llm.concurrency=4",
    ]
    assert launch.main(command) == 0
    labels = Path("run/artifacts/labels.jsonl").read_bytes()
    assert len(labels.splitlines()) == 6
    with Journal("run/journal.sqlite", read_only=True) as journal:
        (cost,) = journal.costs()
    assert (cost.calls, cost.usd) == (6, 0.0) and cost.tokens > 6 * 100
    assert launch.main(command) == 0
    assert Path("run/artifacts/labels.jsonl").read_bytes() == labels
    assert json.loads(Path("run/report.json").read_text())["cost"]["llm_calls"] == 6


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--config.llm.model=nowhere"], "model path nowhere: no such folder"),
        (["--config.llm.model=."], "config.json is missing"),
        ([], "config.llm.model='' with config.llm.backend='local'"),
        (["--config.llm.model=.", "--config.llm.base_url=http://x/v1"], "asks no endpoint"),
    ],
)
def test_a_model_that_is_not_there_is_refused_before_any_work(
    arguments, expected, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    config = f"--config={ROOT / 'configs' / 'label.py'}"
    command = [config, "--workdir=run", "--config.llm.backend=local", *arguments]
    assert launch.main(command) == 2
    assert expected in capsys.readouterr().err
    assert not Path("run").exists()


def test_a_folder_without_tokenizer_is_refused(folder, tmp_path):
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(Refused, match="holds no tokenizer"):
        Local(tmp_path)


def test_a_prompt_longer_than_the_context_is_an_error_of_its_row(backend):
    long, short = Row(text="word " * CONTEXT), Row(text="word")
    results = run_tasks(SMALL, {"long": long, "short": short}, backend, settings=ONCE)
    assert results["short"].ok
    error = results["long"].error
    assert error.kind == "refused_request" and results["long"].attempts == 1
    assert f"the answer may have 40; the model has room for {CONTEXT - 1}" in error.message


def test_an_answer_that_was_cut_is_asked_for_again_with_more_tokens(backend):
    task = dataclasses.replace(SMALL, max_tokens=10)
    result = run_tasks(task, rows(1), backend, settings=Settings(max_attempts=2))["row-0"]
    assert result.ok and result.attempts == 2
    few = dataclasses.replace(SMALL, max_tokens=2)
    result = run_tasks(few, rows(1), backend, settings=Settings(max_attempts=2))["row-0"]
    assert result.error.kind == "truncated" and result.raw.startswith('{"')


def test_sampled_answers_follow_seed_sample_and_attempt(folder, backend):
    def raw(backend, **options):
        results = run_tasks(SAMPLED, rows(4), backend, settings=ONCE, **options)
        return [result.raw for result in results.values()]

    first = raw(backend)
    assert raw(backend) == first
    assert raw(backend, sample=1) != first
    assert raw(Local(folder, slots=4, seed=1)) != first


def test_a_check_that_fails_gets_another_answer(backend):
    """The second attempt at a row reads what was wrong and is drawn anew."""
    seen = []

    def not_again(row, answer):
        seen.append(answer)
        return "say something else" if len(seen) == 1 else None

    task = dataclasses.replace(SAMPLED, checks=(not_again,))
    with Journal() as journal:
        settings = Settings(max_attempts=2)
        result = run_tasks(task, rows(1), backend, settings=settings, journal=journal)["row-0"]
        assert result.ok and result.attempts == 2
        (cost,) = journal.costs()
        assert cost.calls == 2


def test_tokens_count_for_the_budget_and_cost_nothing(backend):
    settings = Settings(concurrency=1, max_attempts=1, budget_usd=0.01, budget_tokens=2500)
    results = run_tasks(SMALL, rows(8), backend, settings=settings)
    kinds = [r.error and r.error.kind for r in results.values()]
    assert set(kinds) == {None, "budget"} and kinds[0] is None
    assert all(r.usd == 0 and r.tokens > 100 for r in results.values() if r.ok)


def test_other_weights_in_the_folder_are_another_model(save, tmp_path):
    first = Local(save(tmp_path / "tiny")).model
    assert first.startswith("tiny@")
    assert Local(save(tmp_path / "tiny")).model == first
    assert Local(save(tmp_path / "tiny", seed=1)).model != first


def test_another_chat_template_in_the_folder_is_another_model(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "tiny")
    before = Local(tmp_path / "tiny").model
    assert before == Local(folder).model
    file = tmp_path / "tiny" / "chat_template.jinja"
    file.write_text("{#- mine -#}" + file.read_text())
    assert Local(tmp_path / "tiny").model != before


def test_a_schema_that_no_grammar_is_made_of_ends_the_run(backend):
    class Odd(BaseModel):
        counts: dict[Literal["a", "b"], int]

    with pytest.raises(Refused, match="of the schema of Odd: Unimplemented keys"):
        run_tasks(task_of(Odd), rows(2), backend, settings=ONCE)


def test_a_device_that_fails_ends_the_run_and_the_next_begins_anew(folder, monkeypatch):
    backend = Local(folder, slots=4)
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "choose", fails)
        with pytest.raises(Failed, match=r"device .* failed: MemoryError: no memory left"):
            run_tasks(SMALL, rows(6), backend, settings=ONCE)
    assert all(r.ok for r in run_tasks(SMALL, rows(6), backend, settings=ONCE).values())


def fails(self, allowed_BW, sampling):
    raise MemoryError("no memory left")


def test_what_a_run_gives_up_makes_room_for_others(backend):
    """Calls that time out leave their slots."""
    slow = dataclasses.replace(task_of(Everything), max_tokens=1000)
    settings = Settings(concurrency=4, max_attempts=1, timeout_s=0.05)
    results = run_tasks(slow, rows(8), backend, settings=settings)
    assert {r.error.kind for r in results.values()} == {"timeout"}
    assert all(r.ok for r in run_tasks(SMALL, rows(6), backend, settings=ONCE).values())


def test_it_judges(backend):
    pairs = {
        str(i): PairwiseInput(question=f"which {i}?", first="this " * i, second="that")
        for i in range(4)
    }
    judged = judge_pairs(
        pairs, lambda task, inputs: run_tasks(task, inputs, backend, settings=ONCE)
    )
    assert not judged.errors and set(judged.winners) == set(pairs)
    assert judged.flip_rate is not None


def test_what_prompts_of_a_task_begin_with_is_read_once(backend, monkeypatch):
    shared = []
    share = Engine.share
    monkeypatch.setattr(Engine, "share", lambda self, ids: (shared.append(ids), share(self, ids)))
    task = dataclasses.replace(SMALL, prompt=Prompt("q.md", "# System\nNew.\n# User\n{{ text }}"))
    assert all(r.ok for r in run_tasks(task, rows(9), backend, settings=ONCE).values())
    (prefix,) = shared
    text = backend._template.backend.decode(prefix, skip_special_tokens=False)
    assert text.startswith("<|system|>New.") and len(prefix) % 16 == 0


@pytest.mark.slow
@pytest.mark.parity
def test_greedy_answers_of_a_checkpoint_of_transformers_are_those_of_torch(tmp_path):
    """The likeliest token that the grammar allows, by a whole forward pass in torch for each."""
    torch = pytest.importorskip("torch", reason="parity extra is not installed")
    import llguidance
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = train_tokenizer(['{"label": "good", "score": 12}, you label texts'] * 3, 300)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=0.3,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    results = run_tasks(SMALL, rows(3), Local(tmp_path, slots=2), settings=ONCE)

    schema = Small.model_json_schema() | {"additionalProperties": False}
    style = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
    grammar = llguidance.LLMatcher.grammar_from_json_schema(schema, overrides=style)
    text = tokenizer.backend_tokenizer.to_str()
    vocabulary = llguidance.LLTokenizer(text, eos_token=tokenizer.eos_token_id)
    for id, row in rows(3).items():
        messages = SMALL.request(row, model="").messages
        prompt = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False
        )
        matcher, said = llguidance.LLMatcher(vocabulary, grammar), []
        while not matcher.is_stopped():
            with torch.inference_mode():
                logits = model(torch.tensor([prompt + said])).logits[0, -1].numpy()
            bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
            allowed = np.unpackbits(bits, bitorder="little")[: len(logits)].astype(bool)
            said.append(int(np.argmax(np.where(allowed, logits, -np.inf))))
            assert matcher.consume_token(said[-1])
        assert results[id].raw == tokenizer.decode(said)
        assert results[id].tokens == len(prompt) + len(said)
