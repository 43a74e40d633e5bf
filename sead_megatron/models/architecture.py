"""What the trainer knows of a model: its decoder layers one by one, its sizes and its rotary embedding. Torch-free."""

from dataclasses import dataclass, field
from typing import Literal

AttentionKind = Literal["full", "sliding", "linear", "none"]
MLPKind = Literal["gated", "linear", "none"]


@dataclass(frozen=True)
class LayerConfig:
    """One decoder layer. Layers of a model may differ (Nemotron-NAS, sliding windows)."""

    attention: AttentionKind
    """`linear`: one [H, H] matrix in its place; `none`: the sublayer and its norm are left out."""
    num_key_value_heads: int
    """0 where there is no attention."""
    mlp: MLPKind
    """`linear` and `none` as for attention."""
    ffn_hidden_size: int
    """0 where there is no gated MLP."""

    @property
    def has_attention(self) -> bool:
        """True for an attention over keys and values, of whatever reach."""
        return self.attention in ("full", "sliding")


@dataclass(frozen=True)
class Llama3Rope:
    """Frequencies of Llama 3.1: long wavelengths are stretched by `factor`.

    Megatron-core computes it and fixes its other constants (1, 4, 8192).
    """

    factor: float


@dataclass(frozen=True)
class YarnRope:
    """YaRN (Peng et al. 2023, arXiv 2309.00071); field names as in Hugging Face's `rope_scaling`."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float
    beta_slow: float
    attention_factor: float
    """Multiplies cosines and sines, so attention scores carry its square."""


@dataclass(frozen=True)
class Rope:
    """The rotary embedding of a model."""

    theta: float
    scaling: Llama3Rope | YarnRope | None = None
    scales_sliding_layers: bool = False
    """YaRN on sliding layers too, as some versions of transformers compute OLMo-3. False: on full-attention
    layers only."""


@dataclass(frozen=True)
class HFConfig:
    """A model of a Hugging Face directory; `raw` is the whole config.json."""

    architecture: str
    layers: tuple[LayerConfig, ...]
    hidden_size: int
    num_attention_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float
    rope: Rope
    sliding_window: int | None
    """Tokens that a `sliding` layer sees, the current one included."""
    max_position_embeddings: int
    tie_word_embeddings: bool
    eos_ids: tuple[int, ...]
    """End-of-sequence ids of config.json, then further ones of generation_config.json (chat models list
    several)."""
    raw: dict[str, object] = field(hash=False)

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.layers)

    @property
    def key_value_heads(self) -> tuple[int, ...]:
        """The different numbers of KV heads that occur, ascending."""
        return tuple(sorted({layer.num_key_value_heads for layer in self.layers if layer.has_attention}))

    @property
    def ffn_hidden_sizes(self) -> tuple[int, ...]:
        """The different widths of gated MLPs that occur, ascending."""
        return tuple(sorted({layer.ffn_hidden_size for layer in self.layers if layer.mlp == "gated"}))
