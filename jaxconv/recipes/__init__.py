"""One module a method. Each has `check(config)` and `run(config, workdir) -> Report`.

`check` raises `jaxconv.errors.Refused` for a config that cannot work. A recipe may also have
`evaluate(config, workdir) -> Report` (served by `--eval_only`) and `chat(config, workdir) -> None`
(served by `--chat`); one that asks language models has `dry_run(config, path) -> list[str]` and
takes `retry_failed` in `run`. A config file names its recipe: `config.recipe = "omar"`.
"""

RECIPES = ("dpo", "label", "omar", "sft", "spur", "tnt_llm")
"""What `config.recipe` may be; other modules here are parts that recipes share."""
