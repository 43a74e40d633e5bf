"""What FP8 asks of shapes: the multiples of a matrix's dimensions and of a row's tokens. Torch-free."""

from __future__ import annotations

WIDTH_MULTIPLE = {"tensorwise": 16, "blockwise": 16, "mxfp8": 32}
"""What every dimension of an FP8 GEMM must be a multiple of, by Megatron's name of the recipe: its
`get_fp8_align_size` (0.16.1, 0.19.2)."""

# Under sequence parallelism a rank quantises its own slice of the tokens and then gathers it. A slice that is no
# multiple of the recipe's block cannot be quantised: Transformer Engine 2.20 then gathers in bfloat16 and quantises all
# of it on every rank, forward and backward (`Float8BlockQuantizer.is_quantizable`, `MXFP8Quantizer.is_quantizable`).
_SLICE_MULTIPLE = {"tensorwise": 16, "blockwise": 128, "mxfp8": 32}


def row_multiple(recipe: str | None, tensor: int, *, sequence_parallel: bool) -> int:
    """What the tokens of a row must be a multiple of in a model with FP8 `recipe` (None: without FP8).

    `tensor` is the tensor-parallel size, over which sequence parallelism cuts the tokens evenly.
    """
    if sequence_parallel:
        return tensor * (1 if recipe is None else _SLICE_MULTIPLE[recipe])
    return 1 if recipe is None else WIDTH_MULTIPLE[recipe]
