"""The fake CUDA, without torch: memory, counters, graphs, entry points, and NCCL between processes against numpy."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

if "FAKE_CUDA_LIB" not in os.environ:
    pytest.skip("the fake CUDA is not built: `make rehearse` builds and tests it", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).parent))
import nccl_library as nccl
from nccl_library import pointer, succeed

MIB = 1 << 20
CAP_MIB = 64
os.environ["FAKE_GPU_MIB"] = str(CAP_MIB)
os.environ["FAKE_GPUS"] = "3"
CUDA = nccl.load()
OUT_OF_MEMORY, INVALID_VALUE, INVALID_CONFIGURATION, CAPTURE_UNSUPPORTED = 2, 1, 9, 900


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Device 0, counters at zero; and nothing may be held when a test ends."""
    succeed(CUDA.cudaSetDevice(0))
    CUDA.cudaGetLastError()
    CUDA.fake_reset_counters()
    yield
    assert [CUDA.fake_memory_used(d) for d in range(3)] == [0, 0, 0]


def counted(*names: str) -> list[int]:
    return [CUDA.fake_counter(name.encode()) for name in names]


def allocate(size: int) -> ctypes.c_void_p:
    address = ctypes.c_void_p()
    succeed(CUDA.cudaMalloc(ctypes.byref(address), ctypes.c_size_t(size)))
    return address


def copy(
    to: ctypes.c_void_p, source: ctypes.c_void_p, size: int, stream: ctypes.c_void_p | None = None
) -> int:
    by_addresses = 4
    return int(CUDA.cudaMemcpyAsync(to, source, ctypes.c_size_t(size), by_addresses, stream))


def test_memory_starts_as_zeros_and_keeps_what_is_copied() -> None:
    sent, got = np.arange(1000, dtype=np.float32), np.full(1000, 7, np.float32)
    device = allocate(sent.nbytes)
    succeed(copy(pointer(got), device, got.nbytes))
    assert not got.any()
    succeed(copy(device, pointer(sent), sent.nbytes))
    succeed(copy(pointer(got), device, got.nbytes))
    np.testing.assert_array_equal(got, sent)
    np.testing.assert_array_equal(np.frombuffer(ctypes.string_at(device, sent.nbytes), np.float32), sent)
    succeed(CUDA.cudaFree(device))


def test_cap_is_of_a_device_and_leaves_an_error_behind() -> None:
    first = allocate(40 * MIB)
    second = ctypes.c_void_p()
    assert CUDA.cudaMalloc(ctypes.byref(second), ctypes.c_size_t(30 * MIB)) == OUT_OF_MEMORY
    assert [CUDA.cudaPeekAtLastError(), CUDA.cudaGetLastError(), CUDA.cudaGetLastError()] == [
        OUT_OF_MEMORY,
        OUT_OF_MEMORY,
        0,
    ]
    succeed(CUDA.cudaSetDevice(2))
    second = allocate(30 * MIB + 1)
    assert [CUDA.fake_memory_used(d) for d in range(3)] == [40 * MIB, 0, 32 * MIB]
    succeed(CUDA.cudaFree(first))
    succeed(CUDA.cudaFree(second))
    assert CUDA.fake_memory_peak(0) == 40 * MIB
    CUDA.fake_reset_peaks()
    assert CUDA.fake_memory_peak(0) == 0
    assert [CUDA.fake_has_context(d) for d in range(3)] == [1, 0, 1]


def test_copies_past_the_end_of_a_block_are_refused() -> None:
    device, host = allocate(512), np.zeros(1024, np.uint8)
    assert copy(device, pointer(host), 513) == INVALID_VALUE
    assert copy(pointer(host), ctypes.c_void_p(device.value + 500), 13) == INVALID_VALUE
    assert CUDA.cudaMemset(device, 0, ctypes.c_size_t(513)) == INVALID_VALUE
    succeed(CUDA.cudaFree(device))


def test_fills_of_any_size_and_value() -> None:
    device = allocate(8 * MIB)
    for value in (9, 0):
        succeed(CUDA.cudaMemset(device, value, ctypes.c_size_t(8 * MIB)))
        inner = ctypes.c_void_p(device.value + 3)
        succeed(CUDA.cudaMemset(inner, 9 - value, ctypes.c_size_t(4 * MIB)))
        got = np.frombuffer(ctypes.string_at(device, 8 * MIB), np.uint8)
        assert (got[3 : 3 + 4 * MIB] == 9 - value).all()
        assert (got[:3] == value).all() and (got[3 + 4 * MIB :] == value).all()
    succeed(CUDA.cudaFree(device))


def test_waits_and_copies_are_counted_by_kind() -> None:
    device, pageable, pinned, event = (
        allocate(100),
        np.zeros(100, np.uint8),
        ctypes.c_void_p(),
        ctypes.c_void_p(),
    )
    succeed(CUDA.cudaHostAlloc(ctypes.byref(pinned), ctypes.c_size_t(100), 0))
    assert CUDA.fake_pinned_used() == 100
    CUDA.fake_reset_counters()
    for host in (pinned, pointer(pageable)):
        succeed(copy(device, host, 100))
        succeed(copy(host, device, 100))
        succeed(copy(host, device, 100))
    succeed(copy(device, device, 100))
    assert counted("copies_h2d", "copies_d2h", "copies_d2d", "pageable_h2d", "pageable_d2h", "bytes_d2h") == [
        2,
        4,
        1,
        1,
        2,
        400,
    ]
    assert counted("sync_memcpy", "sync_stream", "sync_event", "sync_device", "sync_free") == [0] * 5
    succeed(CUDA.cudaMemcpy(pointer(pageable), device, ctypes.c_size_t(100), 2))
    succeed(CUDA.cudaStreamSynchronize(None))
    succeed(CUDA.cudaEventCreate(ctypes.byref(event)))
    succeed(CUDA.cudaEventSynchronize(event))
    succeed(CUDA.cudaDeviceSynchronize())
    succeed(CUDA.cudaFree(device))
    succeed(CUDA.cudaFreeHost(pinned))
    assert counted("sync_memcpy", "sync_stream", "sync_event", "sync_device", "sync_free") == [1, 1, 1, 1, 2]
    assert counted("pageable_d2h") == [2], "a copy that is blocking by its name is a wait, not a pageable one"
    assert CUDA.fake_pinned_used() == 0
    CUDA.fake_reset_counters()
    assert counted("copies_d2h", "no such counter") == [0, -1]


def test_a_captured_copy_is_made_at_every_launch() -> None:
    device, source, stream, graph, launchable = (
        allocate(4),
        np.array([1], np.int32),
        ctypes.c_void_p(),
        ctypes.c_void_p(),
        ctypes.c_void_p(),
    )
    succeed(CUDA.cudaStreamCreate(ctypes.byref(stream)))
    succeed(CUDA.cudaStreamBeginCapture(stream, 0))
    succeed(copy(device, pointer(source), 4, stream))
    assert CUDA.cudaStreamSynchronize(stream) == CAPTURE_UNSUPPORTED
    succeed(CUDA.cudaStreamEndCapture(stream, ctypes.byref(graph)))
    succeed(CUDA.cudaGraphInstantiate(ctypes.byref(launchable), graph, ctypes.c_ulonglong(0)))
    succeed(CUDA.cudaGraphDestroy(graph))
    seen = [int.from_bytes(ctypes.string_at(device, 4), "little")]
    for value in (5, 6):
        source[0] = value
        succeed(CUDA.cudaGraphLaunch(launchable, stream))
        seen.append(int.from_bytes(ctypes.string_at(device, 4), "little"))
    assert seen == [0, 5, 6]
    assert counted("graph_launches") == [2]
    succeed(CUDA.cudaStreamSynchronize(stream))
    succeed(CUDA.cudaGraphExecDestroy(launchable))
    succeed(CUDA.cudaFree(device))


def test_launches_are_checked_and_counted() -> None:
    def launch(grid: int, block: int, shared: int) -> int:
        return int(CUDA.cuLaunchKernel(None, grid, 1, 1, block, 1, 1, shared, None, None, None))

    assert launch(4, 128, 0) == 0
    assert launch(0, 128, 0) == INVALID_VALUE, "an empty grid"
    assert launch(4, 2048, 0) == INVALID_VALUE, "too many threads"
    assert launch(4, 128, 300_000) == INVALID_VALUE, "more shared memory than a multiprocessor has"
    assert counted("launches") == [1]
    assert CUDA.cudaGetLastError() == INVALID_CONFIGURATION


class AllocationProperties(ctypes.Structure):
    """CUmemAllocationProp: pinned memory on a device."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("handle_types", ctypes.c_int),
        ("location_type", ctypes.c_int),
        ("device", ctypes.c_int),
        ("rest", ctypes.c_char * 64),
    )


def test_a_physical_handle_keeps_its_contents_between_mappings() -> None:
    size, handle, places = (
        ctypes.c_size_t(4 * MIB),
        ctypes.c_ulonglong(),
        [ctypes.c_ulonglong() for _ in range(2)],
    )
    properties = AllocationProperties(1, 0, 1, 1)
    for place in places:
        succeed(
            CUDA.cuMemAddressReserve(
                ctypes.byref(place), size, ctypes.c_size_t(0), ctypes.c_ulonglong(0), ctypes.c_ulonglong(0)
            )
        )
    too_large = ctypes.c_size_t((CAP_MIB + 2) * MIB)
    assert (
        CUDA.cuMemCreate(ctypes.byref(handle), too_large, ctypes.byref(properties), ctypes.c_ulonglong(0))
        == OUT_OF_MEMORY
    )
    succeed(CUDA.cuMemCreate(ctypes.byref(handle), size, ctypes.byref(properties), ctypes.c_ulonglong(0)))
    assert [CUDA.fake_memory_used(d) for d in range(2)] == [0, 4 * MIB]
    for i, place in enumerate(places):
        succeed(CUDA.cuMemMap(place, size, ctypes.c_size_t(0), handle, ctypes.c_ulonglong(0)))
        assert ctypes.string_at(place.value, 1) == bytes([i])
        ctypes.memset(place.value, i + 1, 4 * MIB)
        if i == 1:
            succeed(CUDA.cuMemRelease(handle))  # while mapped: it lives on
            assert CUDA.fake_memory_used(1) == 4 * MIB
        succeed(CUDA.cuMemUnmap(place, size))
    assert CUDA.fake_memory_used(1) == 0
    for place in places:
        succeed(CUDA.cuMemAddressFree(place, size))


def test_entry_points_are_found_by_name() -> None:
    address, status = ctypes.c_void_p(), ctypes.c_int()
    version, flags = 13000, ctypes.c_ulonglong(0)
    succeed(
        CUDA.cuGetProcAddress_v2(
            b"cuDeviceGetCount", ctypes.byref(address), version, flags, ctypes.byref(status)
        )
    )
    devices = ctypes.c_int()
    succeed(
        ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_int))(address.value)(ctypes.byref(devices))
    )
    assert devices.value == 3
    assert (
        CUDA.cuGetProcAddress_v2(
            b"cuNoSuchThing", ctypes.byref(address), version, flags, ctypes.byref(status)
        )
        != 0
    )
    assert not address.value
    succeed(CUDA.nvmlDeviceGetCount_v2(ctypes.byref(devices)))
    assert devices.value == 3


def start(case: str, ranks: int, directory: Path, **environment: str) -> list[subprocess.Popen[str]]:
    program = Path(__file__).with_name("nccl_rank.py")
    return [
        subprocess.Popen(
            [sys.executable, program, case, str(rank), str(ranks), directory / "id"],
            env=os.environ | {"FAKE_NCCL_CHUNK_MIB": "1", "OMP_NUM_THREADS": "1"} | environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]


@pytest.mark.parametrize("ranks", (2, 4))
@pytest.mark.parametrize("case", ("reductions", "movements", "messages", "groups"))
def test_nccl_against_numpy(case: str, ranks: int, tmp_path: Path) -> None:
    for process in start(case, ranks, tmp_path):
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    assert not [name for name in os.listdir("/dev/shm") if "nccl" in name]


@pytest.mark.parametrize(
    ("case", "words"),
    (
        (
            "one_is_missing",
            ("rank 0 waits in AllReduce #1, float32[9] sum", "no answer for 2 s", "rank 1 (pid ", "joining"),
        ),
        ("one_dies", ("rank 1 has ended",)),
        (
            "sizes_differ",
            (
                "different collectives",
                "rank 0: AllReduce #1, float32[9]",
                "rank 1: AllReduce #1, float32[10]",
            ),
        ),
        ("lengths_of_a_message_differ", ("rank 1 receives 32 bytes from rank 0, which sent 36",)),
    ),
)
def test_ranks_that_disagree_end_with_a_word(case: str, words: tuple[str, ...], tmp_path: Path) -> None:
    first, second = start(case, 2, tmp_path, FAKE_NCCL_TIMEOUT="2")
    speaker = second if case.startswith("lengths") else first
    try:
        _, errors = speaker.communicate(timeout=25)
        assert speaker.returncode == -6, errors
        for word in words:
            assert word in errors
    finally:
        for process in (first, second):
            process.kill()
            process.communicate()


def test_a_rank_alone_plays_one_of_many(tmp_path: Path) -> None:
    program = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
import numpy as np, nccl_library as nccl
from pathlib import Path
world = nccl.Communicator.join(nccl.load(), Path({str(tmp_path / "id")!r}), 0, 32)
got = world.collective("AllGather", np.arange(3, dtype=np.float32), np.zeros((32, 3), np.float32), count=3)
assert (got == np.arange(3)).all()
assert (world.all_reduce(np.arange(3, dtype=np.float32), nccl.SUM) == np.arange(3)).all()
part = world.split(0, 0)
assert (part.ranks, part.rank) == (8, 3)
world.send(np.zeros(3), 1)
"""
    environment = os.environ | {"FAKE_NCCL": "alone", "FAKE_SPLIT_RANKS": "8", "FAKE_SPLIT_RANK": "3"}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True, timeout=30)
