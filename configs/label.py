"""Labels conversations with a task that a small file describes (docs/llm.md).

tiny   embedded conversations, an embedded task, and rules in the place of a model: seconds.

With config.data.path and config.llm.base_url (or config.llm.model) it labels yours by a language
model, with the task in config.label.task.
"""

from ml_collections import ConfigDict

from jaxconv.llm.section import llm_section

PRESETS = ("tiny",)


def get_config(preset: str = "tiny") -> ConfigDict:
    config = ConfigDict()
    config.recipe = "label"
    config.seed = 0

    config.data = ConfigDict()
    config.data.path = ""  # a file or a folder of files; "" is the embedded help desk
    config.data.format = "auto"
    config.data.examples = 400  # of the help desk

    config.label = ConfigDict()
    config.label.task = ""  # a .yaml or .py file; "" is satisfaction (help desk: what is asked)
    config.label.field = ""  # of the output, to compare; "" is its only label
    config.label.gold = ""  # the key of meta that has the right label, if there is one

    config.llm = llm_section()
    return config
