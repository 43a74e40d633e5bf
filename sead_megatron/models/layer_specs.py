"""Megatron layer specs of any family, of Transformer Engine's layers or of ours.

A family says what its layers are (`LayerConfig`, where norms stand, which QK norm); here is how that is built. A norm
in front of a linear layer is fused into it with Transformer Engine and stands alone otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityFuncOp, IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from sead_megatron.models.architecture import HFConfig, LayerConfig, YarnRope
from sead_megatron.models.local_layers import LocalRMSNorm, SDPACoreAttention
from sead_megatron.models.megatron_config import has_yarn, uses_transformer_engine
from sead_megatron.models.registry import FAMILIES
from sead_megatron.models.sublayers import (
    FullWidthNormAttention,
    LayerRope,
    LinearSublayer,
    NormedResidualAdd,
)


@dataclass(frozen=True)
class LayerParts:
    """The modules that layers are made of."""

    norm: type
    column_linear: type
    row_linear: type
    core_attention: type
    norm_column_linear: type | None
    """A column-parallel layer with the norm in front of it, where that is one module."""


def local_parts() -> LayerParts:
    """Parts that need nothing but torch and Megatron-core."""
    return LayerParts(LocalRMSNorm, ColumnParallelLinear, RowParallelLinear, SDPACoreAttention, None)


def transformer_engine_parts() -> LayerParts:
    """Transformer Engine's parts, through Megatron's wrappers. ImportError without Transformer Engine."""
    from megatron.core.extensions.transformer_engine import (
        TEColumnParallelLinear,
        TEDotProductAttention,
        TELayerNormColumnParallelLinear,
        TENorm,
        TERowParallelLinear,
    )

    return LayerParts(
        TENorm,
        TEColumnParallelLinear,
        TERowParallelLinear,
        TEDotProductAttention,
        TELayerNormColumnParallelLinear,
    )


def modelopt_parts() -> LayerParts:
    """Transformer Engine's attention and norms around Megatron's own linear layers, as Megatron's specs for ModelOpt.

    ModelOpt 0.47 multiplies compressed weights in the forward pass of Megatron's linear layers only; Transformer
    Engine's get them as an FP8 tensor without its scale and refuse it.
    """
    return replace(
        transformer_engine_parts(),
        column_linear=ColumnParallelLinear,
        row_linear=RowParallelLinear,
        norm_column_linear=None,
    )


def _layer_parts(*, on_cpu: bool, modelopt: bool) -> LayerParts:
    if not uses_transformer_engine(on_cpu):
        return local_parts()
    return modelopt_parts() if modelopt else transformer_engine_parts()


def block_spec(
    config: HFConfig,
    megatron: TransformerConfig,
    groups: ProcessGroupCollection,
    layers: range,
    *,
    on_cpu: bool,
    modelopt: bool = False,
) -> TransformerBlockSubmodules:
    """The spec of a pipeline stage that holds `layers` of the model. `modelopt`: ModelOpt will compress its weights."""
    parts = _layer_parts(on_cpu=on_cpu, modelopt=modelopt)
    specs = _Specs(config, megatron, groups, parts)
    return TransformerBlockSubmodules(
        layer_specs=[specs.layer(config.layers[number]) for number in layers], layer_norm=parts.norm
    )


def _fused_names(layer: LayerConfig) -> dict[str, str]:
    """A norm's name in checkpoints: that of the fused layer, so that they move between the two kinds of layers."""
    attention = "linear_qkv" if layer.has_attention else "linear"
    mlp = "linear_fc1" if layer.mlp == "gated" else "linear"
    return {
        "input_layernorm.": f"self_attention.{attention}.layer_norm_",
        "pre_mlp_layernorm.": f"mlp.{mlp}.layer_norm_",
    }


@dataclass(frozen=True)
class _Specs:
    """Builds the specs of one model."""

    config: HFConfig
    megatron: TransformerConfig
    groups: ProcessGroupCollection
    parts: LayerParts

    def layer(self, layer: LayerConfig) -> ModuleSpec:
        fused = self.parts.norm_column_linear is not None
        norm_first = FAMILIES[self.config.architecture].norm_placement == "before"
        stands_alone = norm_first and not fused
        return ModuleSpec(
            module=TransformerLayer,
            submodules=TransformerLayerSubmodules(
                input_layernorm=self.parts.norm if stands_alone and layer.attention != "none" else IdentityOp,
                self_attention=self._attention(layer),
                self_attn_bda=self._residual(layer.attention == "none"),
                pre_mlp_layernorm=self.parts.norm if stands_alone and layer.mlp != "none" else IdentityOp,
                mlp=self._mlp(layer),
                mlp_bda=self._residual(layer.mlp == "none"),
                sharded_state_dict_keys_map=_fused_names(layer) if stands_alone else {},
            ),
        )

    @property
    def _first_linear(self) -> type:
        """The first linear layer of a sublayer, with the norm in front of it where the two are one module."""
        norm_first = FAMILIES[self.config.architecture].norm_placement == "before"
        fused = self.parts.norm_column_linear
        return fused if norm_first and fused is not None else self.parts.column_linear

    def _residual(self, left_out: bool) -> object:
        if left_out:
            return IdentityFuncOp
        if FAMILIES[self.config.architecture].norm_placement == "before":
            return get_bias_dropout_add
        return ModuleSpec(module=NormedResidualAdd, params={"config": self.megatron, "norm": self.parts.norm})

    def _attention(self, layer: LayerConfig) -> object:
        if layer.attention == "none":
            return IdentityOp
        if layer.attention == "linear":
            return self._linear("linear_attn")
        qk_norm = FAMILIES[self.config.architecture].qk_norm
        head_norm = self.parts.norm if qk_norm == "head" else IdentityOp
        submodules = SelfAttentionSubmodules(
            linear_qkv=self._first_linear,
            core_attention=self.parts.core_attention,
            linear_proj=self.parts.row_linear,
            q_layernorm=head_norm,
            k_layernorm=head_norm,
        )
        params: dict[str, object] = {"attn_mask_type": AttnMaskType.causal}
        if qk_norm != "full":
            return ModuleSpec(module=SelfAttention, params=params, submodules=submodules)
        scaling = self.config.rope.scaling
        params["rope"] = None
        if isinstance(scaling, YarnRope) and has_yarn(self.config, layer):
            params["rope"] = LayerRope(scaling, self.config.rope.theta)
        return ModuleSpec(module=FullWidthNormAttention, params=params, submodules=submodules)

    def _mlp(self, layer: LayerConfig) -> object:
        if layer.mlp == "none":
            return IdentityOp
        if layer.mlp == "linear":
            return self._linear("linear_mlp")
        submodules = MLPSubmodules(linear_fc1=self._first_linear, linear_fc2=self.parts.row_linear)
        if hasattr(MLP, "as_mlp_submodule"):
            # 0.19.2 makes this of a ModuleSpec itself, with a warning a layer.
            return partial(MLP.as_mlp_submodule, submodules=submodules)
        return ModuleSpec(module=MLP, submodules=submodules)

    def _linear(self, name: str) -> ModuleSpec:
        params = {"linear": self._first_linear, "buffer_name": name, "tp_group": self.groups.tp}
        return ModuleSpec(module=LinearSublayer, params=params)
