"""LoRA adapters in the format of Hugging Face's PEFT: folders that `peft` reads and writes."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from jaxconv import processes
from jaxconv.durable import standing, whole_folder
from jaxconv.errors import Refused
from jaxconv.models.config import DecoderConfig
from jaxconv.models.hf import check_tensors, checkpoint_tensors, read_weights
from jaxconv.models.lora import TARGETS, Adapter, LoraConfig
from jaxconv.models.safetensors_io import (
    TensorFiles,
    make_tensors,
    read_json,
    save_tensors,
    write_json,
)

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

_TENSOR = re.compile(r"base_model\.model\.model\.layers\.\d+\.\w+\.(\w+)\.lora_[AB]\.weight")
_READ = ("peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules")
# Entries that change nothing in the function computed: how the first values were found, where the
# adapter came from, which modules have one (the tensors say that) and settings of absent features.
_WITHOUT_EFFECT = (
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "loftq_config",
    "lora_ga_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
)
# The only values that are supported of entries which are set even where they ask for nothing.
# Other initial values (PiSSA, OLoRA, LoftQ) change the base as well.
_SUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "task_type": ("CAUSAL_LM", None),
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
}


def save_adapter(adapter: Adapter, folder: str | os.PathLike[str], *, base_name: str) -> None:
    """Writes a folder that `peft.PeftModel.from_pretrained` loads; tensors are float32.

    The folder appears whole or not at all.

    Args:
        adapter: the low-rank weights.
        folder: where; it must be new, empty or an older adapter.
        base_name: folder or hub id of the base model, for whoever loads the adapter.

    Raises:
        Refused: the folder holds something else.
        Failed: it could not be written (a full disk); nothing half-written is left.
    """
    lora = adapter.config
    alpha = float(lora.alpha)
    config = {
        "alpha_pattern": {},
        "base_model_name_or_path": base_name,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "lora_dropout": lora.dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": lora.rank,
        "rank_pattern": {},
        "target_modules": list(lora.targets),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": lora.rslora,
    }
    tensors = checkpoint_tensors(adapter, "float32")
    if processes.index() > 0:
        make_tensors(tensors)
        return processes.barrier("adapter")
    with whole_folder(Path(folder), marker=CONFIG) as partial:
        write_json(partial / CONFIG, config)
        save_tensors(tensors, partial / WEIGHTS)
    processes.barrier("adapter")


def load_adapter(folder: str | os.PathLike[str], decoder_config: DecoderConfig) -> Adapter:
    """An adapter that `save_adapter` or `peft` wrote, for a base of this architecture.

    Its targets come in the order of `lora.TARGETS`, its weights in float32.

    Raises:
        Refused: a file is missing or damaged, an entry of the config asks for something that is not
            computed here, or a tensor is missing, unexpected or of another shape than the config
            and the base say.
    """
    folder = standing(Path(folder).expanduser())
    config = read_json(folder / CONFIG)
    _refuse_unsupported(config, folder / CONFIG)
    if not (folder / WEIGHTS).is_file():
        raise Refused(f"{folder / WEIGHTS} is missing; adapters must be safetensors")
    files = TensorFiles([folder / WEIGHTS])
    lora = _read_config(config, files, folder / CONFIG)
    abstract = jax.eval_shape(lambda: Adapter(decoder_config, lora, jax.random.key(0)))
    check_tensors(files, abstract, folder, source=f"{CONFIG} with this base")
    return read_weights(abstract, files, None)


def _refuse_unsupported(config: Mapping[str, Any], path: Path) -> None:
    if config.get("peft_type") != "LORA":
        raise Refused(f"{path}: peft_type is {config.get('peft_type')!r}; supported: 'LORA'")
    for key, value in config.items():
        if key in _READ or key in _WITHOUT_EFFECT:
            continue
        if key in _SUPPORTED:
            if value not in _SUPPORTED[key]:
                known = ", ".join(map(repr, _SUPPORTED[key]))
                raise Refused(f"{path}: {key} is {value!r}; supported: {known}")
        elif value:  # later versions may add features; what they leave off is null, false or empty
            raise Refused(f"{path}: {key} is {value!r}; supported: absent, null or false")


def _read_config(config: Mapping[str, Any], files: TensorFiles, path: Path) -> LoraConfig:
    for key, default in (("lora_alpha", None), ("lora_dropout", 0.0)):
        value = config.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise Refused(f"{path}: {key} is {value!r}; it must be a number")
    # `target_modules` may be short names, full paths or one pattern; the tensors name the modules.
    listed = config.get("target_modules")
    names = {name.rsplit(".", 1)[-1] for name in listed} if isinstance(listed, list) else set()
    names |= {found[1] for found in map(_TENSOR.fullmatch, files.shapes) if found}
    known = [target for target in TARGETS if target in names]
    try:
        return LoraConfig(
            rank=config.get("r"),
            alpha=float(config["lora_alpha"]),
            targets=(*known, *sorted(names - set(known))),
            dropout=float(config.get("lora_dropout", 0.0)),
            rslora=bool(config.get("use_rslora", False)),
        )
    except Refused as error:
        raise Refused(f"{path}: {error}") from error
