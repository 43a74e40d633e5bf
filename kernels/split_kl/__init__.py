"""Split KL over vocabulary-parallel output layers without ever materialising the logits.

Two passes over tiles of logits: ``linear_stats`` (entropies, both KL divergences and sampled
log-probabilities of each token, exact) and ``linear_split_kl_grads``; ``split_kl_loss`` joins them into one
autograd node. ``linear_entropy`` is pass 1 of one model, with a streamed top-k; ``topk_loss`` needs of the
teacher nothing but log-probabilities of a few tokens. ``pointwise_loss`` is for divergences that four coefficients of
those terms cannot express: JSD, skew KLs, and any of them with every vocabulary entry clipped.
"""

from .api import (
    linear_entropy,
    linear_pointwise_grads,
    linear_pointwise_stats,
    linear_split_kl_grads,
    linear_stats,
    linear_support_grads,
)
from .backends import BACKENDS, Backend, backend_name, describe_backend, resolve_backend
from .checks import COEFFICIENTS
from .entropy_state import EntropyState, EntropyStats, finalize_entropy
from .logit_cache import LogitCache
from .loss import SplitKLOutput, split_kl_loss
from .pointwise import POINTWISE_KINDS, PointwiseRule
from .pointwise_loss import PointwiseOutput, PointwiseStats, pointwise_loss
from .state import TokenStats, finalize
from .support import SupportGradient
from .tensor_parallel import merge_tp, sum_tp
from .tiling import TileOptions, VocabShard
from .topk import MAX_TOPK, NO_ID
from .topk_loss import TopKOutput, topk_loss
from .topk_overlap import support_mass, teachability_margin, topk_overlap
from .topk_rules import RULES
from .topk_stats import TopKStats, topk_stats_and_gradient
from .topk_target import SUPPORTS, TopKTarget

__all__ = [
    "BACKENDS",
    "COEFFICIENTS",
    "MAX_TOPK",
    "NO_ID",
    "POINTWISE_KINDS",
    "RULES",
    "SUPPORTS",
    "Backend",
    "EntropyState",
    "EntropyStats",
    "LogitCache",
    "PointwiseOutput",
    "PointwiseRule",
    "PointwiseStats",
    "SplitKLOutput",
    "SupportGradient",
    "TileOptions",
    "TokenStats",
    "TopKOutput",
    "TopKStats",
    "TopKTarget",
    "VocabShard",
    "backend_name",
    "describe_backend",
    "finalize",
    "finalize_entropy",
    "linear_entropy",
    "linear_pointwise_grads",
    "linear_pointwise_stats",
    "linear_split_kl_grads",
    "linear_stats",
    "linear_support_grads",
    "merge_tp",
    "pointwise_loss",
    "resolve_backend",
    "split_kl_loss",
    "sum_tp",
    "support_mass",
    "teachability_margin",
    "topk_loss",
    "topk_overlap",
    "topk_stats_and_gradient",
]
