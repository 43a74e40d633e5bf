"""FLOPs of a step against a hand value."""

from pathlib import Path

import torch

from sead_megatron.models.hf_config import read_hf_config
from sead_megatron.training.flops import device_peak_flops, matmul_parameters, step_flops
from tests.tiny_models import save_tiny_llama


def test_flops_of_a_tiny_model(tmp_path: Path) -> None:
    """Hidden 64, 8 heads and 4 KV heads of 16, FFN 160, 4 layers, vocabulary 250, counted by hand."""
    config = read_hf_config(save_tiny_llama(tmp_path / "model"))
    layer = 64 * 128 + 2 * 64 * 64 + 128 * 64 + 3 * 64 * 160
    assert matmul_parameters(config) == 4 * layer + 250 * 64 == 237_184
    assert step_flops(config, 1000, [(config, 1000)]) == 8 * 237_184 * 1000
    assert step_flops(config, 1000, [(config, 200), (config, 300)]) == (6 * 1000 + 2 * 500) * 237_184


def test_a_cpu_has_no_peak() -> None:
    assert device_peak_flops(torch.device("cpu")) is None
