"""Preference optimisation (Rafailov et al. 2023, arXiv 2305.18290): of two replies, say the better.

1. Pairs: a file or a prepared data set, or those of the embedded help desk, whose chosen replies
   have a style that the rejected ones lack; some pairs are kept apart.
2. A start: a checkpoint, or a small model from scratch, fine-tuned first where the config says so.
3. The log-probs of every reply under the start, the reference: once beforehand, or at every update.
4. Packed rows with both replies of a pair side by side, one loop.
5. Pair accuracy, margins and sampled replies before and after on the pairs kept apart, and a
   control that learns from the same pairs with shuffled labels.
6. A Hugging Face checkpoint, and a report.
"""

import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import jax
import numpy as np

from jaxconv import processes
from jaxconv.data.conversation import Conversation, PreferencePair
from jaxconv.data.corpus import Corpus, View, chosen_conversation, shuffle_labels, split
from jaxconv.data.quarantine import Quarantine
from jaxconv.data.stores import Stores
from jaxconv.data.synthetic import assistant
from jaxconv.data.token_store import TokenStore
from jaxconv.durable import publish
from jaxconv.errors import Refused
from jaxconv.evals import fine_tuning_report
from jaxconv.evals.exam import Exam, Scores, wins
from jaxconv.evals.report import Report
from jaxconv.models import hf, kernels
from jaxconv.models.config import DecoderConfig
from jaxconv.models.decoder import Decoder
from jaxconv.objectives.dpo import KINDS, REFERENCE_FREE, dpo_loss, finish_metrics
from jaxconv.perf.planned import Planned
from jaxconv.recipes import sft
from jaxconv.rollout.planned import planned_replies
from jaxconv.train import checks, fine_tuning, interrupt
from jaxconv.train.likelihood import DPOObjective, Scorer
from jaxconv.train.mesh import tell_of_idle_devices
from jaxconv.train.starting_point import architecture, load_decoder, run_as
from jaxconv.train.workdir import Workdir

REFERENCES = ("precomputed", "live")
START = "start"  # folder of the fine-tuned start


def check(config) -> None:
    """Refuses what cannot work, before any work is done."""
    sft.check_data(config)
    stages = ("sft", "train") if config.sft.epochs or config.sft.steps else ("train",)
    fine_tuning.check(config, *stages)
    checks.one_of(config, {"dpo.kind": KINDS, "dpo.reference": REFERENCES})
    if config.dpo.kind.startswith("aot"):
        raise Refused(
            f"config.dpo.kind={config.dpo.kind!r} sorts the pairs of a whole batch, and an update "
            "cuts it into micro-batches; it is there for losses of your own"
        )
    checks.positive(config, ("dpo.beta",))
    checks.at_least(config, {"data.pairs": 1, "dpo.sft_weight": 0})
    try:
        # Shapes alone: a computation would settle the devices before the launcher does.
        jax.eval_shape(loss(config), *[jax.ShapeDtypeStruct((1,), np.float32)] * 6)
    except ValueError as error:
        raise Refused(f"config.dpo: {error}") from None
    unknown = sorted(set(config.data.traits) - set(assistant.TRAITS))
    if not config.data.path and (unknown or not config.data.traits):
        raise Refused(
            f"config.data.traits={tuple(config.data.traits)}; "
            f"they may be some of {', '.join(assistant.TRAITS)}"
        )


def run(config, workdir: Workdir) -> Report:
    """Trains, measures, exports and reports."""
    idle = tell_of_idle_devices(config, "batch.rows")
    quarantine = Quarantine(workdir.artifacts / "quarantine.jsonl", writer=workdir.is_writer)
    corpus, talks = preferences(config, quarantine)
    make_model, tokenizer, about = sft.starting_model(config, workdir, talks.train)
    stores = sft.make_stores(config, workdir.artifacts / "tokens", tokenizer, corpus)
    train = stores.pairs("train", corpus.train)
    validation = stores.pairs("validation", corpus.validation)
    exam = set_exam(config, stores, corpus.held_out)
    shuffled = shuffled_stores(config, stores, corpus) if config.control.shuffled else {}

    if config.sft.epochs or config.sft.steps:
        make_model = fine_tuned(config, workdir, make_model, tokenizer, stores, talks, exam.scorer)

    def learned(name: str, pairs: TokenStore, validation: TokenStore) -> Decoder:
        return learn(config, workdir, name, make_model, pairs, validation, exam.scorer, like=train)

    before = exam.kept_marks(sft.marks_of(workdir, "start"), make_model)
    model = learned("dpo", train, validation)
    after = exam.kept_marks(sft.marks_of(workdir, "dpo"), lambda: model)
    control = [
        exam.kept_marks(sft.marks_of(workdir, name), partial(learned, name, *labelled))
        for name, labelled in shuffled.items()
    ]

    sft.export(config, workdir, model, tokenizer)
    report = fine_tuning_report.of_dpo(config, exam, before, after, control)
    report.notes += [about, *idle]
    report.kernels = kernels.chosen(model.config, [exam.length])
    titles = {"sft": "sft", "dpo": "dpo"} | {name: name.replace("_", " ") for name in shuffled}
    fine_tuning_report.finish(report, workdir, titles, stores, quarantine)
    return report


def evaluate(config, workdir: Workdir) -> Report:
    """`--eval_only`: the exam again, with the exported checkpoint; on other data where the config
    says so, and nothing of the training is touched."""
    model = sft.exported(config, workdir)
    with tempfile.TemporaryDirectory() as folder:
        place = workdir.artifacts / sft.EVALUATION_QUARANTINE
        quarantine = Quarantine(place, writer=workdir.is_writer)
        corpus, talks = preferences(config, quarantine)
        make_model, tokenizer, about = sft.starting_model(config, workdir, talks.train)
        stores = sft.make_stores(config, Path(folder) / "tokens", tokenizer, corpus)
        exam = set_exam(config, stores, corpus.held_out)
        if config.sft.epochs or config.sft.steps:
            make_model = kept_start(config, workdir, make_model().config)
        before, after = exam.marks(make_model()), exam.marks(model)
        report = fine_tuning_report.of_dpo(config, exam, before, after)
        report.notes.append(about)
        report.kernels = kernels.chosen(model.config, [exam.length])
        fine_tuning_report.add_data(report, workdir, stores, quarantine, sft.EVALUATION_RECORDS)
        return report


# ---------------------------------------------------------------- 1. pairs


def preferences(
    config, quarantine: Quarantine
) -> tuple[Corpus[PreferencePair], Corpus[Conversation]]:
    """Pairs, and the conversations that the start is fine-tuned on: those of the help desk, which
    has no taste, or the chosen replies of a data set."""
    d = config.data
    if not d.path:
        # Pairs go on where the conversations of fine-tuning end: they share none.
        seed = (config.seed << 32) + d.examples
        made = Corpus(
            assistant.pairs(seed, d.pairs, traits=d.traits),
            assistant.pairs(seed + d.held_out, d.validation, traits=d.traits, held_out=True),
            assistant.pairs(seed, d.held_out, traits=d.traits, held_out=True),
        )
        return made, sft.conversations(config, quarantine)
    source = sft.open_records(config, quarantine)
    if isinstance(source[0], Conversation):
        raise Refused(
            f"config.data.path={d.path!r} holds conversations; it must hold preference pairs "
            "(configs/sft.py learns from conversations)"
        )
    corpus = split(source, validation=d.validation, held_out=d.held_out, seed=config.seed)
    chosen = (
        View(part, range(len(part)), lambda i, part=part: chosen_conversation(part[i]))
        for part in (corpus.train, corpus.validation, corpus.held_out)
    )
    return corpus, Corpus(*chosen, corpus.made_of)


def shuffled_stores(
    config, stores: Stores, corpus: Corpus[PreferencePair]
) -> dict[str, tuple[TokenStore, TokenStore]]:
    """Training and validation pairs of both controls, whose labels are shuffled in opposite ways:
    by stage."""
    return {
        f"control{suffix}": tuple(
            stores.pairs(f"{name}{suffix}", shuffle_labels(part, config.seed, opposite=opposite))
            for name, part in (
                ("shuffled", corpus.train),
                ("shuffled_validation", corpus.validation),
            )
        )
        for suffix, opposite in (("", False), ("_opposite", True))
    }


def set_exam(config, stores: Stores, held_out: Sequence[PreferencePair]) -> Exam:
    """Held-out pairs, and their prompts to reply to."""

    def has_style(prompt, reply: str) -> bool:
        return set(config.data.traits) <= assistant.style(reply)

    return sft.exam_of(
        config,
        stores,
        {"pairs": stores.pairs("held_out", held_out)},
        held_out,
        [pair.prompt for pair in held_out[: config.samples.prompts]],
        {} if config.data.path else {"style": has_style, "correct": assistant.is_correct},
    )


# ---------------------------------------------------------------- 2. start


def fine_tuned(
    config,
    workdir: Workdir,
    make_model,
    tokenizer,
    stores: Stores,
    talks: Corpus,
    scorer: Scorer,
) -> Callable[[], Decoder]:
    """A function that gives the fine-tuned start anew; it is kept in full precision."""
    folder = workdir.artifacts / START
    train = stores.conversations("sft_train", talks.train)
    validation = stores.conversations("sft_validation", talks.validation)
    model = make_model()
    architecture = model.config
    if not processes.of_process_0("is the start there", folder.is_dir):
        start = sft.tune(config, "sft", workdir, "sft", model, train, validation, scorer)
        exact = dataclasses.replace(architecture, stored_dtype="float32")
        hf.save_pretrained(run_as(start, exact), tokenizer, folder)
    return kept_start(config, workdir, architecture)


def kept_start(config, workdir: Workdir, architecture: DecoderConfig) -> Callable[[], Decoder]:
    folder = workdir.artifacts / START
    return lambda: run_as(load_decoder(folder, config)[0], architecture)


# ---------------------------------------------------------------- 3. and 4. training


def loss(config):
    """Maps log-probs (policy chosen, rejected, reference chosen, rejected) and tokens (chosen,
    rejected) to the loss."""

    def of(*logprobs_and_tokens):
        *logprobs, chosen_tokens, rejected_tokens = logprobs_and_tokens
        return dpo_loss(
            *logprobs,
            beta=config.dpo.beta,
            kind=config.dpo.kind,
            label_smoothing=config.dpo.label_smoothing,
            gamma=config.dpo.gamma,
            chosen_tokens=chosen_tokens,
            rejected_tokens=rejected_tokens,
        )

    return of


def objective(config) -> DPOObjective:
    d = config.dpo
    return DPOObjective(d.beta, d.kind, d.label_smoothing, d.gamma, d.sft_weight)


def learn(
    config,
    workdir: Workdir,
    name: str,
    make_start,
    store: TokenStore,
    validation: TokenStore,
    scorer: Scorer,
    *,
    like: TokenStore,
) -> Decoder:
    """Trains the start on pairs; those of `validation` pick the weights that are kept. `like` as
    of `reference_logprobs`."""
    reference, constants = None, ()
    model = make_start()
    if config.dpo.kind not in REFERENCE_FREE:
        if config.dpo.reference == "precomputed":
            reference = reference_logprobs(workdir, name, model, store, scorer, like=like)
        elif not config.lora.rank:
            constants = (make_start(),)  # an adapter's base is the reference by itself

    start = Scores(*scorer(model, None, validation))

    def evaluate(trained, resting) -> dict[str, float]:
        logprob, tokens = scorer(trained, resting, validation)
        columns = [*logprob.T, *start.logprob.T, *tokens.T]
        total, count, _ = loss(config)(*(np.asarray(c, np.float32) for c in columns))
        total += config.dpo.sft_weight * -(logprob[:, 0] / tokens[:, 0]).sum()
        margin = Scores(logprob, tokens).margin - start.margin
        return {
            "loss": float(total) / float(count),
            "accuracy": wins(margin).mean(),
            "margin": config.dpo.beta * margin.mean(),  # as a reward, as training logs it
        }

    outcome, resting = fine_tuning.fit(
        config,
        "train",
        workdir,
        name,
        model,
        store,
        objective=objective(config),
        finish=finish_metrics,
        evaluate=evaluate,
        best="loss",
        headline=("loss", "rewards/accuracy"),
        reference=reference,
        constants=constants,
        evaluated=int(validation.lengths.sum()),
        live_reference=reference is None and config.dpo.kind not in REFERENCE_FREE,
    )
    tuned = config.sft.epochs or config.sft.steps
    base = str(workdir.artifacts / START) if tuned else config.model.path
    return sft.as_exported(sft.kept(workdir, name, outcome.model, resting, base=base))


def reference_logprobs(
    workdir: Workdir,
    name: str,
    start: Decoder,
    store: TokenStore,
    scorer: Scorer,
    *,
    like: TokenStore,
) -> np.ndarray:
    """float32 [n, 2], summed log-probs of both replies of every pair under the start.

    Of a control they are those of `like`, the pairs of the stage "dpo", where its pairs are the
    same but for which reply is the chosen one.
    """
    folder = workdir.artifacts / "tokens"
    path, known = folder / f"reference_{name}.npy", folder / "reference_dpo.npy"
    if not processes.of_process_0("are the references there", path.is_file):
        sides = exchanged(store, like) if known.is_file() else None
        if sides is not None:
            logprob = np.take_along_axis(np.load(known), sides, axis=1)
        else:
            watch = partial(interrupt.stop_if_requested, "scoring pairs under the start")
            logprob, _ = scorer(start, None, store, watch)
        with processes.process_0_first("the references"):
            if processes.index() == 0:
                unfinished = path.with_suffix(".partial.npy")
                np.save(unfinished, logprob.astype(np.float32))
                publish(unfinished, path)
    return np.load(path)


def exchanged(pairs: TokenStore, others: TokenStore) -> np.ndarray | None:
    """int64 [n, 2], which reply of the same pair of `others` each reply is; None where a pair is
    another one."""
    if len(pairs) != len(others):
        return None
    sides = []
    for i in range(len(pairs)):
        ours, theirs = (
            [(stream.tokens.tobytes(), stream.mask.tobytes()) for stream in store[i]]
            for store in (pairs, others)
        )
        if ours not in (theirs, theirs[::-1]):
            return None
        sides.append((0, 1) if ours == theirs else (1, 0))
    return np.array(sides)


# ---------------------------------------------------------------- before there is a model


def planned(config, devices: Sequence[jax.Device]) -> list[Planned]:
    """The training of a run on these devices, its arguments shapes alone."""
    referenced = config.dpo.kind not in REFERENCE_FREE
    live = config.dpo.reference == "live"
    decoder = architecture(config, config.batch.width)
    update = fine_tuning.planned_update(
        config,
        "train",
        decoder,
        devices,
        objective=objective(config),
        scored=referenced and not live,
        live=referenced and live,
    )
    return [update, *planned_replies(config, decoder, devices, update.mesh)]
