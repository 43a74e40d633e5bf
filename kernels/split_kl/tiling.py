"""What a rank's vocabulary shard covers and how a backend walks over it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class VocabShard:
    """The rows of the output layer that one tensor-parallel rank holds.

    Attributes:
        start: global vocabulary id of the shard's first row.
        valid: TRUE vocabulary size. Rows with global id >= valid are padding (Megatron pads to a multiple of
            128 * TP): they take no part in any sum and their weight gradient is zero.
    """

    start: int
    valid: int

    def __post_init__(self) -> None:
        if self.start < 0:
            raise ValueError(f"VocabShard.start is {self.start}, wanted >= 0")
        if self.valid < 1:
            raise ValueError(
                f"VocabShard.valid is {self.valid}, wanted >= 1 (the vocabulary size without padding)"
            )

    def valid_rows(self, local_rows: int) -> int:
        """How many of the shard's first rows are real: padding is a suffix of the global order."""
        return max(0, min(local_rows, self.valid - self.start))


@dataclass(frozen=True)
class TileOptions:
    """Backend and tile of logits that lives at any moment: ``tokens * vocab`` elements per buffer.

    Attributes:
        backend: a key of ``backends.BACKENDS`` or "auto" (the first one available for the tensors).
        tokens: token rows per tile.
        vocab: vocabulary rows per window.
        check_finite: look for NaN and infinity in every hidden state and weight before each pass (ValueError).
            Reads them once more and synchronises: for debugging. Without it a NaN spreads to its token's
            numbers and, in pass 2, to the gradients.
        check_values: look whether labels and the ids of a top-k lie in the vocabulary, and whether a rule defines what
            has a coefficient (ValueError). Reads them back, so that each call waits for the device. False is for
            callers that made sure of it on the host: there, a wrong id counts as a logit of 0, silently.
        cache_mib: MiB of logits that ``split_kl_loss`` keeps from its forward to its backward pass instead of
            computing them again (backends ``cpu`` and ``cuda``). 8 bytes per active token and vocabulary row
            keep them all, which saves two of six GEMMs.
    """

    backend: str = "auto"
    tokens: int = 1024
    vocab: int = 4096
    check_finite: bool = False
    check_values: bool = True
    cache_mib: int = 0

    def __post_init__(self) -> None:
        for name in ("tokens", "vocab"):
            if getattr(self, name) < 1:
                raise ValueError(f"TileOptions.{name} is {getattr(self, name)}, wanted >= 1")
        if self.cache_mib < 0:
            raise ValueError(f"TileOptions.cache_mib is {self.cache_mib}, wanted >= 0")


DEFAULT_TILES = TileOptions()


def spans(total: int, size: int) -> Iterator[slice]:
    """Consecutive slices of at most ``size`` that cover ``range(total)``; the last one may be shorter."""
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))
