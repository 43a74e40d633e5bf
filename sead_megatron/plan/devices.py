"""What a GPU can do, from NVIDIA's data sheets, and what of that the plan counts on. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, replace

GIB = 1 << 30


@dataclass(frozen=True)
class Device:
    """One rank's processor and its links, per direction."""

    name: str
    memory_bytes: int
    """What the driver shows as total."""
    bf16_flops: float
    """Dense tensor-core peak, FLOP/s."""
    fp8_flops: float
    memory_bandwidth: float
    """Bytes/s."""
    link_bandwidth: float
    """NVLink to the other GPUs of the node, bytes/s."""
    network_bandwidth: float
    """Its share of the node's network, bytes/s."""
    gpus_per_node: int = 8


# Memory as nvidia-smi shows it (MiB); rates from the data sheets of the SXM boards; one 400 Gb/s port a GPU.
DEVICES = {
    "a100": Device("A100 80GB", 81920 << 20, 312e12, 312e12, 2.04e12, 300e9, 25e9),
    "h100": Device("H100 80GB", 81559 << 20, 989e12, 1979e12, 3.35e12, 450e9, 50e9),
    "h200": Device("H200", 143771 << 20, 989e12, 1979e12, 4.8e12, 450e9, 50e9),
    "b200": Device("B200", 183359 << 20, 2250e12, 4500e12, 8.0e12, 900e9, 50e9),
}


def device_with_memory(name: str, memory_bytes: int) -> Device:
    """A GPU of which only the memory matters."""
    return replace(DEVICES["h100"], name=name, memory_bytes=memory_bytes)
