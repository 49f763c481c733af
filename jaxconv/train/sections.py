"""Config sections that fine-tuning recipes share; `fine_tuning` reads them."""

from ml_collections import ConfigDict


def stage_config(**changed) -> ConfigDict:
    """The section of a stage, with `changed` values."""
    stage = ConfigDict()
    stage.epochs = 1  # passes over the examples, where steps is 0
    stage.steps = 0  # updates
    stage.learning_rate = 1e-3
    stage.schedule = "cosine"  # to a tenth; or "linear" (to 0), "constant"
    stage.warmup = 20  # updates; at most a tenth of all
    stage.optimizer = "adamw"  # or "adafactor", "muon"
    stage.b2 = 0.95
    stage.weight_decay = 0.01
    stage.clip_norm = 1.0
    stage.ema_decay = 0.0  # above 0 the averaged weights are evaluated and exported
    stage.evaluate_every = 100  # updates
    stage.keep_best = True  # the weights with the best held-out number come out, not the last ones
    stage.update(changed)
    return stage


def shared_sections(config: ConfigDict) -> None:
    """Adds the sections that every stage of a config reads, sized for a laptop."""
    config.model = model_section(vocab_size=640, num_heads=4)
    config.lora = lora_section()

    config.batch = ConfigDict()  # of an update: rows x microbatches packed rows
    config.batch.rows = 8
    config.batch.microbatches = 2
    config.batch.width = 256  # tokens a row; also the longest example
    config.batch.packing = True  # False gives each example a row of its own

    config.mesh = mesh_section()

    config.checkpoint = ConfigDict()
    config.checkpoint.every = 100  # updates
    config.checkpoint.keep = 2

    config.profile = ConfigDict()
    config.profile.steps = ""  # "10:12" traces updates 10 and 11


CHECKPOINTS = {
    "qwen2.5_0.5b": "Qwen/Qwen2.5-0.5B-Instruct",
    "qwen2.5_7b": "Qwen/Qwen2.5-7B-Instruct",
    "qwen3_4b": "Qwen/Qwen3-4B",
    "llama3.1_8b": "meta-llama/Llama-3.1-8B-Instruct",
    "llama3.1_70b": "meta-llama/Llama-3.1-70B-Instruct",
}
"""Checkpoints by the part of a preset's name that names one."""


def checkpoint(config: ConfigDict, name: str) -> None:
    """A real checkpoint, executed as accelerators like it."""
    config.model.path = CHECKPOINTS[name]
    config.model.dtype = "bfloat16"
    config.model.remat = "full"
    if name.startswith("llama3.1"):
        config.model.pad_token = "<|finetune_right_pad_id|>"  # its tokenizer names none


def real_model(config: ConfigDict, preset: str) -> None:
    """A checkpoint and batches for one accelerator, or for the slice that `docs/topologies.md`
    names; of `_lora` an adapter is trained."""
    name = preset.removesuffix("_lora")
    checkpoint(config, name)
    config.batch.width = 4096
    config.train.b2 = 0.99
    config.samples.prompts = 64
    config.samples.max_tokens = 512
    if preset == "qwen2.5_0.5b":
        config.batch.rows = 4
        config.batch.microbatches = 8
    elif preset.endswith("_lora"):
        config.lora.rank = 16
        config.lora.alpha = 32.0
        config.batch.rows = 1
        config.batch.microbatches = 32
    else:
        config.mesh.strategy = "fsdp"
        config.samples.tensor = 4  # the chips of a host
        config.batch.rows = 64 if name == "llama3.1_70b" else 32
        config.batch.microbatches = 2


def model_section(*, vocab_size: int, num_heads: int) -> ConfigDict:
    """A checkpoint, or a small model from scratch."""
    model = ConfigDict()
    model.path = ""  # a Hugging Face folder or hub id; "" makes the model below from scratch
    model.pad_token = ""  # for a checkpoint whose tokenizer has none: a token of its own
    model.family = "llama"
    model.vocab_size = vocab_size
    model.embed_dim = 64
    model.num_layers = 2
    model.num_heads = num_heads
    model.num_kv_heads = num_heads
    model.mlp_dim = 192
    model.dtype = "float32"  # of the computation; master weights are float32
    model.remat = "none"  # "none", "dots" or "full"
    model.kernels = "auto"  # of attention and sampling: the platform's own, or "xla", "tpu", "gpu"
    return model


def mesh_section() -> ConfigDict:
    """How training lies on the devices."""
    mesh = ConfigDict()
    mesh.strategy = "ddp"  # every device has the model; "fsdp" and "fsdp_tp" split it
    mesh.data = 1  # copies of a split model; ddp takes as many devices as divide the rows
    mesh.tensor = 1  # devices that split heads, MLP and vocabulary, with fsdp_tp
    return mesh


def lora_section() -> ConfigDict:
    """An adapter is trained, and the model rests."""
    lora = ConfigDict()
    lora.rank = 0  # 0 trains the whole model
    lora.alpha = 16.0
    lora.targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    lora.dropout = 0.0
    lora.rslora = False  # scale by alpha / sqrt(rank)
    return lora
