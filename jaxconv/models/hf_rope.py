"""The rotary entries of a Hugging Face `config.json`, in and out."""

from collections.abc import Mapping
from dataclasses import asdict
from math import log
from typing import Any

from jaxconv.errors import Refused
from jaxconv.models.config import ROPE_KINDS, DecoderConfig, RopeScaling


def read_rope(config: Mapping[str, Any]) -> tuple[float, RopeScaling | None, float | None]:
    """Rotary base, its scaling, and the base of the sliding layers where they have their own.

    Reads the entries of a `config.json` of version 4 or 5, with the defaults of its family filled
    in. Raises Refused for kinds that `rope.py` does not compute.
    """
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    nested = any(isinstance(value, Mapping) for value in rope.values())
    if config["model_type"] != "gemma3_text":
        if nested:
            raise Refused(
                f"config.json: rope_parameters differ by layer ({rope}); supported: one set"
            )
        return *_read_rope_set(config, rope), None
    # Version 5 keeps a set for each type of layer; version 4 scales the global layers only.
    if config.get("rope_parameters") and not nested:
        raise Refused(
            f"config.json: rope_parameters is {rope}; gemma3_text has one set a layer type"
        )
    sliding = (rope.get("sliding_attention") or {}) if nested else {}
    rope = (rope.get("full_attention") or {}) if nested else rope
    local = {**config, "rope_theta": config["rope_local_base_freq"]}
    local_theta, local_scaling = _read_rope_set(local, sliding)
    if local_scaling is not None:
        raise Refused(
            f"config.json: rope_parameters of sliding_attention are {sliding}; supported: default"
        )
    return *_read_rope_set(config, rope), local_theta


def _read_rope_set(
    config: Mapping[str, Any], parameters: Mapping[str, Any]
) -> tuple[float, RopeScaling | None]:
    rope = dict(parameters)
    kind = rope.pop("rope_type", None) or rope.get("type") or "default"
    rope.pop("type", None)
    theta = rope.pop("rope_theta", None)
    theta = config.get("rope_theta", 10000.0) if theta is None else theta
    partial = rope.pop("partial_rotary_factor", None) or config.get("partial_rotary_factor") or 1.0
    if partial != 1.0:
        raise Refused(f"config.json: partial_rotary_factor is {partial}; supported: 1.0")
    if kind == "default":
        return float(theta), None
    if kind not in ROPE_KINDS:
        raise Refused(
            f"config.json: rope_type is {kind!r}; supported: default, {', '.join(ROPE_KINDS)}"
        )
    original = rope.get("original_max_position_embeddings") or config["max_position_embeddings"]
    factor = rope.get("factor")
    if factor is None and kind == "yarn":
        factor = config["max_position_embeddings"] / original
    if factor is None:
        raise Refused(f"config.json: {kind} rope scaling has no factor")
    read: dict[str, Any] = {"kind": kind, "factor": float(factor)}
    if kind == "llama3":
        read["original_max_positions"] = original
        for key in ("low_freq_factor", "high_freq_factor"):
            if key not in rope:
                raise Refused(f"config.json: llama3 rope scaling has no {key}")
            read[key] = float(rope[key])
    if kind == "yarn":
        read["original_max_positions"] = original
        read["beta_fast"] = float(rope.get("beta_fast") or 32.0)
        read["beta_slow"] = float(rope.get("beta_slow") or 1.0)
        read["truncate"] = bool(rope.get("truncate", True))
        read["attention_factor"] = _yarn_attention_factor(rope, float(factor))
    return float(theta), RopeScaling(**read)


def _yarn_attention_factor(rope: Mapping[str, Any], factor: float) -> float:
    """YaRN equation 22, with the two multipliers that some checkpoints carry."""
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])

    def scale(multiplier: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * multiplier * log(factor) + 1.0

    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return scale(rope["mscale"]) / scale(rope["mscale_all_dim"])
    return scale(1.0)


def write_rope(config: DecoderConfig) -> dict[str, Any]:
    """The rotary entries of a `config.json`, in the form of version 4 and in that of version 5."""
    scaling = None if config.rope_scaling is None else _write_scaling(config.rope_scaling)
    rope = (scaling or {"rope_type": "default"}) | {"rope_theta": config.rope_theta}
    written = {"rope_theta": config.rope_theta, "rope_scaling": scaling, "rope_parameters": rope}
    if config.rope_local_theta is not None:
        local = {"rope_type": "default", "rope_theta": config.rope_local_theta}
        written["rope_local_base_freq"] = config.rope_local_theta
        written["rope_parameters"] = {"full_attention": rope, "sliding_attention": local}
    return written


def _write_scaling(scaling: RopeScaling) -> dict[str, Any]:
    read_by_kind = {
        "linear": (),
        "llama3": ("low_freq_factor", "high_freq_factor"),
        "yarn": ("beta_fast", "beta_slow", "attention_factor", "truncate"),
    }[scaling.kind]
    rope: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind != "linear":
        rope["original_max_position_embeddings"] = scaling.original_max_positions
    return rope | {key: value for key, value in asdict(scaling).items() if key in read_by_kind}
