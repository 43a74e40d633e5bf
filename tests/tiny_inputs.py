"""Input files of a run, small and valid, for tests that then break one thing."""

import json
import struct
from pathlib import Path
from typing import Any

import yaml

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 96,
    "vocab_size": 8,
    "max_position_embeddings": 128,
    "eos_token_id": 2,
}
WORDS = ["<unk>", "<s>", "</s>", "one", "plus", "two", "is", "three"]
TEMPLATE = "<s>{% for m in messages %}{{ m.content }} {% endfor %}{% if add_generation_prompt %}is{% endif %}"


def write_safetensors(path: Path, shapes: dict[str, list[int]], **changes: Any) -> None:
    """Zeros of float32; `changes` replace keys of the header entry of the first tensor."""
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        size = 4
        for dimension in shape:
            size *= dimension
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    header[next(iter(shapes))].update(changes)
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(end))


def write_tokenizer_json(directory: Path, words: list[str] = WORDS, template: str | None = TEMPLATE) -> None:
    """A whitespace word-level tokenizer; `words` in id order, the first three special."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in words[:3]])
    # Plain texts get a BOS, as in the Llama family; a chat template writes its own.
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": template}))


def llama_shapes(**changes: Any) -> dict[str, list[int]]:
    """The tensors of `LLAMA` with `changes`, whose heads are hidden_size / num_attention_heads wide."""
    config = LLAMA | changes
    hidden, ffn, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    keys = hidden * config["num_key_value_heads"] // config["num_attention_heads"]
    layer = {
        "input_layernorm": [hidden],
        "post_attention_layernorm": [hidden],
        "self_attn.q_proj": [hidden, hidden],
        "self_attn.k_proj": [keys, hidden],
        "self_attn.v_proj": [keys, hidden],
        "self_attn.o_proj": [hidden, hidden],
        "mlp.gate_proj": [ffn, hidden],
        "mlp.up_proj": [ffn, hidden],
        "mlp.down_proj": [hidden, ffn],
    }
    shapes = {"model.norm.weight": [hidden], "model.embed_tokens.weight": [vocabulary, hidden]}
    if not config.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = [vocabulary, hidden]
    for number in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{number}.{name}.weight": shape for name, shape in layer.items()}
    return shapes


def write_model(directory: Path, **config: Any) -> Path:
    """A Hugging Face directory whose weights are a header and zeros."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(LLAMA | config))
    write_safetensors(directory / "model.safetensors", llama_shapes(**config))
    write_tokenizer_json(directory)
    return directory


def write_jsonl(path: Path, entries: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def minimal(directory: Path) -> dict[str, Any]:
    """The required fields only."""
    return {
        "run_dir": str(directory / "run"),
        "steps": 4,
        "student": {"path": str(directory / "student")},
        "teacher": {"path": str(directory / "teacher")},
        "data": {"prompts": str(directory / "prompts.jsonl"), "prompts_per_step": 4},
        "rollout": {"max_new_tokens": 16, "max_model_len": 64},
        "batch": {"max_tokens_per_microbatch": 64},
        "curriculum": {"difficulty": str(directory / "difficulty.jsonl")},
    }


def write_inputs(directory: Path) -> Path:
    """Models, prompts, difficulties and a config.yaml that passes every check; returns the latter."""
    for name in ("student", "teacher"):
        write_model(directory / name)
    ids = [f"p{number}" for number in range(8)]
    write_jsonl(
        directory / "prompts.jsonl", [{"id": i, "prompt": "one plus two", "answer": "3"} for i in ids]
    )
    write_jsonl(directory / "difficulty.jsonl", [{"id": i, "difficulty": 0.5} for i in ids])
    path = directory / "config.yaml"
    path.write_text(yaml.safe_dump(minimal(directory)))
    return path
