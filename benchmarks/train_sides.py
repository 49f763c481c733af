"""The two sides of `train_vs_peers.py`: each does the updates of a `Case`, a round a call."""

from pathlib import Path

import jax
import numpy as np
from train_cases import ROWS, Case

from jaxconv.data import token_store
from jaxconv.data.batches import Assembler, Share
from jaxconv.data.loader import Loader
from jaxconv.models.decoder import Decoder
from jaxconv.objectives import dpo, sft
from jaxconv.train.likelihood import DPOObjective, Scorer, sft_objective
from jaxconv.train.mesh import data_mesh, replicate
from jaxconv.train.optimizer import make_optimizer, make_schedule
from jaxconv.train.state import TrainState
from jaxconv.train.supervised import Supervised
from jaxconv.train.update import make_update

LEARNING_RATE, B2, WEIGHT_DECAY, CLIP_NORM, BETA = 1e-3, 0.95, 0.01, 1.0, 0.5


# ---------------------------------------------------------------- our side


class Ours:
    """The step of `fine_tuning.fit`, `updates` of them a call; every call starts with no batch."""

    def __init__(self, case: Case, pack: bool):
        store = token_store.load(case.store)
        self.placements = case.placements(pack)
        packing = self.placements[0].packing
        rows = next(n for n in range(min(ROWS, packing.rows), 0, -1) if packing.rows % n == 0)
        mesh = data_mesh(rows)
        model = Decoder(case.config, jax.random.key(0))
        objective, finish, reference = sft_objective, sft.finish_metrics, None
        if case.method == "dpo":
            objective, finish = DPOObjective(BETA, "sigmoid"), dpo.finish_metrics
            score = Scorer(mesh, rows=rows, width=packing.width)
            reference = score(replicate(model, mesh), None, store)[0].astype(np.float32)
        optimizer = make_optimizer(
            make_schedule(LEARNING_RATE, kind="constant", steps=case.updates, warmup=0),
            b2=B2,
            weight_decay=WEIGHT_DECAY,
            clip_norm=CLIP_NORM,
        )
        self.state = replicate(TrainState.create(model, optimizer), mesh)
        self.loader = Loader(
            self.placements, Assembler(store, Share(rows), seed=0, reference=reference)
        )
        self.work = Supervised(
            make_update(objective, optimizer, mesh),
            finish,
            self.loader,
            mesh,
            constants=(None,),
            evaluate=lambda trained: {},
            evaluated=0,
            flops=lambda lengths: 0.0,
            rates=np.full(case.updates, LEARNING_RATE),
        )
        self.loss = "loss" if case.method == "dpo" else "nll"

    def __call__(self) -> list[tuple[float, float]]:
        """(loss, gradient norm) of every update, each read when the next one is under way."""
        pending = []
        self.loader.seek(self.placements[0].first)
        numbers = []
        for done in range(len(self.placements)):
            self.state, step = self.work.step(self.state, done, lambda: None)
            pending.append(step.metrics)
            if done:
                numbers.append(jax.device_get(pending.pop(0)))
        numbers.append(jax.device_get(pending.pop()))
        jax.block_until_ready(self.state)
        return [(float(n[self.loss]), float(n["gradient_norm"])) for n in numbers]


# ---------------------------------------------------------------- the peers


class Peer:
    """The updates of a round in torch.

    Args:
        case: what to do.
        pack: the examples are those of our packed updates.
        width: every stream is padded to it; None pads to the longest of the batch.
        folder: of the weights.
    """

    def __init__(self, case: Case, pack: bool, width: int | None, folder: Path):
        import torch
        from transformers import AutoModelForCausalLM

        self.torch = torch
        self.records = [placement.records.tolist() for placement in case.placements(pack)]
        self.model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="sdpa"
        ).train()
        weights = list(self.model.parameters())
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [w for w in weights if w.ndim > 1]},
                {"params": [w for w in weights if w.ndim == 1], "weight_decay": 0.0},
            ],
            lr=LEARNING_RATE,
            betas=(0.9, B2),
            weight_decay=WEIGHT_DECAY,
            fused=True,
        )
        make = {"sft": sft_step, "dpo": dpo_step}[case.method]
        self.step = make(self.model, case, width, folder)

    def __call__(self) -> list[tuple[float, float]]:
        """(loss, gradient norm) of every update."""
        numbers = []
        for records in self.records:
            loss = self.step(records)
            norm = self.torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP_NORM)
            self.optimizer.step()
            self.optimizer.zero_grad()
            numbers.append((loss.item(), norm.item()))
        return numbers


def sft_step(model, case: Case, width: int | None, folder: Path):
    """A function of examples: batch, loss and gradients of plain SFT with transformers."""
    import torch

    store = token_store.load(case.store)
    examples = []
    for i in range(len(store)):
        (stream,) = store[i]
        tokens = torch.tensor(stream.tokens, dtype=torch.long)
        examples.append((tokens, tokens.masked_fill(~torch.tensor(stream.mask), -100)))

    def padded(streams, fill: int) -> torch.Tensor:
        longest = max(len(stream) for stream in streams) if width is None else width
        out = torch.full((len(streams), longest), fill)
        for row, stream in zip(out, streams, strict=True):
            row[: len(stream)] = stream
        return out

    def step(records: list[int]) -> torch.Tensor:
        tokens, labels = zip(*(examples[i] for i in records), strict=True)
        loss = model(
            input_ids=padded(tokens, 0),
            attention_mask=padded([torch.ones_like(t) for t in tokens], 0),
            labels=padded(labels, -100),
            use_cache=False,
        ).loss
        loss.backward()
        return loss.detach()

    return step


def dpo_step(model, case: Case, width: int | None, folder: Path):
    """A function of pairs: TRL's collator and its `training_step`."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer

    class OfTokens(DPOTrainer):
        """Takes examples that are in tokens already."""

        def _prepare_dataset(self, dataset, *_):
            return dataset

    store = token_store.load(case.store)

    def of(i: int) -> dict[str, list[int]]:
        chosen, rejected = store[i]
        prompt = int(np.flatnonzero(chosen.mask)[0])
        parts = chosen.tokens[:prompt], chosen.tokens[prompt:], rejected.tokens[prompt:]
        names = ("prompt_ids", "chosen_ids", "rejected_ids")
        return dict(zip(names, (part.tolist() for part in parts), strict=True))

    trainer = OfTokens(
        model,
        args=DPOConfig(
            output_dir=str(folder / "trl"),
            beta=BETA,
            per_device_train_batch_size=case.examples,
            precompute_ref_log_probs=True,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            max_length=None,
            pad_to_multiple_of=width,
            report_to=[],
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list([of(i) for i in range(len(store))]),
        processing_class=PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(models.WordLevel({"<pad>": 0}, "<pad>")), pad_token="<pad>"
        ),
    )
    trainer.current_gradient_accumulation_steps = 1  # which `train` would set
    examples = trainer.train_dataset.to_list()

    def step(records: list[int]):
        return trainer.training_step(model, trainer.data_collator([examples[i] for i in records]))

    return step
