"""Which model a directory holds, without reading its weights. Torch-free."""

from __future__ import annotations

import hashlib
from pathlib import Path

from sead_megatron.models.converted import DCP_METADATA, MARKER, config_hash, is_distributed
from sead_megatron.models.safetensors_index import read_index


def model_identity(directory: str) -> dict[str, str]:
    """Hashes of config.json and of the weights' index, which tell models apart but for the values of the weights."""
    return {
        "config_sha256": config_hash(directory),
        "weights_index_sha256": weights_index_hash(directory),
    }


def weights_index_hash(directory: str) -> str:
    """Of names, types, shapes and places of the tensors: hashing the weights of a large model takes minutes."""
    digest = hashlib.sha256()
    if is_distributed(directory):
        for name in (MARKER, DCP_METADATA):
            digest.update((Path(directory) / name).read_bytes())
        return digest.hexdigest()
    for name, entry in sorted(read_index(directory).tensors.items()):
        digest.update(
            repr((name, entry.file.name, entry.dtype, entry.shape, entry.start, entry.end)).encode()
        )
    return digest.hexdigest()
