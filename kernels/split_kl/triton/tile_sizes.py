"""Tile sizes and compiler options of every kernel: the launcher and the ahead-of-time check read this table.

Chosen by registers, spills and shared memory as compiled (``aot``) and by how often a tile reads its operands;
nothing was timed.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """BT tokens x BV vocabulary rows of logits, BK columns of the hidden states per step of the GEMM."""

    tokens: int
    vocab: int
    hidden: int
    warps: int = 8
    stages: int = 4
    max_registers: int | None = None

    def options(self) -> dict[str, object]:
        """Options of the compiler. Fusion to FMA is named because its default changes between Triton releases."""
        return {
            "num_warps": self.warps,
            "num_stages": self.stages,
            "maxnreg": self.max_registers,
            "enable_fp_fusion": True,
        }


# Compute capability by its first number, 9: Hopper, 10: datacenter Blackwell.
ARCHITECTURES = {9: "sm_90", 10: "sm_100"}

# bf16 operands. On sm_100 two accumulators of 128 x 128 spill in the statistics.
TENSOR_CORE_TILES: dict[tuple[str, str], Tile] = {
    ("stats", "sm_90"): Tile(128, 128, 64),
    ("stats", "sm_100"): Tile(128, 64, 64),
    ("entropy", "sm_90"): Tile(128, 256, 64, stages=3),
    ("entropy", "sm_100"): Tile(128, 128, 64),
    ("topk", "sm_90"): Tile(32, 128, 64),
    ("topk", "sm_100"): Tile(32, 128, 64),
    # Unlimited, ptxas takes 246 registers on sm_90 to reorder more; 176 do without a spill.
    ("dz", "sm_90"): Tile(128, 128, 64, max_registers=176),
    ("dz", "sm_100"): Tile(128, 128, 64),
    # Three stages: two programs fit on a multiprocessor, one's GEMM beside the other's elementwise work.
    ("support_dz", "sm_90"): Tile(128, 128, 64, stages=3),
    ("support_dz", "sm_100"): Tile(128, 128, 64, stages=3),
    # One register is spilled on sm_90: stored once and loaded once, outside the loops.
    ("pointwise_stats", "sm_90"): Tile(128, 128, 64),
    ("pointwise_stats", "sm_100"): Tile(128, 64, 64),
    ("pointwise_dz", "sm_90"): Tile(128, 128, 64),
    ("pointwise_dz", "sm_100"): Tile(128, 128, 64),
}

# float32 operands: exact products on the ordinary cores, small tiles.
FLOAT32_TILES: dict[str, Tile] = {
    "stats": Tile(64, 64, 32, stages=2),
    "entropy": Tile(64, 64, 32, stages=2),
    "topk": Tile(32, 128, 32, stages=2),
    "dz": Tile(64, 64, 32, stages=2),
    "support_dz": Tile(64, 64, 32, stages=2),
    "pointwise_stats": Tile(64, 64, 32, stages=2),
    "pointwise_dz": Tile(64, 64, 32, stages=2),
}

# In the interpreter, whose time goes with the number of operations and not with their size.
INTERPRETER_TILE = Tile(16, 32, 32)

# Token tiles that go through a window of the vocabulary together, see ``tiles.tile_of_program``.
GROUP = 8

# Ids per program, and columns of the hidden states per step, of the kernels in ``selected``.
GATHER_BLOCKS = {"BG": 8, "BK": 256}
SCATTER_BLOCKS = {"BG": 64}
SELECTED_OPTIONS: dict[str, object] = {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": True}


def tile_blocks(kernel: str, tile: Tile) -> dict[str, int]:
    """The compile-time sizes of one of the kernels with a GEMM."""
    blocks = {"BT": tile.tokens, "BV": tile.vocab, "BK": tile.hidden}
    return blocks | {"GROUP": GROUP} if kernel.endswith("dz") else blocks


def topk_slots(topk: int) -> int:
    """The power of two in which the ``topk`` largest of a token are kept."""
    return 1 << (topk - 1).bit_length()
