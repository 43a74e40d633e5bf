"""Split KL over vocabulary-parallel output layers without ever materialising the logits.

Two passes over tiles of logits: ``linear_stats`` (entropies, both KL divergences and sampled
log-probabilities of each token, exact) and ``linear_split_kl_grads``; ``split_kl_loss`` joins them into one
autograd node.
"""

from .api import BACKENDS, COEFFICIENTS, Backend, linear_entropy, linear_split_kl_grads, linear_stats
from .loss import SplitKLOutput, split_kl_loss
from .state import EntropyState, EntropyStats, TokenStats, finalize, finalize_entropy, merge_tp
from .tiling import TileOptions, VocabShard

__all__ = [
    "BACKENDS",
    "COEFFICIENTS",
    "Backend",
    "EntropyState",
    "EntropyStats",
    "SplitKLOutput",
    "TileOptions",
    "TokenStats",
    "VocabShard",
    "finalize",
    "finalize_entropy",
    "linear_entropy",
    "linear_split_kl_grads",
    "linear_stats",
    "merge_tp",
    "split_kl_loss",
]
