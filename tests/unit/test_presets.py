"""Presets: each one is valid, has its own objective, and gives way to what the configuration says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from sead_megatron.config import dump_config, load_config
from sead_megatron.config.checks_objective import check_objective
from sead_megatron.config.presets import DIRECTORY, preset_names
from sead_megatron.errors import UserError
from sead_megatron.objectives import OBJECTIVES
from tests.tiny_inputs import minimal


def config_file(tmp_path: Path, **changes: Any) -> Path:
    """The required fields beside those of every preset, and `changes`."""
    raw = minimal(tmp_path)
    raw["rollout"]["max_model_len"] = raw["batch"]["max_tokens_per_microbatch"] = 32768
    del raw["rollout"]["max_new_tokens"], raw["data"]["prompts_per_step"]
    for key, value in changes.items():
        raw[key] = raw.get(key, {}) | value if isinstance(value, dict) else value
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_is_valid_and_says_where_it_is_from(tmp_path: Path, name: str) -> None:
    text = (DIRECTORY / f"{name}.yaml").read_text()
    assert text.startswith("# ")
    preset = yaml.safe_load(text)
    needed = {"rollout": {"max_new_tokens": 16}, "data": {"prompts_per_step": 4}}
    for section, values in needed.items():
        for key in values:
            if key in preset.get(section, {}):
                needed[section] = {}
    changes: dict[str, Any] = {"preset": name, **needed, "steps": 181}
    section = OBJECTIVES[preset["objective"]["name"]][0].model_validate(preset["objective"])
    if section.needs_reference:
        changes["reference"] = {"path": "models/student"}
    if section.reads_cache:
        changes["data"] = changes["data"] | {"cache": "data/cache"}
    config = load_config(config_file(tmp_path, **changes), [] if section.needs_teacher else ["teacher={}"])
    assert config.objective == section
    check_objective(config)


def test_every_objective_has_a_preset() -> None:
    names = {yaml.safe_load(path.read_text())["objective"]["name"] for path in DIRECTORY.glob("*.yaml")}
    assert names == set(OBJECTIVES)


def test_what_the_configuration_says_wins(tmp_path: Path) -> None:
    path = config_file(tmp_path, preset="sead", objective={"alpha_start": 0.5}, rollout={"temperature": 1.0})
    config: Any = load_config(path, ["objective.zones.a=40", "objective.zones.b=50"])
    objective = config.objective
    assert (objective.alpha_start, objective.zones.a, objective.zones.b, objective.zones.c) == (
        0.5,
        40,
        50,
        10,
    )
    assert (config.rollout.temperature, config.rollout.max_new_tokens) == (1.0, 16384)
    assert config.data.prompts_per_step == 96


def test_another_objective_replaces_the_presets(tmp_path: Path) -> None:
    config = load_config(config_file(tmp_path, preset="sead"), ["objective={name: opd}"])
    assert config.objective.name == "opd"


def test_a_resolved_configuration_reads_back(tmp_path: Path) -> None:
    config = load_config(config_file(tmp_path, preset="sead", objective={"alpha_start": 0.5}))
    (tmp_path / "resolved.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "resolved.yaml") == config


def test_an_unknown_preset(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        load_config(config_file(tmp_path, preset="reopolt"))
    assert str(error.value).startswith('preset = "reopolt": must be ') and str(error.value).endswith(
        "did you mean reopold?"
    )
