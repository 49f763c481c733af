"""The architecture of a text encoder, and its Hugging Face `config.json`, in and out."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxconv.errors import Refused
from jaxconv.models.config import EXECUTION, STORED_DTYPES

ENCODER_FAMILIES = ("bert", "roberta", "xlm-roberta", "mpnet")
ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu")
RELATIVE_BUCKETS = 32  # of MPNet's relative positions, whatever the size of the table

_SIZES = (
    "vocab_size",
    "embed_dim",
    "num_layers",
    "num_heads",
    "mlp_dim",
    "max_positions",
)
_ARCHITECTURES = {
    "bert": "BertModel",
    "roberta": "RobertaModel",
    "xlm-roberta": "XLMRobertaModel",
    "mpnet": "MPNetModel",
}
# What a file may leave out because `transformers` knows it.
_COMMON = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-12,
}
_ROBERTA = _COMMON | {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "bert": _COMMON | {"vocab_size": 30522, "pad_token_id": 0},
    "roberta": _ROBERTA | {"vocab_size": 50265},
    "xlm-roberta": _ROBERTA | {"vocab_size": 30522},
    "mpnet": _ROBERTA
    | {"vocab_size": 30527, "type_vocab_size": 0, "relative_attention_num_buckets": 32},
}


@dataclass(frozen=True)
class EncoderConfig:
    """Shapes and switches of a bidirectional encoder. Hashable, a static part of the model.

    Sizes: `embed_dim` D, `num_heads` H, `mlp_dim` F, `vocab_size` V; `max_positions` rows of the
    table of positions, of which the first `position_offset` are no token's.
    """

    family: str
    vocab_size: int
    embed_dim: int
    num_layers: int
    num_heads: int
    mlp_dim: int
    max_positions: int
    token_types: int = 2  # 0: the family has none
    relative_buckets: int = 0  # rows of MPNet's table of relative positions; 0: none
    activation: str = "gelu"
    norm_eps: float = 1e-12
    init_std: float = 0.02
    pad_token_id: int = 0
    bos_token_id: int | None = None
    eos_token_id: int | None = None

    # Execution.
    dtype: str = "float32"  # of activations and of the weights at use; masters are float32
    stored_dtype: str = "float32"  # of the tensors in a checkpoint: as loaded, kept at export

    def __post_init__(self):
        for name, known in (
            ("family", ENCODER_FAMILIES),
            ("activation", ACTIVATIONS),
            ("dtype", EXECUTION["dtype"]),
            ("stored_dtype", STORED_DTYPES),
        ):
            if getattr(self, name) not in known:
                raise Refused(f"{name} is {getattr(self, name)!r}; supported: {', '.join(known)}")
        for name in _SIZES:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise Refused(f"{name} is {value!r}; it must be a positive integer")
        if self.embed_dim % self.num_heads:
            raise Refused(
                f"num_heads is {self.num_heads}; it must divide embed_dim, {self.embed_dim}"
            )
        if self.longest < 1:
            raise Refused(
                f"max_positions is {self.max_positions}; family {self.family} needs more than "
                f"{self.position_offset}"
            )
        is_mpnet = self.family == "mpnet"
        if (self.relative_buckets >= RELATIVE_BUCKETS) != is_mpnet:
            raise Refused(
                f"relative_buckets is {self.relative_buckets}; family {self.family} needs "
                f"{f'at least {RELATIVE_BUCKETS}' if is_mpnet else 0}"
            )
        if (self.token_types > 0) == is_mpnet:
            raise Refused(
                f"token_types is {self.token_types}; family {self.family} needs "
                f"{0 if is_mpnet else 'at least 1'}"
            )

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.num_heads

    @property
    def position_offset(self) -> int:
        """Row of the table of positions that the first token reads.

        RoBERTa's table keeps the rows up to that of the padding id free; MPNet's does as if that
        were 1, whatever it is.
        """
        return {"bert": 0, "mpnet": 2}.get(self.family, self.pad_token_id + 1)

    @property
    def longest(self) -> int:
        """Tokens of the longest text."""
        return self.max_positions - self.position_offset


def encoder_from_hf(raw: Mapping[str, Any]) -> EncoderConfig:
    """Reads a raw `config.json`, as transformers 4 or 5 writes it.

    Raises Refused, naming the key and its value, for every feature that is not computed here.
    """
    family = raw.get("model_type")
    if family not in ENCODER_FAMILIES:
        raise Refused(f"model_type is {family!r}; encoders: {', '.join(ENCODER_FAMILIES)}")
    config = {**_DEFAULTS[family], **raw}
    if config["hidden_act"] not in ACTIVATIONS:
        raise Refused(
            f"config.json: hidden_act is {config['hidden_act']!r}; "
            f"supported: {', '.join(ACTIVATIONS)}"
        )
    position = config.get("position_embedding_type", "absolute")
    if position != "absolute":
        raise Refused(
            f"config.json: position_embedding_type is {position!r}; supported: 'absolute'"
        )
    for key in ("is_decoder", "add_cross_attention", "quantization_config"):
        if config.get(key):
            raise Refused(f"config.json: {key} is {config[key]!r}; supported: absent")
    is_mpnet = family == "mpnet"
    return EncoderConfig(
        family=family,
        vocab_size=config["vocab_size"],
        embed_dim=config["hidden_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        mlp_dim=config["intermediate_size"],
        max_positions=config["max_position_embeddings"],
        token_types=0 if is_mpnet else config["type_vocab_size"],
        relative_buckets=config["relative_attention_num_buckets"] if is_mpnet else 0,
        activation=config["hidden_act"],
        norm_eps=float(config["layer_norm_eps"]),
        init_std=float(config["initializer_range"]),
        pad_token_id=config["pad_token_id"],
        bos_token_id=config.get("bos_token_id"),
        eos_token_id=config.get("eos_token_id"),
    )


def encoder_to_hf(config: EncoderConfig) -> dict[str, Any]:
    """The `config.json` that `transformers` reads; the inverse of `encoder_from_hf`."""
    written = {
        "model_type": config.family,
        "architectures": [_ARCHITECTURES[config.family]],
        "vocab_size": config.vocab_size,
        "hidden_size": config.embed_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.mlp_dim,
        "max_position_embeddings": config.max_positions,
        "hidden_act": config.activation,
        "layer_norm_eps": config.norm_eps,
        "initializer_range": config.init_std,
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
        "torch_dtype": config.stored_dtype,
        "pad_token_id": config.pad_token_id,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
    }
    if config.token_types:
        written["type_vocab_size"] = config.token_types
    if config.relative_buckets:
        written["relative_attention_num_buckets"] = config.relative_buckets
    return written
