"""config.json of published checkpoints (tests/hf_configs, README.md there): family, layers, parameter count."""

import math
from collections import Counter
from pathlib import Path

import pytest

from sead_megatron.models.architecture import HFConfig, Llama3Rope, Rope, YarnRope
from sead_megatron.models.family import WeightMap
from sead_megatron.models.hf_config import read_hf_config
from sead_megatron.models.registry import FAMILIES

CONFIGS = Path(__file__).parents[1] / "hf_configs"
LLAMA3 = Rope(5e5, Llama3Rope(8.0))
YARN = Rope(5e5, YarnRope(8.0, 8192, 32.0, 1.0, 1.2079441541679836))


def read(name: str) -> HFConfig:
    return read_hf_config(CONFIGS / name)


def parameters(config: HFConfig) -> int:
    shapes = WeightMap(FAMILIES[config.architecture], config).hf_shapes()
    return sum(math.prod(shape) for shape in shapes.values())


@pytest.mark.parametrize(
    ("name", "architecture", "num_layers", "published"),
    [
        ("nemotron_nano_8b", "LlamaForCausalLM", 32, 8.03e9),
        ("nemotron_super_49b", "DeciLMForCausalLM", 80, 49.87e9),
        ("olmo3_7b", "Olmo3ForCausalLM", 32, 7.30e9),
        ("olmo3_32b", "Olmo3ForCausalLM", 64, 32.2e9),
        ("qwen3_1p7b", "Qwen3ForCausalLM", 28, 1.72e9),
        ("qwen3_8b", "Qwen3ForCausalLM", 36, 8.19e9),
    ],
)
def test_family_layers_and_size(name: str, architecture: str, num_layers: int, published: float) -> None:
    config = read(name)
    assert (config.architecture, config.num_layers) == (architecture, num_layers)
    assert parameters(config) == pytest.approx(published, rel=0.005)


@pytest.mark.parametrize(
    ("name", "heads", "head_dim", "key_value_heads", "rope", "context", "tied"),
    [
        ("nemotron_nano_8b", 32, 128, (8,), LLAMA3, 131072, False),
        ("nemotron_super_49b", 64, 128, (8,), LLAMA3, 131072, False),
        ("olmo3_7b", 32, 128, (32,), YARN, 65536, False),
        ("olmo3_32b", 40, 128, (8,), YARN, 65536, False),
        ("qwen3_1p7b", 16, 128, (8,), Rope(1e6), 40960, True),
        ("qwen3_8b", 32, 128, (8,), Rope(1e6), 40960, False),
    ],
)
def test_attention_and_rope(
    name: str,
    heads: int,
    head_dim: int,
    key_value_heads: tuple[int, ...],
    rope: Rope,
    context: int,
    tied: bool,
) -> None:
    config = read(name)
    assert (config.num_attention_heads, config.head_dim) == (heads, head_dim)
    assert config.key_value_heads == key_value_heads
    assert (config.rope, config.max_position_embeddings) == (rope, context)
    assert config.tie_word_embeddings is tied


def test_blocks_of_nemotron_super_49b() -> None:
    config = read("nemotron_super_49b")
    assert Counter(layer.attention for layer in config.layers) == {"full": 49, "none": 31}
    assert {layer.mlp for layer in config.layers} == {"gated"}
    widths = {2816: 6, 5632: 8, 7168: 10, 14336: 6, 17920: 1, 28672: 49}
    assert Counter(layer.ffn_hidden_size for layer in config.layers) == widths
    assert config.eos_ids == (128001, 128008, 128009)
    assert FAMILIES[config.architecture].engine_limit(config) is None


@pytest.mark.parametrize(("name", "sliding", "full"), [("olmo3_7b", 24, 8), ("olmo3_32b", 48, 16)])
def test_windows_of_olmo3(name: str, sliding: int, full: int) -> None:
    config = read(name)
    assert Counter(layer.attention for layer in config.layers) == {"sliding": sliding, "full": full}
    assert [layer.attention for layer in config.layers[:4]] == ["sliding"] * 3 + ["full"]
    assert config.sliding_window == 4096
