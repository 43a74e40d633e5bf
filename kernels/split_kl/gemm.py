"""GEMMs in the compute dtype and the scratch that their tiles of logits live in.

Logits are never rounded below float32: bf16 logits cost 3-19 % of gradient error when teacher and student are
close. Only on CUDA is the finished dz tile rounded (to the operands' dtype, for the tensor cores), which
costs about 1.6e-3.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Row strides of scratch tiles are multiples of this many elements: 64 bytes of float32, for vector loads.
_STRIDE = 16


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any tensor is float64, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def operand_dtype(tensor: Tensor, dtype: torch.dtype) -> torch.dtype:
    """What a GEMM takes ``tensor`` as: tensor cores read bf16 and accumulate in float32, CPU GEMMs cannot.

    float16 is cast: dz has this dtype too, and normalised gradients of 1e-8 would vanish in float16.
    """
    keep = tensor.is_cuda and dtype == torch.float32 and tensor.dtype == torch.bfloat16
    return torch.bfloat16 if keep else dtype


def operand(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor`` in its :func:`operand_dtype` for the compute dtype ``dtype``."""
    return tensor.to(operand_dtype(tensor, dtype))


def matmul(left: Tensor, right: Tensor, out: Tensor) -> None:
    """out = left @ right, accumulated and stored in out's dtype."""
    if left.dtype == out.dtype:
        torch.mm(left, right, out=out)
    else:
        torch.mm(left, right, out_dtype=out.dtype, out=out)


def accumulate(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, in total's dtype."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        # A float32 sum of bf16 products without a temporary; pytorch/pytorch#167931 (torch 2.10) made it exact.
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)


class Workspace:
    """Scratch tiles, allocated once per pass: their size does not grow with T or V."""

    def __init__(self, tokens: int, vocab: int, device: torch.device, dtypes: list[torch.dtype]) -> None:
        elements = tokens * _row_stride(vocab)
        self._flat = [torch.empty(elements, dtype=dtype, device=device) for dtype in dtypes]

    def views(self, rows: int, columns: int) -> list[Tensor]:
        """[rows, columns] views with at least one spare column before the next row, also for ragged tails."""
        stride = _row_stride(columns)
        return [flat[: rows * stride].view(rows, stride)[:, :columns] for flat in self._flat]


def tile_extent(tile: Tensor) -> tuple[int, int, int]:
    """(row stride, rows, columns) as the native kernels take a tile."""
    return tile.stride(0), tile.shape[0], tile.shape[1]


def tile_bytes(rows: int, columns: int, dtype: torch.dtype) -> int:
    """What one scratch tile takes."""
    return rows * _row_stride(columns) * dtype.itemsize


def _row_stride(columns: int) -> int:
    return (columns // _STRIDE + 1) * _STRIDE
