"""Typed access to the keys of one config.json, with errors that name the file and the key. Torch-free."""

import json
from dataclasses import dataclass
from pathlib import Path

from sead_megatron.errors import UserError, alternatives
from sead_megatron.models.architecture import LayerConfig, Llama3Rope, Rope, YarnRope

# Megatron-core's llama3 rope scaling takes only the factor; these three are constants in its code.
_LLAMA3_CONSTANTS = {"low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 8192}


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


@dataclass(frozen=True)
class ConfigReader:
    """The keys of a config.json. `default` also stands for an explicit null."""

    raw: dict[str, object]
    path: Path
    prefix: str = ""
    """Where `raw` stands inside the file, for errors."""

    def error(
        self, key: str, value: object, constraint: str, remedy: str = "correct config.json"
    ) -> UserError:
        """The error about one key."""
        return UserError(f"{self.path}: {self.prefix}{key}", value, constraint, remedy)

    def integer(self, key: str, default: int | None = None) -> int:
        """A positive integer."""
        value = self.raw.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.error(key, value, "must be a positive integer" if value is not None else "missing")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number."""
        value = self.raw.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
            raise self.error(key, value, "must be a positive number" if value is not None else "missing")
        return float(value)

    def flag(self, key: str) -> bool:
        """True or false; false when missing."""
        value = self.raw.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.error(key, value, "must be true or false")
        return bool(value)

    def section(self, key: str) -> "ConfigReader":
        """A nested object; empty when missing."""
        value = self.raw.get(key)
        if value is None:
            return ConfigReader({}, self.path, f"{self.prefix}{key}.")
        if not isinstance(value, dict):
            raise self.error(key, value, "must be an object")
        return ConfigReader(value, self.path, f"{self.prefix}{key}.")

    def sections(self, key: str) -> list["ConfigReader"]:
        """A list of objects; empty when missing."""
        value = self.raw.get(key)
        if value is None:
            return []
        if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
            raise self.error(key, None, "must be a list of objects")
        return [ConfigReader(entry, self.path, f"{self.prefix}{key}[{i}].") for i, entry in enumerate(value)]

    def refuse(self, key: str, constraint: str) -> None:
        """Refuses a key that is set (not missing, null or false): another model would be computed."""
        given = self.raw.get(key)
        if given is not None and given is not False:
            raise self.error(key, given, constraint, "use another model")

    def require(self, key: str, expected: object) -> None:
        """Refuses another value than `expected`, which also a missing or null key means."""
        given = self.raw.get(key)
        if given is not None and given != expected:
            wanted = str(expected).lower() if isinstance(expected, bool) else f'"{expected}"'
            wanted = f"{expected:g}" if isinstance(expected, float) else wanted
            raise self.error(key, given, f"must be {wanted}", "use another model")

    def heads(self) -> tuple[int, int]:
        """Query heads and their width."""
        hidden_size, heads = self.integer("hidden_size"), self.integer("num_attention_heads")
        if self.raw.get("head_dim") is None and hidden_size % heads:
            raise self.error(
                "hidden_size", hidden_size, f"must be a multiple of num_attention_heads ({heads})"
            )
        return heads, self.integer("head_dim", hidden_size // heads)

    def uniform_layers(self) -> tuple[LayerConfig, ...]:
        """`num_hidden_layers` equal layers of full attention and gated MLP."""
        heads, _ = self.heads()
        key_value_heads = self.integer("num_key_value_heads", heads)
        if heads % key_value_heads:
            raise self.error(
                "num_key_value_heads", key_value_heads, f"must divide num_attention_heads ({heads})"
            )
        layer = LayerConfig("full", key_value_heads, "gated", self.integer("intermediate_size"))
        return (layer,) * self.integer("num_hidden_layers")

    def rope_section(self) -> "ConfigReader":
        """`rope_parameters` (transformers 5) or `rope_scaling` (before); empty when there is neither."""
        section = self.section("rope_parameters")
        return section if section.raw else self.section("rope_scaling")

    def rope(self, kinds: tuple[str, ...] = ()) -> Rope:
        """The one rotary embedding of all layers; its scaling is one of `kinds` or none."""
        section = self.rope_section()
        nested = "rope_theta" in section.raw
        theta = section.number("rope_theta") if nested else self.number("rope_theta", 10000.0)
        return Rope(theta, section.scaling(kinds))

    def scaling(self, kinds: tuple[str, ...]) -> Llama3Rope | YarnRope | None:
        """This section as a rope scaling: one of `kinds`, or none."""
        kind = self.raw.get("rope_type", self.raw.get("type", "default"))
        if kind == "default":
            return None
        if kind not in kinds:
            known = alternatives([f'"{name}"' for name in kinds]) + " scaling or none" if kinds else "none"
            raise self.error(
                "rope_type",
                kind,
                "not a supported rope scaling of this architecture",
                f"use a model with {known}",
            )
        return self._llama3() if kind == "llama3" else self._yarn()

    def _llama3(self) -> Llama3Rope:
        for key, fixed in _LLAMA3_CONSTANTS.items():
            if self.raw.get(key) != fixed:
                raise self.error(
                    key, self.raw.get(key), f"must be {fixed}, which Megatron-core fixes", "use another model"
                )
        return Llama3Rope(self.number("factor"))

    def _yarn(self) -> YarnRope:
        for key in ("mscale", "mscale_all_dim"):
            self.refuse(key, "not supported: give attention_factor")
        self.require("truncate", True)
        return YarnRope(
            factor=self.number("factor"),
            original_max_position_embeddings=self.integer("original_max_position_embeddings"),
            beta_fast=self.number("beta_fast", 32.0),
            beta_slow=self.number("beta_slow", 1.0),
            attention_factor=self.number("attention_factor"),
        )
