"""Satisfaction rubrics from labelled conversations, and how well they estimate it (docs/spur.md).

tiny   embedded conversations, and rules in the place of a model: under a minute.

With config.data.path and config.llm.base_url (or config.llm.model) the rubrics are of your
conversations and by a language model.
"""

from ml_collections import ConfigDict

from jaxconv.llm.section import llm_section

PRESETS = ("tiny",)


def get_config(preset: str = "tiny") -> ConfigDict:
    config = ConfigDict()
    config.recipe = "spur"
    config.seed = 0

    config.data = ConfigDict()
    config.data.path = ""  # a file or a folder of files; "" is the embedded world
    config.data.test_path = ""  # the same, to test on alone; "" tests on what is not learned from
    config.data.format = "auto"  # "rated" for dialogues with the ratings of annotators
    config.data.label = "label"  # the key of meta that tells who is satisfied
    config.data.sat = "sat"  # what it holds where a user is
    config.data.dsat = "dsat"  # and where a user is not
    config.data.neutral = 3.0  # the rating between satisfied and not, of dialogues with ratings
    config.data.domain = "domain"  # the key of meta by which rubrics are moved to other domains
    config.data.language = "language"  # the same of the language, for the report
    config.data.examples = 3000  # of the embedded world; a third is tested on alone
    config.data.noise = 0.15  # how often a cause in it is one of the other side

    config.spur = ConfigDict()
    config.spur.splits = 5
    config.spur.train = 0.15  # of those that are not tested on alone, in each split others
    config.spur.dev = 0.1  # of them, to tune the threshold with
    config.spur.rubric_items = 10  # of a rubric, at most
    config.spur.batch = 100  # patterns that are summarised together
    config.spur.shots = 2  # examples of each label in few-shot prompts

    config.encoder = ConfigDict()
    config.encoder.path = ""  # a folder of sentence-transformers; "" is hashed n-grams
    config.encoder.dim = 0  # numbers of an embedding; 0 is all

    config.control = ConfigDict()
    config.control.shuffles = 5  # repetitions with shuffled labels, each at most a split's calls

    config.llm = llm_section()
    return config
