"""Reads config.json of a Hugging Face directory. Torch-free: it runs before anything heavy is imported."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sead_megatron.errors import UserError, alternatives

SUPPORTED_ARCHITECTURES = ("LlamaForCausalLM",)

# Megatron-core's llama3 rope scaling takes only the factor; these three are constants in its code.
_LLAMA3_CONSTANTS = {"low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 8192}


@dataclass(frozen=True)
class HFConfig:
    """What the trainer needs to know of a model; `raw` is the whole config.json."""

    architecture: str
    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    ffn_hidden_size: int
    vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: dict[str, Any] | None
    """None, or llama3's: `rope_type`, `factor` and the three constants."""
    max_position_embeddings: int
    tie_word_embeddings: bool
    eos_ids: tuple[int, ...]
    """End-of-sequence ids of config.json, then further ones of generation_config.json (chat models list
    several)."""
    raw: dict[str, object]


def read_json_object(path: Path) -> dict[str, object]:
    """A JSON file that holds an object. Raises UserError with the line of a mistake."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}, line {error.lineno}", None, f"not valid JSON ({error.msg})", "restore the file"
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(str(path), None, f"not UTF-8 (byte {error.start})", "restore the file") from error
    if not isinstance(content, dict):
        raise UserError(str(path), None, "must hold a JSON object", "restore the file")
    return content


def read_hf_config(
    directory: str | Path, what: str = "model", supported: tuple[str, ...] = SUPPORTED_ARCHITECTURES
) -> HFConfig:
    """Read `directory`/config.json; `what` is the field that names the directory, for errors.

    Raises UserError: no directory, no config.json, missing or ill-typed keys, an architecture not in
    `supported`, quantized weights, an activation other than SiLU, biases, a rope scaling that Megatron-core does not
    compute.
    """
    path = Path(directory) / "config.json"
    if not path.parent.is_dir():
        raise UserError(what, str(directory), "no such directory", "give a local Hugging Face directory")
    if not path.is_file():
        raise UserError(what, str(directory), "holds no config.json", "give a local Hugging Face directory")
    raw = read_json_object(path)
    reader = _Reader(raw, path)
    architecture = _architecture(raw, path, supported)
    reader.refuse_variants()
    hidden_size = reader.integer("hidden_size")
    heads = reader.integer("num_attention_heads")
    key_value_heads = reader.integer("num_key_value_heads", heads)
    if heads % key_value_heads:
        raise reader.error(
            "num_key_value_heads", key_value_heads, f"must divide num_attention_heads ({heads})"
        )
    if raw.get("head_dim") is None and hidden_size % heads:
        raise reader.error("hidden_size", hidden_size, f"must be a multiple of num_attention_heads ({heads})")
    return HFConfig(
        architecture=architecture,
        num_layers=reader.integer("num_hidden_layers"),
        hidden_size=hidden_size,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        head_dim=reader.integer("head_dim", hidden_size // heads),
        ffn_hidden_size=reader.integer("intermediate_size"),
        vocab_size=reader.integer("vocab_size"),
        rms_norm_eps=reader.number("rms_norm_eps", 1e-6),
        rope_theta=reader.rope_theta(),
        rope_scaling=reader.rope_scaling(),
        max_position_embeddings=reader.integer("max_position_embeddings", 2048),
        tie_word_embeddings=reader.flag("tie_word_embeddings"),
        eos_ids=read_eos_ids(directory),
        raw=raw,
    )


def read_eos_ids(directory: str | Path) -> tuple[int, ...]:
    """End-of-sequence ids named by config.json and generation_config.json, each once, in this order."""
    ids: list[int] = []
    for name in ("config.json", "generation_config.json"):
        path = Path(directory) / name
        if not path.is_file():
            continue
        value = read_json_object(path).get("eos_token_id")
        for token in value if isinstance(value, list) else [] if value is None else [value]:
            if not isinstance(token, int) or isinstance(token, bool) or token < 0:
                constraint = "must be a token id or a list of them"
                raise UserError(f"{path}: eos_token_id", value, constraint, "correct it")
            if token not in ids:
                ids.append(token)
    return tuple(ids)


def _architecture(raw: dict[str, object], path: Path, supported: tuple[str, ...]) -> str:
    names = raw.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    if not isinstance(name, str) or name not in supported:
        raise UserError(
            f"{path}: architectures",
            names,
            "not a supported architecture" if names else "missing",
            f"use a model of {alternatives(supported)}",
        )
    return name


@dataclass(frozen=True)
class _Reader:
    """Typed access to the keys of one config.json. `default` also stands for an explicit null."""

    raw: dict[str, object]
    path: Path

    def error(
        self, key: str, value: object, constraint: str, remedy: str = "correct config.json"
    ) -> UserError:
        return UserError(f"{self.path}: {key}", value, constraint, remedy)

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.raw.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.error(key, value, "must be a positive integer" if value is not None else "missing")
        return value

    def number(self, key: str, default: float) -> float:
        return self._positive(key, self.raw.get(key), default)

    def _positive(self, key: str, value: object, default: float) -> float:
        if value is None:
            return default
        if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
            raise self.error(key, value, "must be a positive number")
        return float(value)

    def flag(self, key: str) -> bool:
        value = self.raw.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.error(key, value, "must be true or false")
        return bool(value)

    def refuse_variants(self) -> None:
        """Variants that would load and then compute something else."""
        if self.raw.get("quantization_config") is not None:
            raise self.error(
                "quantization_config", None, "quantized weights", "use the bfloat16 or float32 checkpoint"
            )
        activation = self.raw.get("hidden_act", "silu")
        if activation != "silu":
            raise self.error("hidden_act", activation, 'must be "silu"', "use another model")
        for key in ("attention_bias", "mlp_bias"):
            if self.flag(key):
                raise self.error(key, True, "biases are not supported", "use another model")

    def _rope(self) -> dict[str, object]:
        """`rope_parameters` (transformers 5) or `rope_scaling` (before), empty when there is neither."""
        for key in ("rope_parameters", "rope_scaling"):
            value = self.raw.get(key)
            if value is not None:
                if not isinstance(value, dict):
                    raise self.error(key, value, "must be an object")
                return value
        return {}

    def rope_theta(self) -> float:
        nested = self._rope().get("rope_theta")
        return self._positive("rope_theta", self.raw.get("rope_theta") if nested is None else nested, 10000.0)

    def rope_scaling(self) -> dict[str, Any] | None:
        rope = self._rope()
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind == "default":
            return None
        if kind != "llama3":
            raise self.error(
                "rope scaling", kind, "not supported", 'use a model with "llama3" scaling or none'
            )
        for key, fixed in _LLAMA3_CONSTANTS.items():
            if rope.get(key) != fixed:
                raise self.error(
                    f"rope scaling {key}",
                    rope.get(key),
                    f"must be {fixed}, which Megatron-core fixes",
                    "use another model",
                )
        if "factor" not in rope:
            raise self.error("rope scaling factor", None, "missing")
        factor = self._positive("rope scaling factor", rope["factor"], 1.0)
        return {"rope_type": "llama3", "factor": factor, **_LLAMA3_CONSTANTS}
