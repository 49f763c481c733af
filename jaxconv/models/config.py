"""The architecture of a decoder, read from and written as a Hugging Face `config.json`."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import log
from typing import Any

from jaxconv.errors import Refused

FAMILIES = ("llama", "qwen2", "qwen3")
ROPE_KINDS = ("linear", "llama3", "yarn")
REMAT_POLICIES = ("none", "dots", "full")
COMPUTE_DTYPES = ("float32", "bfloat16")
STORED_DTYPES = ("float32", "bfloat16", "float16")

_SIZES = (
    "vocab_size",
    "embed_dim",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "mlp_dim",
    "max_positions",
)
_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched past the trained context; the math is in `rope.py`.

    `kind` is "linear" (position interpolation), "llama3" (by wavelength band) or "yarn"
    (Peng et al. 2023, arXiv 2309.00071). Fields that a kind does not read keep their default.
    """

    kind: str
    factor: float
    original_max_positions: int = 0  # llama3, yarn: context length of pre-training, tokens
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn: rotations above which a frequency is left alone
    beta_slow: float = 1.0  # yarn: rotations below which a frequency is divided by `factor`
    attention_factor: float = 1.0  # yarn: multiplies cos and sin
    truncate: bool = True  # yarn: round the corrected range to whole dimensions

    def __post_init__(self):
        if self.kind not in ROPE_KINDS:
            raise Refused(f"rope scaling is {self.kind!r}; known kinds: {', '.join(ROPE_KINDS)}")
        if self.factor < 1:
            raise Refused(f"rope scaling factor is {self.factor}; it must be at least 1")
        if self.kind in ("llama3", "yarn") and self.original_max_positions <= 0:
            raise Refused(
                f"original_max_position_embeddings is {self.original_max_positions}; "
                f"{self.kind} rope scaling needs a positive number of tokens"
            )
        if self.kind == "llama3" and not self.high_freq_factor > self.low_freq_factor:
            raise Refused(
                f"high_freq_factor is {self.high_freq_factor}; "
                f"it must be above low_freq_factor, {self.low_freq_factor}"
            )


@dataclass(frozen=True)
class DecoderConfig:
    """Shapes and switches of a causal decoder. Hashable, so it is a static part of the model.

    Sizes: `embed_dim` D, `num_heads` H, `num_kv_heads` K, `head_dim` Dh, `mlp_dim` F,
    `vocab_size` V. The execution choices at the end change speed, memory and rounding, never the
    function computed.
    """

    family: str
    vocab_size: int
    embed_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    max_positions: int
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-6
    tie_embeddings: bool = False
    attention_bias: bool = False  # on q, k and v
    attention_out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None

    # Execution.
    dtype: str = "float32"  # of activations and of the weights at use; masters are float32
    stored_dtype: str = "float32"  # of the tensors in a checkpoint: as loaded, kept at export
    remat: str = "none"  # what the backward pass recomputes: nothing, all but matmuls, all
    unroll_layers: bool = False  # straight-line layers: quicker steps for few layers

    def __post_init__(self):
        _one_of("family (model_type)", self.family, FAMILIES)
        _one_of("dtype", self.dtype, COMPUTE_DTYPES)
        _one_of("stored_dtype", self.stored_dtype, STORED_DTYPES)
        _one_of("remat", self.remat, REMAT_POLICIES)
        for name in _SIZES:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise Refused(f"{name} is {value!r}; it must be a positive integer")
        if self.num_heads % self.num_kv_heads:
            raise Refused(
                f"num_kv_heads is {self.num_kv_heads}; it must divide num_heads, {self.num_heads}"
            )
        if self.head_dim % 2:
            raise Refused(f"head_dim is {self.head_dim}; rotary positions need an even one")
        if self.rope_theta <= 0:
            raise Refused(f"rope_theta is {self.rope_theta}; it must be positive")
        for name, value, wanted in (
            ("qk_norm", self.qk_norm, self.family == "qwen3"),
            ("attention_bias", self.attention_bias, self.family == "qwen2" or self.attention_bias),
            (
                "attention_out_bias",
                self.attention_out_bias,
                self.attention_bias and self.family != "qwen2",
            ),
            ("mlp_bias", self.mlp_bias, self.mlp_bias and self.family == "llama"),
        ):
            if value != wanted:
                raise Refused(f"{name} is {value}; family {self.family} needs {wanted} here")

    @property
    def num_parameters(self) -> int:
        """Number of weights; tied embeddings count once."""
        d, q, kv = self.embed_dim, self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        layer = 2 * d * (q + kv) + 3 * d * self.mlp_dim + 2 * d
        layer += self.attention_bias * (q + 2 * kv) + self.attention_out_bias * d
        layer += self.mlp_bias * (2 * self.mlp_dim + d) + self.qk_norm * 2 * self.head_dim
        heads = 1 if self.tie_embeddings else 2
        return self.num_layers * layer + heads * self.vocab_size * d + d

    def flops_per_token(self, context: float) -> float:
        """Forward FLOPs (2 a multiply-add) of one token that attends to `context` positions.

        Matmuls only, LM head included. A training step costs three times this; over a causal row
        of T tokens the mean context is (T + 1) / 2.
        """
        d, q, kv = self.embed_dim, self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        weights = self.num_layers * (2 * d * (q + kv) + 3 * d * self.mlp_dim) + self.vocab_size * d
        return 2.0 * weights + 4.0 * self.num_layers * q * context

    @classmethod
    def from_hf_dict(cls, config: Mapping[str, Any]) -> "DecoderConfig":
        """Reads a raw `config.json`, as transformers 4 or 5 writes it.

        Raises Refused, naming the key and its value, for a missing size and for every feature
        that the decoder does not compute.
        """
        family = config.get("model_type")
        if family not in FAMILIES:
            raise Refused(f"model_type is {family!r}; supported: {', '.join(FAMILIES)}")
        _refuse_unsupported(config)
        num_heads = _need(config, "num_attention_heads")
        embed_dim = _need(config, "hidden_size")
        num_kv_heads = config.get("num_key_value_heads")
        if num_kv_heads is None:
            # Absent from the oldest Llama files, which had one key head for each query head.
            num_kv_heads = num_heads if family == "llama" else _need(config, "num_key_value_heads")
        head_dim = config.get("head_dim")
        if head_dim is None:
            head_dim = 128 if family == "qwen3" else embed_dim // num_heads
        max_positions = config.get("max_position_embeddings", 2048 if family == "llama" else 32768)
        theta, scaling = _read_rope(config, max_positions)
        bias = family == "qwen2" or bool(config.get("attention_bias", False))
        stored = str(config.get("dtype") or config.get("torch_dtype") or "float32")
        return cls(
            family=family,
            vocab_size=_need(config, "vocab_size"),
            embed_dim=embed_dim,
            num_layers=_need(config, "num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            mlp_dim=_need(config, "intermediate_size"),
            max_positions=max_positions,
            rope_theta=theta,
            rope_scaling=scaling,
            norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            tie_embeddings=bool(config.get("tie_word_embeddings", False)),
            attention_bias=bias,
            attention_out_bias=bias and family != "qwen2",
            mlp_bias=family == "llama" and bool(config.get("mlp_bias", False)),
            qk_norm=family == "qwen3",
            bos_token_id=config.get("bos_token_id"),
            eos_token_ids=token_ids(config.get("eos_token_id")),
            pad_token_id=config.get("pad_token_id"),
            stored_dtype=stored if stored in STORED_DTYPES else "float32",
        )

    def to_hf_dict(self) -> dict[str, Any]:
        """A `config.json` that transformers 4 and 5 both read."""
        rope: dict[str, Any] = {"rope_type": "default"}
        if self.rope_scaling is not None:
            rope = _write_rope(self.rope_scaling)
        eos = list(self.eos_token_ids)
        config = {
            "architectures": [_ARCHITECTURES[self.family]],
            "model_type": self.family,
            "vocab_size": self.vocab_size,
            "hidden_size": self.embed_dim,
            "intermediate_size": self.mlp_dim,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": self.max_positions,
            "rms_norm_eps": self.norm_eps,
            "tie_word_embeddings": self.tie_embeddings,
            "attention_dropout": 0.0,
            "initializer_range": 0.02,
            "use_cache": True,
            # The first three are the form of version 4, the last that of version 5.
            "torch_dtype": self.stored_dtype,
            "rope_theta": self.rope_theta,
            "rope_scaling": rope if self.rope_scaling is not None else None,
            "rope_parameters": rope | {"rope_theta": self.rope_theta},
            "bos_token_id": self.bos_token_id,
            "eos_token_id": None if not eos else eos[0] if len(eos) == 1 else eos,
            "pad_token_id": self.pad_token_id,
        }
        if self.family != "qwen2":
            config["attention_bias"] = self.attention_bias
        if self.family == "llama":
            config["mlp_bias"] = self.mlp_bias
        else:
            config["use_sliding_window"] = False
        return config


def token_ids(value: int | list[int] | None) -> tuple[int, ...]:
    """The ids in an `eos_token_id` entry, which may be absent, one id or a list."""
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(value)


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise Refused(f"{name} is {value!r}; it may be {', '.join(known)}")


def _need(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise Refused(f"config.json: {key} is {value!r}; it must be a positive integer")
    return value


def _refuse_unsupported(config: Mapping[str, Any]) -> None:
    """Features that would change the output and are not computed here."""
    activation = config.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise Refused(f"config.json: hidden_act is {activation!r}; supported: 'silu'")
    window = config.get("sliding_window")
    if config.get("use_sliding_window") and window is not None:
        raise Refused(
            f"config.json: use_sliding_window is true with sliding_window {window}; "
            "supported: full attention only"
        )
    # Written by version 5 even where it says only "full".
    odd = sorted({str(kind) for kind in config.get("layer_types") or ()} - {"full_attention"})
    if odd:
        raise Refused(f"config.json: layer_types has {', '.join(odd)}; supported: 'full_attention'")
    for key in ("quantization_config", "num_experts", "num_local_experts"):
        if config.get(key):
            raise Refused(f"config.json: {key} is {config[key]!r}; supported: absent")


def _read_rope(config: Mapping[str, Any], max_positions: int) -> tuple[float, RopeScaling | None]:
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    if any(isinstance(value, Mapping) for value in rope.values()):
        raise Refused(f"config.json: rope_parameters differ by layer ({rope}); supported: one set")
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
    original = rope.get("original_max_position_embeddings") or max_positions
    factor = rope.get("factor")
    if factor is None and kind == "yarn":
        factor = max_positions / original
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


def _write_rope(scaling: RopeScaling) -> dict[str, Any]:
    read_by_kind = {
        "linear": (),
        "llama3": ("low_freq_factor", "high_freq_factor"),
        "yarn": ("beta_fast", "beta_slow", "attention_factor", "truncate"),
    }[scaling.kind]
    rope: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind != "linear":
        rope["original_max_position_embeddings"] = scaling.original_max_positions
    return rope | {key: value for key, value in asdict(scaling).items() if key in read_by_kind}
