"""Reads config.json of a Hugging Face directory. Torch-free: it runs before anything heavy is imported."""

from pathlib import Path

from sead_megatron.errors import UserError, alternatives
from sead_megatron.models.architecture import HFConfig
from sead_megatron.models.config_reader import ConfigReader, read_json_object
from sead_megatron.models.registry import FAMILIES


def read_hf_config(directory: str | Path, what: str = "model") -> HFConfig:
    """Read `directory`/config.json; `what` is the field that names the directory, for errors.

    Raises UserError: no directory, no config.json, missing or ill-typed keys, an unsupported architecture, quantized
    weights, an activation other than SiLU, biases, a rope scaling that Megatron-core does not compute.
    """
    path = Path(directory) / "config.json"
    if not path.parent.is_dir():
        raise UserError(what, str(directory), "no such directory", "give a local Hugging Face directory")
    if not path.is_file():
        raise UserError(what, str(directory), "holds no config.json", "give a local Hugging Face directory")
    raw = read_json_object(path)
    reader = ConfigReader(raw, path)
    family = FAMILIES[_architecture(raw, path)]
    _refuse_variants(reader)
    heads, head_dim = reader.heads()
    layers = family.read_layers(reader)
    has_windows = any(layer.attention == "sliding" for layer in layers)
    return HFConfig(
        architecture=family.architecture,
        layers=layers,
        hidden_size=reader.integer("hidden_size"),
        num_attention_heads=heads,
        head_dim=head_dim,
        vocab_size=reader.integer("vocab_size"),
        rms_norm_eps=reader.number("rms_norm_eps", 1e-6),
        rope=family.read_rope(reader),
        sliding_window=reader.integer("sliding_window") if has_windows else None,
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


def _architecture(raw: dict[str, object], path: Path) -> str:
    names = raw.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    if not isinstance(name, str) or name not in FAMILIES:
        raise UserError(
            f"{path}: architectures",
            names,
            "not a supported architecture" if names else "missing",
            f"use a model of {alternatives(tuple(FAMILIES))}",
        )
    return name


def _refuse_variants(reader: ConfigReader) -> None:
    """Variants that would load and then compute something else."""
    if reader.raw.get("quantization_config") is not None:
        raise reader.error(
            "quantization_config", None, "quantized weights", "use the bfloat16 or float32 checkpoint"
        )
    reader.require("hidden_act", "silu")
    for section in (reader, reader.rope_section()):
        section.require("partial_rotary_factor", 1.0)
    for key in ("attention_bias", "mlp_bias"):
        if reader.flag(key):
            raise reader.error(key, True, "biases are not supported", "use another model")
