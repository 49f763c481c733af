"""Supervised fine-tuning: the model learns to say what the assistant of good conversations says.

1. Conversations: a file or a prepared data set, or the embedded help desk; some are kept apart.
2. A tokenizer and a model: a checkpoint, or a small one from scratch.
3. Every conversation through the model's chat template once; the assistant's tokens are learned.
4. Packed rows, one loop.
5. The same numbers before and after on the conversations kept apart, replies side by side, and a
   control that learns from replies which belong to other conversations.
6. A Hugging Face checkpoint, and a report.
"""

import itertools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax

from jaxconv import processes
from jaxconv.data.conversation import Conversation, PreferencePair
from jaxconv.data.corpus import Corpus, exchange_replies, last_exchange, opening, split
from jaxconv.data.examples import POLICIES, definitions
from jaxconv.data.quarantine import Quarantine
from jaxconv.data.readers import FORMATS
from jaxconv.data.sources import Source, open_source
from jaxconv.data.stores import Stores
from jaxconv.data.synthetic import assistant
from jaxconv.data.template import take_apart
from jaxconv.data.token_store import TokenStore
from jaxconv.errors import Refused
from jaxconv.evals import fine_tuning_report
from jaxconv.evals.exam import Exam
from jaxconv.evals.report import Report
from jaxconv.models import hf, kernels
from jaxconv.models.decoder import Decoder
from jaxconv.models.device_group import device_groups
from jaxconv.models.peft_io import save_adapter
from jaxconv.objectives.sft import finish_metrics
from jaxconv.perf.planned import Planned
from jaxconv.rollout.planned import planned_replies
from jaxconv.train import checks, fine_tuning, interrupt
from jaxconv.train.likelihood import Scorer, sft_objective
from jaxconv.train.mesh import tell_of_idle_devices, training_mesh
from jaxconv.train.starting_point import (
    architecture,
    load_decoder,
    starting_decoder,
    stored_bytes,
)
from jaxconv.train.trainable import merged
from jaxconv.train.workdir import Workdir

TOKENIZER_CONVERSATIONS = 2000  # that a small tokenizer is trained on
EVALUATION_QUARANTINE = "evaluation_quarantine.jsonl"
EVALUATION_RECORDS = "evaluation_records.json"


def check(config) -> None:
    """Refuses what cannot work, before any work is done."""
    fine_tuning.check(config, "train")
    check_data(config)


def check_data(config) -> None:
    least = {"data.examples": 1, "data.validation": 2, "data.held_out": 2}
    least |= {"samples.prompts": 2, "samples.max_tokens": 1, "samples.temperature": 0}
    least |= {"samples.tensor": 1}
    checks.at_least(config, least)
    checks.one_of(config, {"data.format": ("auto", *FORMATS), "data.too_long": POLICIES})
    if config.data.format != "auto" and not config.data.path:
        raise Refused(
            f"config.data.format={config.data.format!r} with config.data.path=''; "
            "it must be 'auto', or there must be a path"
        )


def run(config, workdir: Workdir) -> Report:
    """Trains, measures, exports and reports."""
    idle = tell_of_idle_devices(config, "batch.rows")
    quarantine = Quarantine(workdir.artifacts / "quarantine.jsonl", writer=workdir.is_writer)
    corpus = conversations(config, quarantine)
    make_start, tokenizer, about = starting_model(config, workdir, corpus.train)
    stores = make_stores(config, workdir.artifacts / "tokens", tokenizer, corpus)
    train = stores.conversations("train", corpus.train)
    validation = stores.conversations("validation", corpus.validation)
    exam = set_exam(config, stores, corpus.held_out)
    if config.control.exchanged:
        exchanged = [
            stores.conversations(name, exchange_replies(part, config.seed), derived=True)
            for name, part in (
                ("exchanged", corpus.train),
                ("exchanged_validation", corpus.validation),
            )
        ]

    def trained(name: str, store: TokenStore, validation: TokenStore) -> Decoder:
        model = tune(config, "train", workdir, name, make_start(), store, validation, exam.scorer)
        return as_exported(model)

    before = exam.kept_marks(marks_of(workdir, "start"), make_start)
    model = trained("sft", train, validation)
    after = exam.kept_marks(marks_of(workdir, "sft"), lambda: model)
    control = []
    if config.control.exchanged:
        place = marks_of(workdir, "control")
        control.append(exam.kept_marks(place, lambda: trained("control", *exchanged)))

    export(config, workdir, model, tokenizer)
    report = fine_tuning_report.of_sft(config, exam, before, after, control)
    report.notes += [about, *idle]
    report.kernels = kernels.chosen(model.config, [exam.length])
    titles = {"sft": "sft"} | ({"control": "control"} if control else {})
    fine_tuning_report.finish(report, workdir, titles, stores, quarantine)
    return report


def evaluate(config, workdir: Workdir) -> Report:
    """`--eval_only`: the exam again, with the exported checkpoint; on other data where the config
    says so, and nothing of the training is touched."""
    model = exported(config, workdir)
    with tempfile.TemporaryDirectory() as folder:
        place = workdir.artifacts / EVALUATION_QUARANTINE
        quarantine = Quarantine(place, writer=workdir.is_writer)
        corpus = conversations(config, quarantine)
        make_start, tokenizer, about = starting_model(config, workdir, corpus.train)
        stores = make_stores(config, Path(folder) / "tokens", tokenizer, corpus)
        exam = set_exam(config, stores, corpus.held_out)
        before, after = exam.marks(make_start()), exam.marks(model)
        report = fine_tuning_report.of_sft(config, exam, before, after)
        report.notes.append(about)
        report.kernels = kernels.chosen(model.config, [exam.length])
        fine_tuning_report.add_data(report, workdir, stores, quarantine, EVALUATION_RECORDS)
        return report


# ---------------------------------------------------------------- 1. conversations


def conversations(config, quarantine: Quarantine) -> Corpus[Conversation]:
    """Those at the config's path, some kept apart; or those of the embedded help desk, whose
    held-out conversations are about facts that the others never state."""
    d = config.data
    if not d.path:
        seed = config.seed << 32
        return Corpus(
            assistant.conversations(seed, d.examples),
            assistant.conversations(seed + d.held_out, d.validation, held_out=True),
            assistant.conversations(seed, d.held_out, held_out=True),
        )
    source = open_records(config, quarantine)
    if isinstance(source[0], PreferencePair):
        raise Refused(
            f"config.data.path={d.path!r} holds preference pairs; it must hold conversations "
            "(configs/dpo.py learns from pairs)"
        )
    return split(source, validation=d.validation, held_out=d.held_out, seed=config.seed)


def open_records(config, quarantine: Quarantine) -> Source:
    """The records at the config's path."""
    d = config.data
    with processes.process_0_first("the records"):
        return checks.naming(
            "config.data.path: ", lambda: open_source(d.path, d.format, quarantine)
        )


# ---------------------------------------------------------------- 2. model


def starting_model(
    config, workdir: Workdir, train: Sequence[Conversation]
) -> tuple[Callable[[], Decoder], Any, str]:
    """(a function that makes the model anew, because training uses it up; its tokenizer; in one
    line, which is printed too, what model it is)."""

    def words() -> Iterator[str]:
        for conversation in itertools.islice(train, TOKENIZER_CONVERSATIONS):
            yield from (message.content for message in conversation.messages)

    def make() -> tuple[Decoder, Any]:
        return starting_decoder(config, workdir.artifacts / "tokenizer", words, config.batch.width)

    model, tokenizer = make()
    positions = model.config.max_positions
    if config.batch.width > positions:
        raise Refused(
            f"config.batch.width={config.batch.width}; the model at config.model.path has "
            f"{positions} positions"
        )
    if workdir.is_writer:
        workdir.refuse_small_scratch(stored_bytes(model))
    about = described(model, config.model.path)
    processes.say(about)
    first = [model]
    return lambda: first.pop() if first else make()[0], tokenizer, about


def described(model: Decoder, path: str) -> str:
    """One line on a model: the checkpoint that it is of, "" for none, and its sizes."""
    c = model.config
    parameters = sum(leaf.size for leaf in jax.tree.leaves(model))
    return (
        f"model: {path or 'from scratch'}, {parameters:,} parameters ({c.num_layers} layers, "
        f"width {c.embed_dim}, vocabulary {c.vocab_size:,}, context {c.max_positions:,})"
    )


# ---------------------------------------------------------------- 3. tokens and exam


def make_stores(config, folder: Path, tokenizer, corpus: Corpus) -> Stores:
    return Stores(
        folder,
        take_apart(tokenizer, needs_system=False),
        max_length=config.batch.width,
        policy=config.data.too_long,
        made_of=corpus.made_of,
        watch=partial(interrupt.stop_if_requested, "tokenising"),
    )


def set_exam(config, stores: Stores, held_out: Sequence[Conversation]) -> Exam:
    """Held-out conversations; each last reply against that of another conversation, in its place;
    and the prompts before those replies."""
    exchanges = [last_exchange(conversation) for conversation in held_out]
    others = [reply for _, reply in [*exchanges[1:], exchanges[0]]]
    choice = [
        PreferencePair(conversation.id, prompt, (own,), (other,), conversation.meta)
        for conversation, (prompt, own), other in zip(held_out, exchanges, others, strict=True)
    ]
    return exam_of(
        config,
        stores,
        {
            "held_out": stores.conversations("held_out", held_out),
            "choice": stores.pairs("choice", choice, derived=True),
        },
        held_out,
        [prompt for prompt, _ in exchanges[: config.samples.prompts]],
        {} if config.data.path else {"correct": assistant.is_correct},
    )


def exam_of(
    config,
    stores: Stores,
    held_out: dict[str, TokenStore],
    records: Sequence[Conversation | PreferencePair],
    prompts,
    judges,
) -> Exam:
    """An exam with the config's sizes and sampling on held-out `records`."""
    device_groups(config.samples.tensor, jax.local_devices(), "samples.tensor")  # or refuses
    return Exam(
        stores=held_out,
        units=[opening(r) if config.data.path else r.id for r in records],
        prompts=prompts,
        judges=judges,
        template=stores.template,
        scorer=Scorer(
            training_mesh(config, config.batch.rows),
            rows=config.batch.rows,
            width=config.batch.width,
        ),
        length=config.batch.width,
        max_tokens=config.samples.max_tokens,
        temperature=config.samples.temperature,
        seed=config.seed,
        tools=[definitions(record) for record in records[: config.samples.prompts]],
        tensor=config.samples.tensor,
    )


def marks_of(workdir: Workdir, name: str) -> Path:
    """Where the marks of a model are kept."""
    return workdir.artifacts / "marks" / f"{name}.json"


# ---------------------------------------------------------------- 4. training


def tune(
    config,
    stage: str,
    workdir: Workdir,
    name: str,
    start: Decoder,
    store: TokenStore,
    validation: TokenStore,
    scorer: Scorer,
) -> Decoder:
    """Fine-tunes `start`, which it uses up, as the section `stage` says."""

    def evaluate(trained, resting) -> dict[str, float]:
        logprob, tokens = scorer(trained, resting, validation)
        return {"nll": -logprob.sum() / tokens.sum()}

    outcome, resting = fine_tuning.fit(
        config,
        stage,
        workdir,
        name,
        start,
        store,
        objective=sft_objective,
        finish=finish_metrics,
        evaluate=evaluate,
        best="nll",
        headline=("nll",),
        evaluated=int(validation.lengths.sum()),
    )
    return kept(workdir, name, outcome.model, resting, base=config.model.path)


def kept(
    workdir: Workdir, name: str, trained: Any, resting: Decoder | None, *, base: str
) -> Decoder:
    """The model that came out of a stage; an adapter is also kept by itself, as PEFT reads it, for
    the checkpoint `base`: one over random weights that nobody has would be of no use."""
    if resting is not None and base:
        folder = workdir.artifacts / f"adapter_{name}"
        if not processes.of_process_0("is the adapter there", folder.is_dir):
            save_adapter(trained, folder, base_name=base_name(base))
    return merged(trained, resting)


def base_name(path: str) -> str:
    """How an adapter names its base: a hub id as it is, a folder so that it is found from any
    working directory."""
    folder = Path(path).expanduser()
    return str(folder.resolve()) if folder.is_dir() else path


def as_exported(model: Decoder) -> Decoder:
    """The model with its weights rounded to what its checkpoint holds: what is exported is what is
    measured, and an update too small for the checkpoint's type does not count."""
    dtype = model.config.stored_dtype
    return jax.tree.map(lambda x: x.astype(dtype).astype(x.dtype), model)


# ---------------------------------------------------------------- 5. export


def export(config, workdir: Workdir, model: Decoder, tokenizer) -> None:
    """Writes a Hugging Face folder whose `generate` stops where the training turns ended."""

    def there() -> bool:
        workdir.fetch_export()
        return (workdir.export / "config.json").is_file()

    if not processes.of_process_0("is the export there", there):
        end = take_apart(tokenizer, needs_system=False).end
        ends = dict.fromkeys((end, *model.config.eos_token_ids))
        kept = hf.generation_config(config.model.path) if config.model.path else {}
        generation = kept | {"eos_token_id": list(ends)}
        hf.save_pretrained(model, tokenizer, workdir.export, generation=generation)


def exported(config, workdir: Workdir) -> Decoder:
    workdir.fetch_export()
    if not (workdir.export / "config.json").is_file():
        raise Refused(f"{workdir.export} holds no export; train first")
    return load_decoder(workdir.export, config)[0]


# ---------------------------------------------------------------- before there is a model


def planned(config, devices: Sequence[jax.Device]) -> list[Planned]:
    """The training of a run on these devices, its arguments shapes alone."""
    decoder = architecture(config, config.batch.width)
    update = fine_tuning.planned_update(config, "train", decoder, devices, objective=sft_objective)
    return [update, *planned_replies(config, decoder, devices, update.mesh)]
