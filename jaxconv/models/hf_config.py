"""A decoder's configuration as a Hugging Face `config.json`, in and out."""

from collections.abc import Mapping
from typing import Any

from jaxconv.errors import Refused
from jaxconv.models.config import FAMILIES, GEMMA, STORED_DTYPES, DecoderConfig
from jaxconv.models.hf_rope import read_rope, write_rope

MULTIMODAL = {"gemma3": "gemma3_text"}
"""Image and text models to the family of their text part, which is what is read of them."""

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_LAYER_TYPES = {False: "full_attention", True: "sliding_attention"}
# What a file may leave out because `transformers` knows it.
_QWEN = {"max_position_embeddings": 32768, "max_window_layers": 28, "sliding_window": 4096}
_GEMMA = {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "qwen2": _QWEN,
    "qwen3": _QWEN | {"head_dim": 128},
    "gemma2": _GEMMA
    | {
        "vocab_size": 256000,
        "max_position_embeddings": 8192,
        "sliding_window_pattern": 2,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    "gemma3_text": _GEMMA
    | {
        "vocab_size": 262208,
        "max_position_embeddings": 131072,
        "sliding_window_pattern": 6,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
    },
}


def from_hf_dict(raw: Mapping[str, Any]) -> DecoderConfig:
    """Reads a raw `config.json`, as transformers 4 or 5 writes it.

    Of an image and text model (`MULTIMODAL`) it reads the text part.

    Raises Refused, naming the key and its value, for a missing size and for every feature that the
    decoder does not compute.
    """
    if raw.get("model_type") in MULTIMODAL:
        text = raw.get("text_config")
        if not isinstance(text, Mapping):
            raise Refused(f"config.json: text_config is {text!r}; {raw['model_type']} needs one")
        shared = ("torch_dtype", "dtype", "quantization_config", *_TOKEN_IDS, "tie_word_embeddings")
        outer = {key: raw[key] for key in shared if raw.get(key) is not None}
        raw = dict(text) | outer | {"model_type": MULTIMODAL[raw["model_type"]]}
    family = raw.get("model_type")
    if family not in FAMILIES:
        known = ", ".join((*FAMILIES, *MULTIMODAL))
        raise Refused(f"model_type is {family!r}; supported: {known}")
    config = {**_DEFAULTS[family], **raw}
    _refuse_unsupported(config)
    num_heads = _need(config, "num_attention_heads")
    embed_dim = _need(config, "hidden_size")
    num_layers = _need(config, "num_hidden_layers")
    num_kv_heads = config.get("num_key_value_heads")
    if num_kv_heads is None:
        # Absent from the oldest Llama files, which had one key head for each query head.
        num_kv_heads = num_heads if family == "llama" else _need(config, "num_key_value_heads")
    theta, scaling, local_theta = read_rope(config)
    window, slides = _read_windows(config, num_layers)
    bias = family == "qwen2" or bool(config.get("attention_bias", False))
    stored = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    head_dim = config.get("head_dim") or embed_dim // num_heads
    scalar, attention_softcap, final_softcap = (
        None if family not in GEMMA or config.get(key) is None else float(config[key])
        for key in ("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping")
    )
    return DecoderConfig(
        family=family,
        vocab_size=_need(config, "vocab_size"),
        embed_dim=embed_dim,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        mlp_dim=_need(config, "intermediate_size"),
        max_positions=_need(config, "max_position_embeddings"),
        rope_theta=theta,
        rope_scaling=scaling,
        rope_local_theta=local_theta,
        sliding_window=window,
        sliding_layers=slides,
        query_scalar=None if scalar == head_dim else scalar,
        attention_softcap=attention_softcap,
        final_softcap=final_softcap,
        norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        tie_embeddings=bool(config.get("tie_word_embeddings", False)),
        attention_bias=bias,
        attention_out_bias=bias and family != "qwen2",
        mlp_bias=family == "llama" and bool(config.get("mlp_bias", False)),
        qk_norm=family in ("qwen3", "gemma3_text"),
        bos_token_id=config.get("bos_token_id"),
        eos_token_ids=token_ids(config.get("eos_token_id")),
        pad_token_id=config.get("pad_token_id"),
        stored_dtype=stored if stored in STORED_DTYPES else "float32",
    )


def to_hf_dict(config: DecoderConfig) -> dict[str, Any]:
    """A `config.json` that transformers 4 and 5 both read."""
    family = config.family
    eos = list(config.eos_token_ids)
    written = {
        "architectures": [_ARCHITECTURES[family]],
        "model_type": family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.embed_dim,
        "intermediate_size": config.mlp_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "torch_dtype": config.stored_dtype,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": None if not eos else eos[0] if len(eos) == 1 else eos,
        "pad_token_id": config.pad_token_id,
    } | write_rope(config)
    if config.gemma:
        scalar = config.query_scalar or config.head_dim
        written |= {
            "hidden_activation": "gelu_pytorch_tanh",
            "hidden_act": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": int(scalar) if scalar == int(scalar) else scalar,
            "attn_logit_softcapping": config.attention_softcap,
            "final_logit_softcapping": config.final_softcap,
        }
    else:
        written["hidden_act"] = "silu"
    if family not in ("qwen2", "mistral"):
        written["attention_bias"] = config.attention_bias
    if family == "llama":
        written["mlp_bias"] = config.mlp_bias
    else:
        written["sliding_window"] = config.sliding_window
    slides = [window is not None for window in config.windows]
    if family not in ("llama", "mistral"):
        written["layer_types"] = [_LAYER_TYPES[slide] for slide in slides]
    if family in ("qwen2", "qwen3"):
        written["use_sliding_window"] = any(slides)
        written["max_window_layers"] = slides.index(True) if any(slides) else config.num_layers
    return written


def token_ids(value: int | list[int] | None) -> tuple[int, ...]:
    """The ids in an `eos_token_id` entry, which may be absent, one id or a list."""
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(value)


def _need(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise Refused(f"config.json: {key} is {value!r}; it must be a positive integer")
    return value


def _refuse_unsupported(config: Mapping[str, Any]) -> None:
    """Features that would change the output and are not computed here."""
    family = config["model_type"]
    key, known = "hidden_act", ("silu", "swish")
    if family in GEMMA:
        key, known = "hidden_activation", ("gelu_pytorch_tanh",)
    activation = config.get(key, known[0])
    if activation not in known:
        raise Refused(f"config.json: {key} is {activation!r}; supported: {known[0]!r}")
    unsupported = ["quantization_config", "num_experts", "num_local_experts"]
    if family in GEMMA:
        unsupported.append("use_bidirectional_attention")
    if family == "gemma3_text":
        unsupported.append(
            "attn_logit_softcapping"
        )  # `transformers` reads it and does not apply it
    for key in unsupported:
        if config.get(key):
            raise Refused(f"config.json: {key} is {config[key]!r}; supported: absent")


def _read_windows(
    config: Mapping[str, Any], num_layers: int
) -> tuple[int | None, tuple[bool, ...]]:
    """(window, which layers slide); the default patterns are those of `transformers`."""
    family = config["model_type"]
    window = config.get("sliding_window")
    if family == "llama" or (family in ("qwen2", "qwen3") and not config.get("use_sliding_window")):
        window = None
    if window is not None:
        _need(config, "sliding_window")
    layers = range(num_layers)
    if window is None or family == "mistral":
        slides = tuple(window is not None for _ in layers)
    elif family in GEMMA:
        every = _need(config, "sliding_window_pattern")  # one layer in so many sees everything
        slides = tuple((i + 1) % every > 0 for i in layers)
    else:
        slides = tuple(i >= config["max_window_layers"] for i in layers)
    types = config.get("layer_types")
    if types is not None:
        odd = sorted(set(map(str, types)) - set(_LAYER_TYPES.values()))
        if odd or len(types) != num_layers:
            raise Refused(
                f"config.json: layer_types is {types}; supported: {num_layers} times "
                f"{' or '.join(_LAYER_TYPES.values())}"
            )
        given = tuple(kind == _LAYER_TYPES[True] for kind in types)
        if given != slides and (window is None or family == "mistral"):
            raise Refused(
                f"config.json: layer_types is {types}; {family} with window {window} has "
                f"{_LAYER_TYPES[slides[0]]} in every layer"
            )
        slides = given
    return window, slides if any(slides) else ()
