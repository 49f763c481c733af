"""One module a method. Each has `check(config)` and `run(config, workdir) -> Report`.

`check` raises `jaxconv.errors.Refused` for a config that cannot work. A recipe may also have
`evaluate(config, workdir) -> Report` (served by `--eval_only`) and `chat(config, workdir) -> None`
(served by `--chat`). A config file names its recipe: `config.recipe = "omar"`.
"""
