"""YAML as people mean it: the core types of YAML 1.2, and no key twice.

PyYAML follows YAML 1.1, in which `lr: 1e-6` is a string, `wandb: off` is false, `010` is 8 and `1:30` is 90,
and a repeated key silently wins. A run must not hang on any of these.
"""

import re
from collections.abc import Hashable
from pathlib import Path

import yaml

from sead_megatron.errors import UserError

_CORE_TYPES = {
    "tag:yaml.org,2002:null": (r"~|null|Null|NULL|", "~nN\0"),
    "tag:yaml.org,2002:bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "tag:yaml.org,2002:int": (r"[-+]?[0-9]+", "-+0123456789"),
    "tag:yaml.org,2002:float": (
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+0123456789.",
    ),
    "tag:yaml.org,2002:merge": (r"<<", "<"),
}


class _CoreLoader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2 scalars that refuses duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, object]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"key {key.value!r} twice", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_decimal(self, node: yaml.ScalarNode) -> int:
        return int(self.construct_scalar(node))


_CoreLoader.yaml_implicit_resolvers = {}
for _tag, (_pattern, _first_letters) in _CORE_TYPES.items():
    _letters = ["" if letter == "\0" else letter for letter in _first_letters]
    _CoreLoader.add_implicit_resolver(_tag, re.compile(f"^(?:{_pattern})$"), _letters)
_CoreLoader.add_constructor("tag:yaml.org,2002:int", _CoreLoader.construct_decimal)


def parse_yaml(text: str, source: str) -> object:
    """Parse `text`; `source` (a file, an override) is named with the line when it is not YAML. Raises
    UserError."""
    try:
        return yaml.load(text, Loader=_CoreLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{source}, line {mark.line + 1}, column {mark.column + 1}" if mark else source
        raise UserError(
            where, None, f"not valid YAML ({error.problem})", "correct the syntax there"
        ) from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise UserError(
            f"{source}, line {line}", None, f"not valid YAML ({error.reason})", "remove the character"
        ) from error


def read_yaml(path: Path) -> object:
    """Parse a file. Raises UserError for a missing, unreadable or malformed one."""
    if not path.is_file():
        reason = "is not a file" if path.exists() else "no such file"
        raise UserError(str(path), None, reason, "give the path of a YAML configuration")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            str(path), None, f"not UTF-8 (byte {error.start})", "save the file as UTF-8"
        ) from error
    except PermissionError as error:
        raise UserError(str(path), None, "not readable", "change its permissions") from error
    return parse_yaml(text, str(path))
