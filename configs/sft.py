"""Supervised fine-tuning on conversations.

tiny           a small model from scratch on the embedded help desk: minutes on a laptop CPU.
qwen2.5_0.5b   a real checkpoint on your conversations (config.data.path): one accelerator of 24 GB.
qwen2.5_7b_lora   an adapter (LoRA) on a 7 B checkpoint: one accelerator of 80 GB.
qwen2.5_7b, qwen3_4b, llama3.1_8b, llama3.1_70b
               all weights of a checkpoint, split over a slice: docs/topologies.md says which one.
"""

from ml_collections import ConfigDict

from jaxconv.train.sections import real_model, shared_sections, stage_config

PRESETS = (
    "tiny",
    "qwen2.5_0.5b",
    "qwen2.5_7b",
    "qwen2.5_7b_lora",
    "qwen3_4b",
    "llama3.1_8b",
    "llama3.1_70b",
)


def get_config(preset: str = "tiny") -> ConfigDict:
    config = ConfigDict()
    config.recipe = "sft"
    config.seed = 0

    config.data = ConfigDict()
    config.data.path = ""  # a file, a folder of files or a prepared data set; "" is the help desk
    config.data.format = "auto"
    config.data.examples = 16000  # of the help desk
    config.data.held_out = 512  # conversations that training never sees
    config.data.validation = 256  # others, which pick the weights that are kept
    config.data.too_long = "truncate_left"  # or "split", "leave_out", "refuse"

    shared_sections(config)
    config.train = stage_config(epochs=2, learning_rate=4e-3, warmup=30)

    config.samples = ConfigDict()
    config.samples.prompts = 512  # held-out prompts to reply to, before and after
    config.samples.max_tokens = 48
    config.samples.temperature = 0.0  # takes the likeliest token
    config.samples.tensor = 1  # devices that share the weights, each with some of the heads

    config.control = ConfigDict()
    config.control.exchanged = True  # trains a second model on exchanged replies

    if preset != "tiny":
        config.data.path = "your_conversations.jsonl"
        real_model(config, preset)
        config.train.epochs = 2
        config.train.learning_rate = 1e-5
        config.train.weight_decay = 0.0
        config.control.exchanged = False
    if preset.endswith("_lora"):
        config.train.learning_rate = 2e-4
    return config
