"""What a self-play run shows besides its cross-play: curves, transcripts, cost and a model card."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxconv.evals import performance
from jaxconv.evals.report import Report, escape, learning_curves, side_by_side
from jaxconv.rollout.selfplay import Played
from jaxconv.train import atomic, metrics
from jaxconv.train.workdir import Workdir

READING = """`gain/*`, `payoff`, `deal` and `dimension/*` are differences: the trained model in one
seat and its frozen start in all others, minus the frozen start in every seat, on the same episodes.
`versus/*` (scripts that training has met) and `transfer/*` (scripts that it has not) are the
trained model minus its frozen start against that script. `null/*` is the frozen game against itself
sampled anew, `sharper/*` the frozen model at a lower temperature and `script/*` a script in the
trained model's place. `invalid/*` and `deal_rate/*` are rates. Intervals are over episodes of one
training run.
"""


def add_training(report: Report, workdir: Workdir) -> None:
    """How to read the numbers, learning curves as a picture, the speed of the run's later half."""
    report.sections = {"How to read these numbers": READING, **report.sections}
    warm = metrics.read(workdir, "warm_start")
    play = metrics.read(workdir, "self_play")

    def curve(records: Sequence[Mapping[str, Any]], name: str):
        points = [(r["step"], r[name]) for r in records if r.get(name) is not None]
        return [x for x, _ in points], [y for _, y in points]

    panels = {}
    if warm:
        panels["warm start, nats a token"] = {
            "training": curve(warm, "nll"),
            "held out": curve(warm, "held_out/nll"),
        }
    if play:
        panels |= {
            "overall score in self-play": {"score": curve(play, "score/mean")},
            "share of games": {
                "deal": curve(play, "end/deal"),
                "invalid turns": curve(play, "turn/invalid"),
            },
            "dimensions": {
                name.removeprefix("dimension/"): curve(play, name)
                for name in play[-1]
                if name.startswith("dimension/")
            },
            "policy": {
                "entropy, nats a token": curve(play, "policy/entropy"),
                "KL to the warm start, nats a token": curve(play, "policy/kl_ref"),
            },
            "critic, explained variance of returns": {
                "each token": curve(play, "critic/explained_variance"),
                "first token of turns": curve(play, "critic/explained_variance_turn"),
            },
        }
    report.perf |= performance.of_updates(warm, "warm_start") | performance.of_iterations(play)
    if panels and workdir.is_writer:
        learning_curves(workdir.path / "curves.png", panels)
        report.plots["Learning curves"] = "curves.png"


def add_transcripts(
    report: Report, before: Sequence[Played], after: Sequence[Played], count: int = 3
) -> None:
    """The first games of two policies on the same episodes, side by side."""
    parts = []
    for one, two in list(zip(before, after, strict=True))[:count]:
        briefs = "\n".join(f"- {escape(brief)}" for brief in one.brief)
        parts.append(
            f"{briefs}\n\n"
            + side_by_side(
                (f"before ({_outcome(one)})", f"after ({_outcome(two)})"),
                [[(g.agents[seat], text) for seat, text in g.transcript] for g in (one, two)],
            )
        )
    report.sections["Transcripts, before and after self-play"] = "\n".join(parts)


def _outcome(game: Played) -> str:
    scores = ", ".join(
        f"{agent} {info['overall']:.2f}"
        for agent, info in zip(game.agents, game.infos, strict=True)
        if "overall" in info
    )
    return f"{game.infos[0].get('end', 'cut')}; score {scores}"


def write_model_card(workdir: Workdir, config, report: Report) -> None:
    """`export/README.md`: what the checkpoint is, how it was made, what was measured."""
    if not workdir.is_writer:
        return
    shown = ("gain/", "transfer/", "dimension/", "invalid/", "null/", "sharper/", "script/")
    rows = "".join(
        f"| {escape(name)} | {estimate} |\n"
        for name, estimate in (report.results | report.baselines).items()
        if name.startswith(shown)
    )
    notes = "".join(f"- {escape(note)}\n" for note in report.notes)
    base = escape(config.model.path) or "none: trained from random weights"
    text = f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [jaxconv, omar, self-play]
---

# A conversational model trained by self-play

One model spoke for every agent of multi-turn conversations and learned from how they ended (OMAR,
arXiv 2602.03109; PPO with turn-level and token-level advantages).

- Base model: {base}
- World: {config.env.name}, {", ".join(map(str, config.env.players))} agents, kinds
  {", ".join(config.env.kinds)}
- Recipe: `{config.recipe}`, seed {config.seed}, {config.self_play.iterations} iterations of
  {config.self_play.games} games
- `value_head.safetensors` holds the critic; generation does not need it.

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("path/to/export")
model = AutoModelForCausalLM.from_pretrained("path/to/export")
messages = [
    {{"role": "system", "content": "You are Ann, ..."}},
    {{"role": "user", "content": "Bob: I would like two books."}},
]
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
)
said = model.generate(**inputs)[0, inputs["input_ids"].shape[1] :]
print(tokenizer.decode(said, skip_special_tokens=True))
```

The system message is the agent's brief, user messages are what the others say ("Bob: ..."), the
assistant speaks for the agent. Sampled at temperature {config.rollout.temperature} in all
measurements.

## Measured

| what | value, 95 % interval |
| --- | --- |
{rows}
{notes}
{READING}
Scores come from a deterministic evaluator of a synthetic world; they say nothing about people. The
model was trained to bargain and may mislead, refuse or repeat itself.
"""
    atomic.write_text(workdir.export / "README.md", text)
