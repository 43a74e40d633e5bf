"""Published settings of each method, which a configuration starts from: `preset: eopd`."""

import difflib
from collections.abc import Mapping
from pathlib import Path

from sead_megatron.config.yaml_file import read_yaml
from sead_megatron.errors import UserError, alternatives

DIRECTORY = Path(__file__).parents[1] / "presets"


def preset_names() -> list[str]:
    """The presets that come with the package."""
    return sorted(path.stem for path in DIRECTORY.glob("*.yaml"))


def with_preset(raw: Mapping[str, object]) -> dict[str, object]:
    """`raw` over the settings of its `preset`, if it names one: what `raw` says itself wins.

    A section that is told apart by `name` and has another name than the preset's replaces it as a whole. Raises
    UserError for an unknown preset.
    """
    name = raw.get("preset")
    if name is None:
        return dict(raw)
    names = preset_names()
    if not isinstance(name, str) or name not in names:
        near = difflib.get_close_matches(str(name), names, n=1)
        raise UserError(
            "preset",
            name,
            f"must be {alternatives(names)}",
            f"did you mean {near[0]}?" if near else "leave it out, or use for example sead",
        )
    preset = read_yaml(DIRECTORY / f"{name}.yaml")
    assert isinstance(preset, dict)
    return _merged(preset, raw)


def _merged(below: Mapping[str, object], above: Mapping[str, object]) -> dict[str, object]:
    result = dict(below)
    for key, value in above.items():
        base = below.get(key)
        if isinstance(value, Mapping) and isinstance(base, Mapping) and _same_variant(base, value):
            result[key] = _merged(base, value)
        else:
            result[key] = value
    return result


def _same_variant(below: Mapping[str, object], above: Mapping[str, object]) -> bool:
    return "name" not in above or "name" not in below or above["name"] == below["name"]
