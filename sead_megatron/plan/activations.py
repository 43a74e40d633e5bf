"""Bytes that a token leaves in a decoder layer between its forward and its backward pass.

What autograd saves, tensor by tensor, for both layer specs, compared with the saved tensors of real layers: on the CPU
for the local spec, in the rehearsal for Transformer Engine's (Korthikanti et al. 2022, arXiv 2205.05198, counts the
same tensors).
"""

from __future__ import annotations

from dataclasses import dataclass

from sead_megatron.models.architecture import HFConfig, LayerConfig
from sead_megatron.models.registry import FAMILIES


@dataclass(frozen=True)
class ActivationShape:
    """How a model's activations are stored on a rank."""

    tensor: int
    sequence_parallel: bool
    element_bytes: int
    fused: bool
    """Transformer Engine's layers with their fused rope, SwiGLU and norms."""
    linear_input_bytes: float
    """Of an element that a linear layer keeps of its input; `element_bytes`, or less where it keeps it in FP8."""

    @property
    def sequence_cut(self) -> int:
        """Into how many parts the tensors between the sublayers are cut."""
        return self.tensor if self.sequence_parallel else 1

    def norm_bytes(self, width: float) -> float:
        """Of an RMSNorm over `width` elements of this rank: its input, and what it normalised."""
        if self.fused:
            return self.element_bytes * width
        # torch's norm keeps input and quotient; of bfloat16 both in float32, and the quotient once more.
        return width * (8 if self.element_bytes == 4 else 10)


def layer_bytes(config: HFConfig, layer: LayerConfig, shape: ActivationShape) -> float:
    """Saved bytes a token of one decoder layer."""
    return _attention_bytes(config, layer, shape) + _mlp_bytes(config, layer, shape)


def input_bytes(config: HFConfig, shape: ActivationShape) -> float:
    """A layer's input a token: all that full recomputation keeps of it."""
    return shape.element_bytes * config.hidden_size / shape.sequence_cut


def final_norm_bytes(config: HFConfig, shape: ActivationShape) -> float:
    """The norm behind the last layer, a token, with its output."""
    width = config.hidden_size / shape.sequence_cut
    return shape.norm_bytes(width) + shape.element_bytes * width


def _sublayer_bytes(config: HFConfig, shape: ActivationShape) -> float:
    """A norm over the hidden size, and the input of the first linear layer."""
    width = config.hidden_size / shape.sequence_cut
    return shape.norm_bytes(width) + shape.linear_input_bytes * width


def _attention_bytes(config: HFConfig, layer: LayerConfig, shape: ActivationShape) -> float:
    if layer.attention == "none":
        return 0.0
    total = _sublayer_bytes(config, shape)
    if not layer.has_attention:
        return total
    queries = config.num_attention_heads * config.head_dim / shape.tensor
    keys = layer.num_key_value_heads * config.head_dim / shape.tensor
    qk_norm = FAMILIES[config.architecture].qk_norm
    if shape.fused:
        # Rotated queries and keys, a copy of the values, and the output, which the next layer keeps as it is.
        elements = queries + 2 * keys + queries
        # Transformer Engine's norm of a head keeps its input; a norm of all heads is torch's, in float32.
        normed = {"none": 0, "head": shape.element_bytes, "full": 8}[qk_norm] * (queries + keys)
    else:
        # The fused projection (the values are a view of it), rotated queries and keys, the attention's output, and a
        # copy of it, from segments into one tensor; cosines and sines are kept by every layer, twice.
        elements = (queries + 2 * keys) + (queries + keys) + 2 * queries + 4 * config.head_dim
        # A head norm's input keys are a view of the projection, its input queries a copy.
        norms = {"none": 0.0, "head": 2 * queries + keys, "full": 2 * (queries + keys)}[qk_norm]
        normed = shape.element_bytes * norms
    log_sum_exp = 4 * config.num_attention_heads / shape.tensor
    return total + shape.element_bytes * elements + log_sum_exp + normed


def _mlp_bytes(config: HFConfig, layer: LayerConfig, shape: ActivationShape) -> float:
    if layer.mlp == "none":
        return 0.0
    total = _sublayer_bytes(config, shape)
    if layer.mlp != "gated":
        return total
    # Gate and up, unfused also two steps in between; then their product.
    tensors = 2 if shape.fused else 4
    element = shape.element_bytes * tensors + shape.linear_input_bytes
    return total + element * layer.ffn_hidden_size / shape.tensor


def forward_bytes(config: HFConfig, shape: ActivationShape) -> float:
    """Largest working set of a forward pass without gradients, a token: an MLP's tensors beside its input."""
    widest = max(config.ffn_hidden_sizes, default=config.hidden_size) / shape.tensor
    tensors = 3 if shape.fused else 4
    hidden = config.hidden_size * (1 + 2 / shape.sequence_cut)
    return shape.element_bytes * (tensors * widest + hidden)
