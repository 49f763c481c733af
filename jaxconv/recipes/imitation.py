"""The warm start of self-play: imitation of scripted players, every agent's view one example."""

import dataclasses
import json
from collections.abc import Iterator

from jaxconv import processes
from jaxconv.errors import Refused
from jaxconv.models.heads import ActorCritic
from jaxconv.rollout.world import World, scripted_episodes
from jaxconv.train import atomic, warm_start
from jaxconv.train.mesh import training_mesh
from jaxconv.train.optimizer import make_optimizer, make_schedule, rates
from jaxconv.train.starting_point import is_saved, load, run_as, save
from jaxconv.train.trainable import lora_config
from jaxconv.train.workdir import Workdir

WARM_START_SEEDS, HELD_OUT_SEEDS, SELF_PLAY_SEEDS, ARENA_SEEDS = (i << 28 for i in range(4))
"""First seeds of the four parts of a run, which never meet."""


def imitate(config, workdir: Workdir, world: World, start: ActorCritic, tokenizer) -> ActorCritic:
    """Fine-tunes on scripted dialogues, every agent's view one example; the frozen opponent."""
    folder = workdir.artifacts / "warm_start"
    w = config.warm_start
    if processes.of_process_0("is the warm start there", lambda: is_saved(folder)):
        return load(folder, config, world.decoder)
    if w.steps:
        schedule = make_schedule(w.learning_rate, kind="cosine", steps=w.steps, warmup=w.warmup)
        start = warm_start.fit(
            start,
            make_optimizer(
                schedule,
                kind=w.optimizer,
                b2=w.b2,
                weight_decay=w.weight_decay,
                clip_norm=w.clip_norm,
            ),
            examples(config, world, workdir, WARM_START_SEEDS, w.dialogues),
            examples(config, world, workdir, HELD_OUT_SEEDS, w.held_out),
            warm_start.WarmStart(
                steps=w.steps,
                streams=w.streams,
                width=w.width,
                rows=w.rows,
                evaluate_every=w.evaluate_every,
                checkpoint_every=config.checkpoint.warm_start_every,
                keep=config.checkpoint.keep,
                seed=config.seed,
                value_gradient=w.value_gradient,
            ),
            workdir,
            training_mesh(config, w.rows),
            rates=rates(schedule, w.steps),
            lora=lora_config(config),
        )
    # In full precision, whatever the export will have: a resumed run reads it back.
    exact = dataclasses.replace(world.decoder, stored_dtype="float32")
    save(ActorCritic(run_as(start.decoder, exact), start.value_head), tokenizer, folder)
    return start


def examples(
    config, world: World, workdir: Workdir, seeds: int, n: int
) -> list[warm_start.Example]:
    """Every agent's view of scripted dialogues; those longer than a row are left out and counted.

    Raises:
        Refused: none fits.
    """
    width = config.warm_start.width
    out, longer = [], []
    for episode in scripted_episodes(config, seeds, n):
        for agent, view in episode.views.items():
            tokens, own = world.template.render_view(view)
            if len(tokens) > width:
                longer.append(len(tokens))
            elif any(own):
                out.append(warm_start.Example(tokens, own, episode.rewards[agent]))
    if not out:
        raise Refused(
            f"config.warm_start.width={width}; no scripted dialogue fits, "
            f"the longest has {max(longer)} tokens"
        )
    if seeds == WARM_START_SEEDS and workdir.is_writer:
        counts = {"used": len(out), "longer_than_a_row": len(longer), "width": width}
        atomic.write_json(workdir.artifacts / "warm_start_data.json", counts)
    return out


def left_out(workdir: Workdir) -> list[str]:
    """A note when the warm start could not use every dialogue."""
    path = workdir.artifacts / "warm_start_data.json"
    counts = json.loads(path.read_text()) if path.is_file() else {"longer_than_a_row": 0}
    if not counts["longer_than_a_row"]:
        return []
    return [
        f"The warm start left out {counts['longer_than_a_row']} views of dialogues that are longer "
        f"than a row of {counts['width']} tokens, and used {counts['used']}."
    ]


def scripted_words(config) -> Iterator[str]:
    """What a small tokenizer is trained on."""
    dialogues = min(config.warm_start.dialogues, 1000)
    for episode in scripted_episodes(config, WARM_START_SEEDS, dialogues):
        for view in episode.views.values():
            yield from (message.content for message in view)
