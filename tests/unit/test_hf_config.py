"""config.json: every field, both spellings of rope, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from sead_megatron.errors import UserError
from sead_megatron.models.architecture import LayerConfig, Llama3Rope, Rope
from sead_megatron.models.hf_config import read_eos_ids, read_hf_config
from tests.tiny_inputs import LLAMA

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


SUPPORTED = "use a model of LlamaForCausalLM, DeciLMForCausalLM, Olmo3ForCausalLM or Qwen3ForCausalLM"


def write(directory: Path, **changes: Any) -> Path:
    content = {key: value for key, value in (LLAMA | changes).items() if value != "absent"}
    (directory / "config.json").write_text(json.dumps(content))
    return directory


def mistake(directory: Path) -> str:
    with pytest.raises(UserError) as error:
        read_hf_config(directory, "student.path")
    return str(error.value).replace(str(directory), "DIR")


def test_fields_and_defaults(tmp_path: Path) -> None:
    config = read_hf_config(write(tmp_path))
    assert (config.architecture, config.num_layers, config.hidden_size, config.head_dim) == (
        "LlamaForCausalLM",
        4,
        64,
        8,
    )
    assert config.num_attention_heads == 8
    assert config.layers == (LayerConfig("full", 4, "gated", 96),) * 4
    assert (config.vocab_size, config.max_position_embeddings, config.rms_norm_eps) == (8, 128, 1e-6)
    assert (config.rope, config.tie_word_embeddings) == (Rope(10000.0), False)
    assert config.eos_ids == (2,)
    assert config.raw["intermediate_size"] == 96


def test_stated_values(tmp_path: Path) -> None:
    config = read_hf_config(
        write(
            tmp_path,
            head_dim=16,
            num_key_value_heads="absent",
            tie_word_embeddings=True,
            attention_bias=False,
            mlp_bias=None,
            rms_norm_eps=1e-5,
            rope_theta=500000,
        )
    )
    assert (config.head_dim, config.key_value_heads, config.rms_norm_eps) == (16, (8,), 1e-5)
    assert config.rope == Rope(5e5)
    assert config.tie_word_embeddings


def test_both_spellings_of_llama3_rope(tmp_path: Path) -> None:
    old = read_hf_config(write(tmp_path, rope_theta=500000.0, rope_scaling=LLAMA3))
    new = read_hf_config(write(tmp_path, rope_parameters=LLAMA3 | {"rope_theta": 500000.0}))
    assert old.rope == new.rope == Rope(500000.0, Llama3Rope(32.0))
    plain = read_hf_config(write(tmp_path, rope_parameters={"rope_type": "default", "rope_theta": 1e5}))
    assert plain.rope == Rope(1e5)


def test_agrees_with_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.LlamaConfig(
        vocab_size=100, hidden_size=48, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2,
        intermediate_size=80, rope_parameters=LLAMA3 | {"rope_theta": 5e5}, max_position_embeddings=999,
        eos_token_id=[5, 7],
    )  # fmt: skip
    theirs.architectures = ["LlamaForCausalLM"]
    theirs.save_pretrained(tmp_path)
    ours = read_hf_config(tmp_path)
    assert (ours.num_layers, ours.head_dim, ours.key_value_heads) == (3, theirs.head_dim, (2,))
    assert ours.rope == Rope(5e5, Llama3Rope(32.0))
    assert (ours.rms_norm_eps, ours.tie_word_embeddings) == (theirs.rms_norm_eps, theirs.tie_word_embeddings)
    assert (ours.max_position_embeddings, ours.eos_ids) == (999, (5, 7))


def test_eos_ids_of_both_files_each_once(tmp_path: Path) -> None:
    write(tmp_path, eos_token_id=[5, 2])
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    assert read_eos_ids(tmp_path) == (5, 2, 7)
    write(tmp_path, eos_token_id=None)
    assert read_eos_ids(tmp_path) == (2, 7)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["MambaForCausalLM"]},
         'DIR/config.json: architectures = ["MambaForCausalLM"]: not a supported architecture; ' + SUPPORTED),
        ({"architectures": "absent"}, "DIR/config.json: architectures: missing; " + SUPPORTED),
        ({"hidden_size": "absent"}, "DIR/config.json: hidden_size: missing; correct config.json"),
        ({"num_hidden_layers": 2.5},
         "DIR/config.json: num_hidden_layers = 2.5: must be a positive integer; correct config.json"),
        ({"num_key_value_heads": 3},
         "DIR/config.json: num_key_value_heads = 3: must divide num_attention_heads (8); correct "
         "config.json"),
        ({"hidden_size": 60},
         "DIR/config.json: hidden_size = 60: must be a multiple of num_attention_heads (8); correct "
         "config.json"),
        ({"rms_norm_eps": "small"},
         'DIR/config.json: rms_norm_eps = "small": must be a positive number; correct config.json'),
        ({"tie_word_embeddings": "yes"},
         'DIR/config.json: tie_word_embeddings = "yes": must be true or false; correct config.json'),
        ({"partial_rotary_factor": 0.5},
         "DIR/config.json: partial_rotary_factor = 0.5: must be 1; use another model"),
        ({"hidden_act": "gelu"}, 'DIR/config.json: hidden_act = "gelu": must be "silu"; use another model'),
        ({"attention_bias": True},
         "DIR/config.json: attention_bias = true: biases are not supported; use another model"),
        ({"mlp_bias": True},
         "DIR/config.json: mlp_bias = true: biases are not supported; use another model"),
        ({"quantization_config": {"bits": 4}},
         "DIR/config.json: quantization_config: quantized weights; use the bfloat16 or float32 checkpoint"),
        ({"eos_token_id": "</s>"},
         'DIR/config.json: eos_token_id = "</s>": must be a token id or a list of them; correct it'),
        ({"rope_scaling": {"type": "linear", "factor": 2}},
         'DIR/config.json: rope_scaling.rope_type = "linear": not a supported rope scaling of this '
         'architecture; use a model with "llama3" scaling or none'),
        ({"rope_scaling": LLAMA3 | {"low_freq_factor": 2}},
         "DIR/config.json: rope_scaling.low_freq_factor = 2: must be 1, which Megatron-core fixes; use "
         "another model"),
        ({"rope_scaling": LLAMA3 | {"high_freq_factor": 8}},
         "DIR/config.json: rope_scaling.high_freq_factor = 8: must be 4, which Megatron-core fixes; use "
         "another model"),
        ({"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 4096}},
         "DIR/config.json: rope_parameters.original_max_position_embeddings = 4096: must be 8192, which "
         "Megatron-core "
         "fixes; use another model"),
        ({"rope_scaling": {key: value for key, value in LLAMA3.items() if key != "factor"}},
         "DIR/config.json: rope_scaling.factor: missing; correct config.json"),
        ({"rope_scaling": 3}, "DIR/config.json: rope_scaling = 3: must be an object; correct config.json"),
    ],
)  # fmt: skip
def test_what_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    assert mistake(write(tmp_path, **changes)) == message


def test_missing_and_broken_files(tmp_path: Path) -> None:
    remedy = "give a local Hugging Face directory"
    assert mistake(tmp_path / "none") == f'student.path = "DIR": no such directory; {remedy}'
    assert mistake(tmp_path) == f'student.path = "DIR": holds no config.json; {remedy}'
    (tmp_path / "config.json").write_text('{"a": 1,\n "b": }')
    assert mistake(tmp_path) == "DIR/config.json, line 2: not valid JSON (Expecting value); restore the file"
    (tmp_path / "config.json").write_text("[]")
    assert mistake(tmp_path) == "DIR/config.json: must hold a JSON object; restore the file"
