"""What each family reads from config.json, which tensors it expects, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sead_megatron.errors import UserError
from sead_megatron.models.architecture import LayerConfig, Rope, YarnRope
from sead_megatron.models.family import WeightMap
from sead_megatron.models.hf_config import read_hf_config
from sead_megatron.models.registry import FAMILIES
from sead_megatron.models.safetensors_index import read_index
from tests.tiny_families import (
    BLOCKS,
    SAVE_TINY,
    SERVED_BLOCKS,
    attention_block,
    ffn_block,
    save_tiny_nemotron_nas,
    save_tiny_olmo3,
    save_tiny_qwen3,
)


def edit(directory: Path, **changes: Any) -> Path:
    """Changes keys of config.json; None removes one."""
    path = directory / "config.json"
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    return directory


def mistake(directory: Path) -> str:
    with pytest.raises(UserError) as error:
        read_hf_config(directory)
    return str(error.value).replace(str(directory), "DIR")


@pytest.mark.parametrize("name", SAVE_TINY)
def test_expected_tensors_are_the_stored_ones(tmp_path: Path, name: str) -> None:
    """By name and shape, of models that transformers (Nemotron-NAS: the reference) has written."""
    directory = SAVE_TINY[name](tmp_path / name)
    config = read_hf_config(directory)
    stored = {name: entry.shape for name, entry in read_index(directory).tensors.items()}
    assert WeightMap(FAMILIES[config.architecture], config).hf_shapes() == stored


def test_layers_of_nemotron_nas(tmp_path: Path) -> None:
    config = read_hf_config(save_tiny_nemotron_nas(tmp_path / "model"))
    assert config.layers == (
        LayerConfig("full", 4, "gated", 256),
        LayerConfig("none", 0, "gated", 768),
        LayerConfig("linear", 0, "gated", 256),
        LayerConfig("full", 2, "linear", 0),
        LayerConfig("full", 4, "none", 0),
        LayerConfig("none", 0, "gated", 768),
    )
    assert config.key_value_heads == (2, 4) and config.ffn_hidden_sizes == (256, 768)


def test_a_width_can_be_given_instead_of_a_multiplier(tmp_path: Path) -> None:
    ffn = {key: value for key, value in ffn_block(1.0).items() if key != "ffn_mult"}
    blocks = [{"attention": attention_block(8), "ffn": ffn | {"intermediate_size": 160}}]
    directory = edit(save_tiny_nemotron_nas(tmp_path / "model"), block_configs=blocks, num_hidden_layers=1)
    assert read_hf_config(directory).layers == (LayerConfig("full", 1, "gated", 160),)


def _with(attention: dict[str, Any], ffn: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"attention": BLOCKS[0]["attention"] | attention, "ffn": BLOCKS[0]["ffn"] | ffn}, *BLOCKS[1:]]


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        (BLOCKS[:5], 'DIR/config.json: block_configs = "5 entries": must have one entry for each of '
                     "num_hidden_layers (6); correct config.json"),
        (_with({"n_heads_in_group": 3}, {}),
         "DIR/config.json: block_configs[0].attention.n_heads_in_group = 3: must divide num_attention_heads (8); "
         "correct config.json"),
        (_with({"window_length": 1024}, {}),
         "DIR/config.json: block_configs[0].attention.window_length = 1024: not supported; use another model"),
        (_with({"unshifted_sink": True}, {}),
         "DIR/config.json: block_configs[0].attention.unshifted_sink = true: not supported; use another model"),
        (_with({}, {"sparsify": [1]}),
         "DIR/config.json: block_configs[0].ffn.sparsify = [1]: not supported; use another model"),
        (_with({"use_prefill_window_in_sink_attention": True}, {}),
         "DIR/config.json: block_configs[0].attention.use_prefill_window_in_sink_attention = true: not supported; "
         "use another model"),
        (_with({}, {"hidden_act": "gelu"}),
         'DIR/config.json: block_configs[0].ffn.hidden_act = "gelu": must be "silu"; use another model'),
        (_with({}, {"gated": False}),
         "DIR/config.json: block_configs[0].ffn.gated = false: must be true; use another model"),
        (_with({}, {"ffn_mult": 1.5, "intermediate_size": 512}),
         "DIR/config.json: block_configs[0].ffn.intermediate_size = 512: ffn_mult (1.5) makes it 256; "
         "correct config.json"),
        (_with({}, {"ffn_mult": -1}),
         "DIR/config.json: block_configs[0].ffn.ffn_mult = -1: must be a positive number; correct config.json"),
        (_with({"n_heads_in_group": None}, {}),
         "DIR/config.json: block_configs[0].attention.n_heads_in_group: missing; correct config.json"),
        ("none", "DIR/config.json: block_configs: must be a list of objects; correct config.json"),
    ],
)  # fmt: skip
def test_blocks_that_are_refused(tmp_path: Path, blocks: Any, message: str) -> None:
    directory = edit(save_tiny_nemotron_nas(tmp_path / "model"), block_configs=blocks)
    assert mistake(directory) == message


@pytest.mark.parametrize(
    ("blocks", "limit"),
    [
        (SERVED_BLOCKS, None),
        (BLOCKS, "it has sublayers that are replaced by a matrix"),
        ([BLOCKS[1], BLOCKS[0]], "its first layer has no attention"),
    ],
)
def test_what_vllm_can_serve(tmp_path: Path, blocks: Any, limit: str | None) -> None:
    config = read_hf_config(save_tiny_nemotron_nas(tmp_path / "model", block_configs=blocks))
    assert FAMILIES[config.architecture].engine_limit(config) == limit


YARN = YarnRope(8.0, 8192, 32.0, 1.0, 1.2079441541679836)


def _as_published(directory: Path) -> Path:
    """The keys of the published checkpoints: one rope_theta, one rope_scaling, meant for full attention."""
    scaling = json.loads((directory / "config.json").read_text())["rope_parameters"]["full_attention"]
    theta = scaling.pop("rope_theta")
    return edit(directory, rope_parameters=None, rope_scaling=scaling, rope_theta=theta)


def _yarn_on_both(directory: Path) -> Path:
    rope = json.loads((directory / "config.json").read_text())["rope_parameters"]
    return edit(directory, rope_parameters=rope | {"sliding_attention": rope["full_attention"]})


@pytest.mark.parametrize(
    ("change", "rope"),
    [
        (lambda directory: directory, Rope(5e5, YARN)),
        (_as_published, Rope(5e5, YARN)),
        (_yarn_on_both, Rope(5e5, YARN, scales_sliding_layers=True)),
        (lambda directory: edit(directory, rope_parameters=None, rope_theta=1e4), Rope(1e4)),
    ],
)
def test_both_spellings_of_olmo3s_rope(tmp_path: Path, change: Callable[[Path], Path], rope: Rope) -> None:
    assert read_hf_config(change(save_tiny_olmo3(tmp_path / "model"))).rope == rope


def test_layers_of_olmo3(tmp_path: Path) -> None:
    """Three sliding layers, one full; the rule also where the file has no layer_types."""
    directory = save_tiny_olmo3(tmp_path / "model")
    given = read_hf_config(directory)
    assert [layer.attention for layer in given.layers] == ["sliding", "sliding", "sliding", "full"]
    assert given.sliding_window == 7
    assert read_hf_config(edit(directory, layer_types=None)).layers == given.layers
    full = read_hf_config(edit(directory, layer_types=["full_attention"] * 4))
    assert full.sliding_window is None


def _rope_section(kind: str, **changes: Any) -> dict[str, Any]:
    plain = {"rope_type": "default", "rope_theta": 5e5}
    yarn = {"rope_type": "yarn", "rope_theta": 5e5, "factor": 8.0, "original_max_position_embeddings": 8192}
    sections = {"sliding_attention": plain, "full_attention": yarn | {"attention_factor": 1.2}}
    return sections | {kind: sections[kind] | changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_types": ["full_attention"]},
         'DIR/config.json: layer_types = ["full_attention"]: must be 4 times "full_attention" or '
         '"sliding_attention"; correct config.json'),
        ({"sliding_window": None}, "DIR/config.json: sliding_window: missing; correct config.json"),
        ({"rope_parameters": _rope_section("sliding_attention", rope_theta=1e4)},
         "DIR/config.json: rope_parameters.sliding_attention.rope_theta = 10000.0: must be that of full_attention "
         "(500000): Megatron-core has one base a model; use another model"),
        ({"rope_parameters": _rope_section("sliding_attention", rope_type="yarn", factor=2.0,
                                           original_max_position_embeddings=8192, attention_factor=1.1)},
         'DIR/config.json: rope_parameters.sliding_attention.rope_type = "yarn": must be that of full_attention, or '
         "default; use another model"),
        ({"rope_parameters": _rope_section("full_attention", rope_type="llama3")},
         'DIR/config.json: rope_parameters.full_attention.rope_type = "llama3": not a supported rope scaling of this '
         'architecture; use a model with "yarn" scaling or none'),
        ({"rope_parameters": _rope_section("full_attention", attention_factor=None)},
         "DIR/config.json: rope_parameters.full_attention.attention_factor: missing; correct config.json"),
        ({"rope_parameters": _rope_section("full_attention", mscale=0.7)},
         "DIR/config.json: rope_parameters.full_attention.mscale = 0.7: not supported: give attention_factor; use "
         "another model"),
        ({"rope_parameters": _rope_section("full_attention", truncate=False)},
         "DIR/config.json: rope_parameters.full_attention.truncate = false: must be true; use another model"),
    ],
)  # fmt: skip
def test_what_olmo3_refuses(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    assert mistake(edit(save_tiny_olmo3(tmp_path / "model"), **changes)) == message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_sliding_window": True},
         "DIR/config.json: use_sliding_window = true: not supported for this architecture; use another model"),
        ({"layer_types": ["full_attention"] * 3 + ["sliding_attention"]},
         'DIR/config.json: layer_types = ["full_attention", "full_attention", "full_attention", "sliding_attention"]: '
         'must all be "full_attention"; use another model'),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}},
         'DIR/config.json: rope_parameters.rope_type = "yarn": not a supported rope scaling of this architecture; '
         "use a model with none"),
    ],
)  # fmt: skip
def test_what_qwen3_refuses(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    assert mistake(edit(save_tiny_qwen3(tmp_path / "model"), **changes)) == message
