"""Preference optimisation: DPO and its relatives on pairs of replies.

tiny           a small model from scratch, fine-tuned on the embedded help desk, then taught the
               style of the preferred replies: minutes on a laptop CPU.
hh_rlhf        a small model from scratch on pairs in that format (config.data.path): a laptop CPU.
qwen2.5_0.5b   a real checkpoint on your pairs (config.data.path): one accelerator of 24 GB.
qwen2.5_7b_lora   an adapter (LoRA) on a 7 B checkpoint: one accelerator of 80 GB.
qwen2.5_7b, qwen3_4b, llama3.1_8b, llama3.1_70b
               all weights of a checkpoint, split over a slice: docs/topologies.md says which one.
"""

from ml_collections import ConfigDict

from jaxconv.train.sections import real_model, shared_sections, stage_config

PRESETS = (
    "tiny",
    "hh_rlhf",
    "qwen2.5_0.5b",
    "qwen2.5_7b",
    "qwen2.5_7b_lora",
    "qwen3_4b",
    "llama3.1_8b",
    "llama3.1_70b",
)


def get_config(preset: str = "tiny") -> ConfigDict:
    config = ConfigDict()
    config.recipe = "dpo"
    config.seed = 0

    config.data = ConfigDict()
    config.data.path = ""  # a file, a folder of files or a prepared data set; "" is the help desk
    config.data.format = "auto"
    config.data.traits = ("name",)  # of the help desk's replies, what makes one preferred
    config.data.examples = 16000  # conversations of the help desk that the start is made of
    config.data.pairs = 3000  # of the help desk
    config.data.held_out = 512  # pairs that training never sees
    config.data.validation = 256  # others, which pick the weights that are kept
    config.data.too_long = "truncate_left"  # or "leave_out", "refuse"

    shared_sections(config)
    config.sft = stage_config(epochs=2, learning_rate=4e-3, warmup=30)  # epochs=0 leaves it out
    config.train = stage_config(
        epochs=1, learning_rate=1e-4, warmup=10, weight_decay=0.0, evaluate_every=25
    )

    config.dpo = ConfigDict()
    config.dpo.kind = "sigmoid"  # see docs/preferences.md
    config.dpo.beta = 0.5
    config.dpo.label_smoothing = 0.0  # of "sigmoid" (conservative DPO), "robust" and others
    config.dpo.gamma = 0.0  # target margin of "simpo"
    config.dpo.sft_weight = 0.0  # of the chosen reply's likelihood, added to the loss
    config.dpo.reference = "precomputed"  # or "live": a second forward pass in every update

    config.samples = ConfigDict()
    config.samples.prompts = 512  # held-out prompts to reply to, before and after
    config.samples.max_tokens = 48
    config.samples.temperature = 1.0
    config.samples.tensor = 1  # devices that share the weights, each with some of the heads

    config.control = ConfigDict()
    config.control.shuffled = True  # trains two more models, on shuffled labels

    if preset == "hh_rlhf":
        config.data.format = "hh_rlhf"
        config.model.vocab_size = 2048
        config.model.embed_dim = 96
        config.model.mlp_dim = 256
        config.model.num_heads = 3
        config.model.num_kv_heads = 3
        config.batch.width = 512
        config.dpo.beta = 0.1
        config.batch.rows = 4
        config.batch.microbatches = 4
        config.data.held_out = 400
        config.data.validation = 200
        config.sft.epochs = 4
        config.train.epochs = 2
        config.samples.prompts = 16
    elif preset != "tiny":
        config.data.path = "your_pairs.jsonl"
        real_model(config, preset)
        config.dpo.beta = 0.1
        config.sft.learning_rate = 1e-5
        config.sft.epochs = 1
        config.train.learning_rate = 5e-7
        config.control.shuffled = False
        if preset != "qwen2.5_0.5b":
            config.sft.epochs = 0  # the checkpoint follows instructions already
    if preset.endswith("_lora"):
        config.train.learning_rate = 5e-6
        config.dpo.reference = "live"  # the adapter's base, at no memory
    return config
