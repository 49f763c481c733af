"""The architecture of a decoder: shapes, switches of its family, and what follows from them."""

from dataclasses import dataclass

import numpy as np

from jaxconv.errors import Refused

GEMMA = ("gemma2", "gemma3_text")
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", *GEMMA)
ROPE_KINDS = ("linear", "llama3", "yarn")
EXECUTION = {
    "dtype": ("float32", "bfloat16"),
    "remat": ("none", "dots", "full"),
    "kernels": ("auto", "xla", "tpu", "gpu"),
}
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
_SOFTCAPS = ("attention_softcap", "final_softcap")
# What only some families compute, in `transformers` and so here.
_FAMILIES_WITH = {
    "attention_bias": ("llama", "qwen2", "qwen3", *GEMMA),
    "mlp_bias": ("llama",),
    "sliding_window": ("mistral", "qwen2", "qwen3", *GEMMA),
    "query_scalar": GEMMA,
    "attention_softcap": ("gemma2",),
    "final_softcap": GEMMA,
    "rope_local_theta": ("gemma3_text",),
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
    rope_local_theta: float | None = None  # Gemma 3: base of the sliding layers, never scaled
    sliding_window: int | None = None  # keys that a sliding layer's query sees, its own included
    sliding_layers: tuple[bool, ...] = ()  # which layers slide; empty: none
    query_scalar: float | None = None  # scores are divided by its square root; None: head_dim
    attention_softcap: float | None = None  # bound on the scores, by tanh
    final_softcap: float | None = None  # bound on the logits, by tanh
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
    kernels: str = "auto"  # whose forms of attention and sampling run: the platform's own, or these

    def __post_init__(self):
        _one_of("family (model_type)", self.family, FAMILIES)
        _one_of("stored_dtype", self.stored_dtype, STORED_DTYPES)
        for name, known in EXECUTION.items():
            _one_of(name, getattr(self, name), known)
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
        for name in ("rope_theta", "rope_local_theta", "query_scalar", *_SOFTCAPS):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise Refused(f"{name} is {value}; it must be positive")
        self._check_family()
        self._check_windows()

    @property
    def implementation(self) -> str | None:
        """Which implementation to ask a kernel for; None leaves it to the platform."""
        return None if self.kernels == "auto" else self.kernels

    def _check_family(self) -> None:
        family = self.family
        for name, families in _FAMILIES_WITH.items():
            if getattr(self, name) and family not in families:
                raise Refused(
                    f"{name} is {getattr(self, name)}; family {family} has none, "
                    f"only {', '.join(families)}"
                )
        for name, wanted in (
            ("qk_norm", family in ("qwen3", "gemma3_text")),
            ("attention_bias", family == "qwen2" or self.attention_bias),
            ("attention_out_bias", self.attention_bias and family != "qwen2"),
        ):
            if getattr(self, name) != wanted:
                raise Refused(
                    f"{name} is {getattr(self, name)}; family {family} needs {wanted} here"
                )
        if family == "gemma3_text" and self.rope_local_theta is None:
            raise Refused("rope_local_theta is None; family gemma3_text needs one")

    def _check_windows(self) -> None:
        window, slides = self.sliding_window, self.sliding_layers
        if window is not None and (isinstance(window, bool) or window < 1):
            raise Refused(f"sliding_window is {window}; it must be a positive number of tokens")
        if slides and len(slides) != self.num_layers:
            raise Refused(
                f"sliding_layers has {len(slides)} entries; num_layers is {self.num_layers}"
            )
        if (any(slides) or self.gemma) and window is None:
            whose = f"family {self.family} needs" if self.gemma else "sliding_layers need"
            raise Refused(f"sliding_window is None; {whose} a number of tokens")
        if self.family == "mistral" and window is not None and not (slides and all(slides)):
            raise Refused(f"sliding_layers is {slides}; family mistral slides in every layer")

    @property
    def gemma(self) -> bool:
        """Whether layers are Gemma's.

        Norms multiply by 1 + w in float32 and also stand behind attention and MLP, the MLP's gate
        is a tanh GELU, and embeddings are scaled by sqrt(D).
        """
        return self.family in GEMMA

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Each layer's window in tokens; None where a query sees all that came before it."""
        slides = self.sliding_layers or (False,) * self.num_layers
        return tuple(self.sliding_window if slide else None for slide in slides)

    @property
    def query_scale(self) -> float:
        """Factor on queries before their product with keys."""
        return (self.head_dim if self.query_scalar is None else self.query_scalar) ** -0.5

    @property
    def num_parameters(self) -> int:
        """Number of weights; tied embeddings count once."""
        d, q, kv = self.embed_dim, self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        layer = 2 * d * (q + kv) + 3 * d * self.mlp_dim + (4 if self.gemma else 2) * d
        layer += self.attention_bias * (q + 2 * kv) + self.attention_out_bias * d
        layer += self.mlp_bias * (2 * self.mlp_dim + d) + self.qk_norm * 2 * self.head_dim
        heads = 1 if self.tie_embeddings else 2
        return self.num_layers * layer + heads * self.vocab_size * d + d

    def flops_per_token(self, context: float | np.ndarray) -> float | np.ndarray:
        """Forward FLOPs (2 a multiply-add) of a token that has `context` positions to attend to.

        Matmuls only, LM head included. A training step costs three times this. Over a causal row of
        T tokens the mean context is (T + 1) / 2; with sliding windows, which cut long contexts
        only, pass the context of every token, [T], and average the results instead.
        """
        d, q, kv = self.embed_dim, self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        weights = self.num_layers * (2 * d * (q + kv) + 3 * d * self.mlp_dim) + self.vocab_size * d
        seen = sum(context if w is None else np.minimum(context, w) for w in self.windows)
        return 2.0 * weights + 4.0 * q * seen


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise Refused(f"{name} is {value!r}; it may be {', '.join(known)}")
