"""One rank of the self-test of the fake NCCL: nccl_rank.py CASE RANK RANKS ID_FILE. Exits with 0 if all is right.

Every rank can compute what every rank holds, so every result is checked against numpy without further communication.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
import nccl_library as nccl
from nccl_library import Communicator

SIZES = (
    1,
    1_000,
    20_000,
    3_000_001,
)  # in one exchange, in two, in several pieces of a slot; divisible by no number of ranks


def held_by(rank: int, *shape: int, dtype: type = np.float32) -> np.ndarray:
    """What a rank holds: small integers for integer types, so that products stay in range."""
    generator = np.random.default_rng(rank)
    if np.issubdtype(dtype, np.integer):
        return generator.integers(1, 4, shape).astype(dtype)
    return generator.standard_normal(shape).astype(dtype)


def in_rank_order(
    terms: list[np.ndarray], combine: Callable[[np.ndarray, np.ndarray], np.ndarray]
) -> np.ndarray:
    total = terms[0]
    for term in terms[1:]:
        total = combine(total, term)
    return total


def equal(got: np.ndarray, wanted: np.ndarray) -> None:
    np.testing.assert_array_equal(got, wanted)


def reductions(c: Communicator) -> None:
    """Every operation and type of all_reduce, to the bit."""
    everyone = range(c.ranks)
    for size in SIZES:
        for dtype in (np.float32, np.float64, np.int32, np.int64, np.uint8):
            terms = [held_by(r, size, dtype=dtype) for r in everyone]
            mine = terms[c.rank]
            for operation, combine in (
                (nccl.SUM, np.add),
                (nccl.PROD, np.multiply),
                (nccl.MAX, np.maximum),
                (nccl.MIN, np.minimum),
            ):
                equal(c.all_reduce(mine, operation), in_rank_order(terms, combine))
        terms = [held_by(r, size) for r in everyone]
        equal(c.all_reduce(terms[c.rank], nccl.AVG), in_rank_order(terms, np.add) / np.float32(c.ranks))
        halves = [t.astype(np.float16) for t in terms]
        wanted = in_rank_order([h.astype(np.float32) for h in halves], np.add).astype(np.float16)
        equal(c.all_reduce(halves[c.rank], nccl.SUM), wanted)
        brains = [nccl.bfloat16(t) for t in terms]
        wanted = nccl.bfloat16(in_rank_order([nccl.from_bfloat16(b) for b in brains], np.add))
        equal(c.all_reduce(brains[c.rank], nccl.SUM), wanted)
    in_place = held_by(c.rank, 70_000)
    c.collective("AllReduce", in_place, in_place, nccl.SUM, count=in_place.size)
    equal(in_place, in_rank_order([held_by(r, 70_000) for r in everyone], np.add))
    scaled_sum(c)


def scaled_sum(c: Communicator) -> None:
    """ncclRedOpCreatePreMulSum with another factor on every rank."""
    factor, operation = ctypes.c_float(c.rank + 0.5), ctypes.c_int()
    host = 1
    nccl.succeed(
        c.library.ncclRedOpCreatePreMulSum(
            ctypes.byref(operation), ctypes.byref(factor), nccl.FLOAT32, host, c.handle
        )
    )
    got = c.all_reduce(held_by(c.rank, 100), operation.value)
    equal(got, in_rank_order([held_by(r, 100) * np.float32(r + 0.5) for r in range(c.ranks)], np.add))
    nccl.succeed(c.library.ncclRedOpDestroy(operation, c.handle))


def movements(c: Communicator) -> None:
    """Every other collective, and fp8 as bytes."""
    n, everyone = c.ranks, range(c.ranks)
    for size in SIZES:
        rows = [held_by(r, n, size) for r in everyone]
        mine, one, all_parts = rows[c.rank], np.empty(size, np.float32), np.empty((n, size), np.float32)
        equal(
            c.collective("AllGather", mine[0].copy(), all_parts, count=size), np.stack([r[0] for r in rows])
        )
        equal(
            c.collective("ReduceScatter", mine, one, nccl.SUM, count=size),
            in_rank_order([r[c.rank] for r in rows], np.add),
        )
        equal(c.collective("AlltoAll", mine, all_parts, count=size), np.stack([r[c.rank] for r in rows]))
        for root in (0, n - 1):
            equal(c.collective("Broadcast", mine[0].copy(), one, root, count=size), rows[root][0])
            equal(c.collective("Scatter", mine, one, root, count=size), rows[root][c.rank])
            untouched = np.full((n, size), 7, np.float32)
            c.collective("Gather", mine[0].copy(), untouched, root, count=size)
            equal(
                untouched,
                np.stack([r[0] for r in rows]) if c.rank == root else np.full((n, size), 7, np.float32),
            )
            untouched = np.full(size, 7, np.float32)
            c.collective("Reduce", mine[0].copy(), untouched, nccl.MAX, root, count=size)
            wanted = in_rank_order([r[0] for r in rows], np.maximum)
            equal(untouched, wanted if c.rank == root else np.full(size, 7, np.float32))
    moved = np.empty((n, 33), np.uint8)
    c.collective("AllGather", held_by(c.rank, 33, dtype=np.uint8), moved, count=33, type=nccl.FLOAT8)
    equal(moved, np.stack([held_by(r, 33, dtype=np.uint8) for r in everyone]))


def messages(c: Communicator) -> None:
    """Point to point: a ring and many messages of every pair in one group; then sends that precede the receives."""
    n, previous, following = c.ranks, (c.rank - 1) % c.ranks, (c.rank + 1) % c.ranks
    large = 1_000_000
    sent = held_by(c.rank, large)  # NCCL reads what a group sends when the group ends
    c.library.ncclGroupStart()
    got = c.receive(np.empty(large, np.float32), previous)
    c.send(sent, following)
    mail = [c.receive(np.empty(5, np.float32), peer) for peer in range(n) for _ in range(100)]
    kept = [held_by(1000 * c.rank + 100 * peer + i, 5) for peer in range(n) for i in range(100)]
    for peer in range(n):
        for i in range(100):
            c.send(kept[100 * peer + i], peer)
    nccl.succeed(c.library.ncclGroupEnd())
    equal(got, held_by(previous, large))
    for peer in range(n):
        for i in range(100):
            equal(mail[100 * peer + i], held_by(1000 * peer + 100 * c.rank + i, 5))
    c.send(held_by(c.rank, large), following)  # not in a group, and everybody sends first
    equal(c.receive(np.empty(large, np.float32), previous), held_by(previous, large))


def groups(c: Communicator) -> None:
    """Several communicators at once: rows and columns of a grid, one of reversed order, one for half of the ranks."""
    width = 2
    row, column = c.split(c.rank // width, c.rank), c.split(c.rank % width, c.rank)
    backwards, half = c.split(0, -c.rank), c.split(0 if c.rank < c.ranks // 2 else nccl.NO_COLOR, 0)
    assert row and column and backwards and backwards.rank == c.ranks - 1 - c.rank
    assert (half is None) == (c.rank >= c.ranks // 2)
    for _ in range(20):
        for part, members in (
            (row, [r for r in range(c.ranks) if r // width == c.rank // width]),
            (column, [r for r in range(c.ranks) if r % width == c.rank % width]),
            (backwards, list(reversed(range(c.ranks)))),
        ):
            assert part.ranks == len(members)
            equal(
                part.all_reduce(held_by(c.rank, 50_000), nccl.SUM),
                in_rank_order([held_by(r, 50_000) for r in members], np.add),
            )
        equal(
            c.all_reduce(held_by(c.rank, 9), nccl.SUM),
            in_rank_order([held_by(r, 9) for r in range(c.ranks)], np.add),
        )
    for part in (row, column, backwards, half):
        if part:
            part.destroy()


def one_is_missing(c: Communicator) -> None:
    """The last rank stays away from a collective: the others must end, and say so."""
    if c.rank == c.ranks - 1:
        time.sleep(30)
    else:
        c.all_reduce(held_by(c.rank, 9), nccl.SUM)


def one_dies(c: Communicator) -> None:
    if c.rank == c.ranks - 1:
        os._exit(3)
    c.all_reduce(held_by(c.rank, 9), nccl.SUM)


def sizes_differ(c: Communicator) -> None:
    c.all_reduce(held_by(c.rank, 9 + c.rank), nccl.SUM)


def lengths_of_a_message_differ(c: Communicator) -> None:
    if c.rank == 0:
        c.send(held_by(0, 9), 1)
    else:
        c.receive(np.empty(8, np.float32), 0)


CASES = (
    reductions,
    movements,
    messages,
    groups,
    one_is_missing,
    one_dies,
    sizes_differ,
    lengths_of_a_message_differ,
)

if __name__ == "__main__":
    case = next(c for c in CASES if c.__name__ == sys.argv[1])
    world = Communicator.join(nccl.load(), Path(sys.argv[4]), int(sys.argv[2]), int(sys.argv[3]))
    case(world)
    world.destroy()
