"""Walks the schema: the sections behind an annotation, all leaves, a dotted path."""

from collections.abc import Iterator, Sequence
from typing import get_args

from pydantic.fields import FieldInfo

from sead_megatron.config.schema import TrainConfig
from sead_megatron.section import Section

Sections = tuple[type[Section], ...]


def sections_of(annotation: object) -> Sections:
    """The sections an annotation allows: none for a value, one usually, several for a union told apart by
    `name`."""
    if isinstance(annotation, type):
        return (annotation,) if issubclass(annotation, Section) else ()
    return tuple(section for argument in get_args(annotation) for section in sections_of(argument))


def leaves(sections: Sections = (TrainConfig,), prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """(dotted path, field) of every value; a path shared by the variants of a union comes once for each."""
    for section in sections:
        for name, field in section.model_fields.items():
            inner = sections_of(field.annotation)
            if inner:
                yield from leaves(inner, f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}", field


def find_field(path: Sequence[str], sections: Sections = (TrainConfig,)) -> FieldInfo | None:
    """The field of a path (of any variant of a union), or None when the schema does not know it."""
    for section in sections:
        field = section.model_fields.get(path[0])
        if field is not None:
            found = field if len(path) == 1 else find_field(path[1:], sections_of(field.annotation))
            if found is not None:
                return found
    return None


def variant_name(section: type[Section]) -> str:
    """The `name` that selects a variant of a union."""
    return str(get_args(section.model_fields["name"].annotation)[0])


def config_path(location: Sequence[str | int]) -> tuple[tuple[str, ...], Sections]:
    """A pydantic error location as the keys a user writes, and the sections that the last key stands in.

    Drops what pydantic adds for unions: the variant's name after a tagged one ("objective", "sead", "zones"),
    the branch after a plain one ("lambda_fkl", "float").
    """
    sections: Sections = (TrainConfig,)
    inner: Sections = sections
    keys: list[str] = []
    for part in location:
        if len(inner) > 1:
            inner = tuple(section for section in inner if variant_name(section) == part)
            continue
        if not inner:
            break
        sections = inner
        keys.append(str(part))
        field = sections[0].model_fields.get(str(part))
        inner = sections_of(field.annotation) if field is not None else ()
    return tuple(keys), sections
