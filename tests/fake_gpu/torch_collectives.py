"""torch.distributed over the fake NCCL: torchrun --nproc-per-node N torch_collectives.py, on the fake CUDA.

Kernels do nothing there, so tensors are filled by copies from the CPU and compared there, to the bit. Every rank can
compute what the others hold. Prints `torch collectives OK` on rank 0.
"""

from __future__ import annotations

import ctypes
import os

import torch
import torch.distributed as dist
from torch import Tensor

SIZES = (5, 100_003, 5_000_001)  # one exchange, two, and several pieces of a slot


def held_by(rank: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """What a rank holds, on the CPU."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(rank)).to(dtype)


def summed(terms: list[Tensor]) -> Tensor:
    """The sum in the order of ranks, in float32, rounded once."""
    total = terms[0].float()
    for term in terms[1:]:
        total = total + term.float()
    return total.to(terms[0].dtype)


def equal(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got.cpu(), wanted, rtol=0, atol=0)


def collectives(device: torch.device, rank: int, ranks: int) -> None:
    everyone = range(ranks)
    for size in SIZES:
        for dtype in (torch.float32, torch.bfloat16):
            terms = [held_by(r, size, dtype=dtype) for r in everyone]
            mine = terms[rank].to(device)
            dist.all_reduce(mine)
            equal(mine, summed(terms))
    mine = (torch.arange(8) + rank).to(device)
    dist.all_reduce(mine, op=dist.ReduceOp.MAX)
    equal(mine, torch.arange(8) + ranks - 1)
    mine = held_by(rank, 9).to(device)
    dist.all_reduce(mine, op=dist.ReduceOp.AVG)
    equal(mine, summed([held_by(r, 9) for r in everyone]) / ranks)

    rows = [held_by(r, ranks, 7) for r in everyone]
    gathered, part = torch.empty(ranks, 7, device=device), torch.empty(7, device=device)
    dist.all_gather_into_tensor(gathered, rows[rank][0].to(device))
    equal(gathered, torch.stack([row[0] for row in rows]))
    dist.reduce_scatter_tensor(part, rows[rank].to(device))
    equal(part, summed([row[rank] for row in rows]))
    dist.all_to_all_single(gathered, rows[rank].to(device))
    equal(gathered, torch.stack([row[rank] for row in rows]))
    mine = held_by(rank, 9).to(device)
    dist.broadcast(mine, ranks - 1)
    equal(mine, held_by(ranks - 1, 9))


def point_to_point(device: torch.device, rank: int, ranks: int) -> None:
    previous, following = (rank - 1) % ranks, (rank + 1) % ranks
    mine, got = held_by(rank, 1_000_000).to(device), torch.empty(1_000_000, device=device)
    ring = [dist.P2POp(dist.isend, mine, following), dist.P2POp(dist.irecv, got, previous)]
    for work in dist.batch_isend_irecv(ring):
        work.wait()
    equal(got, held_by(previous, 1_000_000))
    if rank == 0:
        dist.send(mine, 1)
    if rank == 1:
        dist.recv(got, 0)
        equal(got, held_by(0, 1_000_000))


def groups(device: torch.device, rank: int, ranks: int) -> None:
    parts = [[r for r in range(ranks) if r % 2 == parity] for parity in range(2)]
    made = [dist.new_group(part) for part in parts]
    for _ in range(10):
        mine, all_of_it = held_by(rank, 1000).to(device), held_by(rank, 1000).to(device)
        dist.all_reduce(mine, group=made[rank % 2])
        dist.all_reduce(all_of_it)
        equal(mine, summed([held_by(r, 1000) for r in parts[rank % 2]]))
        equal(all_of_it, summed([held_by(r, 1000) for r in range(ranks)]))


def counters(device: torch.device) -> None:
    """What one `.item()` and one pinned copy cost is what the library says they cost."""
    library = ctypes.CDLL(os.environ["FAKE_CUDA_LIB"])
    library.fake_counter.restype = ctypes.c_long
    value, pinned = torch.tensor(3.5).to(device), torch.zeros(4).pin_memory()
    library.fake_reset_counters()
    assert value.item() == 3.5
    pinned.to(device, non_blocking=True)
    names = (b"copies_d2h", b"sync_stream", b"copies_h2d", b"pageable_h2d", b"launches")
    assert [library.fake_counter(name) for name in names] == [1, 1, 1, 0, 0]
    assert library.fake_has_context(device.index) == 1


def main() -> None:
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    collectives(device, rank, ranks)
    point_to_point(device, rank, ranks)
    groups(device, rank, ranks)
    dist.barrier()
    counters(device)
    dist.destroy_process_group()
    if rank == 0:
        print(f"torch collectives OK, {ranks} ranks, torch {torch.__version__}", flush=True)


if __name__ == "__main__":
    main()
