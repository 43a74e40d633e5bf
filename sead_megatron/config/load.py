"""From a YAML file and dotted overrides to a frozen TrainConfig, with every mistake named in one line."""

import difflib
from collections.abc import Sequence
from pathlib import Path

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from sead_megatron.config.fields import config_path, find_field, leaves, sections_of, variant_name
from sead_megatron.config.presets import with_preset
from sead_megatron.config.schema import TrainConfig
from sead_megatron.config.yaml_file import parse_yaml, read_yaml
from sead_megatron.errors import UserError, alternatives

_SECTION = "must be a section of keys and values"
_CONSTRAINTS = {
    "int_type": "must be an integer",
    "int_from_float": "must be an integer",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "string_type": "must be text",
    "list_type": "must be a list",
    "dict_type": _SECTION,
    "too_short": "must not be empty",
    "string_too_short": "must not be empty",
    "finite_number": "must be finite",
    "model_type": _SECTION,
    "model_attributes_type": _SECTION,
    "greater_than": "must be greater than {gt:g}",
    "greater_than_equal": "must be at least {ge:g}",
    "less_than": "must be less than {lt:g}",
    "less_than_equal": "must be at most {le:g}",
    "literal_error": "must be {expected}",
    "union_tag_invalid": "must be {expected_tags}",
}


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read `path`, apply `key.key=value` overrides (values are YAML, the last one wins), put both over the preset
    that they name, if any, and validate the types.

    Relative paths in the file stay as they are: they mean the current directory. What needs several fields,
    the input files or the world size is `check_config`'s. Raises UserError.
    """
    raw = read_yaml(Path(path))
    if raw is None:
        raise UserError(str(path), None, "the file is empty", "start from the config.yaml of an example")
    if not isinstance(raw, dict):
        raise UserError(
            str(path), None, "must hold keys and values, like `steps: 100`", "correct its top level"
        )
    for override in overrides:
        _apply_override(raw, override)
    raw = with_preset(raw)
    try:
        return TrainConfig.model_validate(raw)
    except ValidationError as error:
        raise _first_mistake(error.errors(include_url=False)) from error


def dump_config(config: TrainConfig) -> str:
    """The resolved configuration as YAML, defaults included; `load_config` reads the same configuration
    back."""
    return yaml.safe_dump(config.model_dump(), sort_keys=False)


def _apply_override(raw: dict[str, object], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"override {override!r}", None, "must be key=value", "write for example steps=100")
    *parents, last = key.split(".")
    section = raw
    for depth, parent in enumerate(parents):
        path = ".".join(parents[: depth + 1])
        field = find_field(path.split("."))
        if field is None:
            raise _unknown_key(path)
        if not sections_of(field.annotation):
            raise UserError(key, None, f"{path} is a value, it has no keys", f"set {path}=VALUE")
        inner = section.setdefault(parent, {})
        if not isinstance(inner, dict):
            raise UserError(path, inner, _SECTION, "correct it in the file")
        section = inner
    if find_field(key.split(".")) is None:
        raise _unknown_key(key)
    section[last] = parse_yaml(text, f"override {override!r}")


def _first_mistake(errors: Sequence[ErrorDetails]) -> UserError:
    """The most telling mistake: a misspelt key comes with a complaint that the right one is missing."""
    error = min(errors, key=lambda error: error["type"] not in ("extra_forbidden", "invalid_key"))
    keys, sections = config_path(error["loc"])
    path, value, context = ".".join(keys), error["input"], error.get("ctx", {})
    if error["type"] in ("extra_forbidden", "invalid_key"):
        return _unknown_key(path, variant_name(sections[0]) if find_field(keys) is not None else None)
    if error["type"] == "union_tag_not_found":
        return _missing(f"{path}.name")
    if error["type"] == "missing":
        return _missing(path)
    # The branches of a plain union (a number or "auto") complain one by one, about the same key.
    branches = [other for other in errors if config_path(other["loc"])[0] == keys]
    constraint = " or must be ".join(_constraint(branch) for branch in branches).replace(
        "or must be must be", "or"
    )
    if error["type"] == "union_tag_invalid":
        path, value = f"{path}.name", context["tag"]
    if value is None:
        constraint += ", not null"
    # Of the variant that was chosen: another one may have a field of this name and another example.
    field = sections[0].model_fields.get(path.rpartition(".")[2]) or find_field(path.split("."))
    return UserError(path, value, constraint, _remedy(field))


def _constraint(error: ErrorDetails) -> str:
    return _CONSTRAINTS[error["type"]].format(**error.get("ctx", {})).replace("'", "")


def _missing(path: str) -> UserError:
    field = find_field(path.split("."))
    required = [
        inner for inner, of in leaves(sections_of(field.annotation if field else None)) if of.is_required()
    ]
    remedy = f"add it, with {alternatives(required, last='and')}" if required else _remedy(field, "add it,")
    return UserError(path, None, "missing", remedy)


def _remedy(field: FieldInfo | None, verb: str = "use") -> str:
    """The field's own remedy, or a value that it takes."""
    if field is None or sections_of(field.annotation):
        return "indent its keys below it"
    if isinstance(field.json_schema_extra, dict):
        return str(field.json_schema_extra["remedy"])
    example = field.examples[0] if field.examples else field.default
    return f"{verb} for example {str(example).lower() if isinstance(example, bool) else example}"


def _unknown_key(path: str, variant: str | None = None) -> UserError:
    """`variant`: the objective that does not have this key, while another one does."""
    if variant is not None:
        return UserError(path, None, f"not a setting of {path.split('.')[0]} {variant}", "remove it")
    parent, _, name = path.rpartition(".")
    field = find_field(parent.split(".")) if parent else None
    sections = sections_of(field.annotation) if field is not None else (TrainConfig,)
    siblings = sorted({sibling for section in sections for sibling in section.model_fields})
    near = difflib.get_close_matches(name, siblings, n=1)
    if near:
        remedy = f"did you mean {parent}.{near[0]}?" if parent else f"did you mean {near[0]}?"
    else:
        elsewhere = [leaf for leaf, _ in leaves() if leaf.rpartition(".")[2] == name]
        remedy = (
            f"did you mean {elsewhere[0]}?"
            if elsewhere
            else f"known are {alternatives(siblings, last='and')}"
        )
    return UserError(path, None, "unknown key", remedy)
