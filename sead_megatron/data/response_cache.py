"""Files of a response cache: what objective `lightning` trains on in place of rollouts and teacher. Torch-free.

`cache.json` says what the content was made from. Each `part_N.arrow` holds the responses to equally many prompts (the
last to fewer) in the order of the prompt file, a row a response: `id`, `sample`, `prompt_ids`, `response_ids`,
`finished`, and for each response token `logprobs` and `entropies` of the student at the loss' temperature,
`sampling_logprobs` at the sampling temperature and `teacher_logprobs`. Parts are Arrow files without compression: ranks
of a machine map them into memory and share it, and a step reads its few rows only.

A part is complete or absent, so a kill at any moment leaves a cache that the same command continues.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sead_megatron.config.schema import (
    CurriculumConfig,
    EvaluationConfig,
    MetricsConfig,
    ProfileConfig,
    TrainConfig,
)
from sead_megatron.data.prompts import AnyPrompt, read_prompts
from sead_megatron.errors import UserError
from sead_megatron.models.config_reader import read_json_object
from sead_megatron.models.converted import sync
from sead_megatron.models.identity import model_identity
from sead_megatron.models.tokenizer_files import read_chat_template, require_tokenizer
from sead_megatron.objectives.opd import OpdObjective
from sead_megatron.records import write_atomically

if TYPE_CHECKING:
    import pyarrow as pa

DESCRIPTION = "cache.json"
COMMAND = "python -m sead_megatron cache"
_FORMAT_VERSION = 1

# Arrays of a rollout with an entry a response token.
TOKEN_COLUMNS = ("logprobs", "entropies", "sampling_logprobs", "teacher_logprobs")


def _schema() -> pa.Schema:
    import pyarrow as pa  # it brings numpy, which the first checks of a configuration do without

    return pa.schema(
        [
            pa.field("id", pa.string(), nullable=False),
            pa.field("sample", pa.int32(), nullable=False),
            pa.field("prompt_ids", pa.list_(pa.int32()), nullable=False),
            pa.field("response_ids", pa.list_(pa.int32()), nullable=False),
            pa.field("finished", pa.bool_(), nullable=False),
            *(pa.field(name, pa.list_(pa.float32()), nullable=False) for name in TOKEN_COLUMNS),
        ]
    )


def scoring_config(config: TrainConfig) -> TrainConfig:
    """The online run whose first rollouts and scores are cached: sampled OPD, without curriculum and evaluation.

    Raises UserError where `config` is not of a run that reads a cache.
    """
    if not config.objective.reads_cache:
        raise UserError(
            "objective.name", config.objective.name, "reads no cache", "use for example preset: lightning"
        )
    if config.data.cache is None:
        raise UserError(
            "data.cache", None, "names the directory to write", "set it, for example to data/cache"
        )
    config.objective.check(config)
    online = {
        "run_dir": config.data.cache,
        "data": config.data.model_copy(update={"cache": None}),
        "objective": OpdObjective(form="sampled", temperature=config.objective.temperature),
        "curriculum": CurriculumConfig(name="uniform"),
        "evaluation": EvaluationConfig(),
        "metrics": MetricsConfig(),
        "profile": ProfileConfig(),
    }
    return config.model_copy(update=online)


def cache_writer(config: TrainConfig) -> CacheWriter:
    """The cache of a `scoring_config`. Raises UserError where it cannot be written or continued."""
    writer = CacheWriter(Path(config.run_dir), describe(config, len(read_prompts(config.data.prompts))))
    writer.check()
    return writer


def describe(config: TrainConfig, prompts: int) -> dict[str, Any]:
    """Everything that decides the content, but for the values of the weights and the last bits of a layout."""
    rollout = config.rollout
    return {
        "format_version": _FORMAT_VERSION,
        "student": model_identity(config.student.path),
        "teacher": model_identity(_scorer(config)),
        "tokenizer_sha256": _tokenizer_hash(config),
        "settings": _settings(config),
        "made_with": {
            "student": config.student.path,
            "teacher": config.teacher.path,
            "seed": config.seed,
            "rollout.dtype": config.rollout_dtype,
            "rollout.quantization": rollout.quantization,
            "precision.teacher": config.precision.teacher,
            "teacher.yarn_layers": config.teacher.yarn_layers,
            "prompts_sha256": hashlib.sha256(Path(config.data.prompts).read_bytes()).hexdigest(),
        },
        "prompts": prompts,
        "prompts_per_part": config.data.prompts_per_step,
    }


def _scorer(config: TrainConfig) -> str:
    if config.teacher.path is None:
        raise UserError("teacher.path", None, "required: it scores the cache", "add it")
    return config.teacher.path


def _settings(config: TrainConfig) -> dict[str, Any]:
    """The fields that a run must have in common with the cache that it reads."""
    rollout = config.rollout
    return {
        "rollout.temperature": rollout.temperature,
        "rollout.top_p": rollout.top_p,
        "rollout.top_k": rollout.top_k,
        "rollout.max_new_tokens": rollout.max_new_tokens,
        "rollout.samples_per_prompt": rollout.samples_per_prompt,
        "objective.temperature": config.objective.temperature,
        "teacher.context": config.teacher.context,
    }


def _tokenizer_hash(config: TrainConfig) -> str:
    directory = config.tokenizer_path
    digest = hashlib.sha256(require_tokenizer(directory, "tokenizer").read_bytes())
    digest.update((read_chat_template(directory) or "").encode())
    return digest.hexdigest()


class CacheWriter:
    """A cache while it is made."""

    def __init__(self, directory: Path, description: Mapping[str, Any]) -> None:
        self._directory = directory
        self._description = dict(description)

    def missing_parts(self) -> list[int]:
        """Numbers of the parts that are not there."""
        return [i for i in range(self.num_parts) if not part_path(self._directory, i).exists()]

    @property
    def is_complete(self) -> bool:
        """Whether nothing is left to do."""
        return (self._directory / DESCRIPTION).is_file() and not self.missing_parts()

    def check(self) -> None:
        """Writes nothing. Raises UserError where the directory holds something else or a cache of something else."""
        if not self._directory.exists():
            return
        if not self._directory.is_dir() or not os.access(self._directory, os.W_OK | os.X_OK):
            raise UserError(
                "data.cache", str(self._directory), "must be a directory to write to", "choose another"
            )
        if (self._directory / DESCRIPTION).is_file():
            told = read_json_object(self._directory / DESCRIPTION)
            keys = sorted(told.keys() | self._description.keys())
            if differing := [key for key in keys if told.get(key) != self._description.get(key)]:
                raise UserError(
                    "data.cache",
                    str(self._directory),
                    f"holds a cache that was made from something else: {', '.join(differing)} differ",
                    "choose another, or remove it to make it again",
                )
        elif any(self._directory.iterdir()):
            raise UserError(
                "data.cache", str(self._directory), f"holds files but no {DESCRIPTION}", "choose another"
            )

    @property
    def num_parts(self) -> int:
        """How many parts the complete cache has."""
        return -(-self._description["prompts"] // self._description["prompts_per_part"])

    def prompts_of(self, part: int) -> range:
        """Indices of a part's prompts in the prompt file."""
        first = part * self._description["prompts_per_part"]
        return range(first, min(first + self._description["prompts_per_part"], self._description["prompts"]))

    def start(self) -> None:
        """Makes the directory and its description."""
        self._directory.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self._description, indent=1) + "\n"
        write_atomically(self._directory / DESCRIPTION, text)

    def write(self, part: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Writes a part, on disk when this returns; `rows` have the columns that the module's docstring names."""
        import pyarrow as pa

        schema = _schema()
        columns = {name: [row[name] for row in rows] for name in schema.names}
        path = part_path(self._directory, part)
        aside = path.with_name(f".{path.name}.tmp")
        with pa.OSFile(str(aside), "wb") as stream, pa.ipc.new_file(stream, schema) as writer:
            writer.write_table(pa.table(columns, schema=schema))
        sync(aside)
        aside.replace(path)
        sync(self._directory)


def part_path(directory: Path, part: int) -> Path:
    """The file of a part."""
    return directory / f"part_{part:05d}.arrow"


def read_cache(config: TrainConfig, prompts: Sequence[AnyPrompt]) -> tuple[pa.Table, list[int]]:
    """All rows, mapped into memory, and for each prompt its first one; its samples follow.

    Raises UserError: no cache, one that is not complete, one that was made from another student, teacher (where
    `teacher.path` is a directory), tokenizer or with other settings, or one that lacks some of the prompts.
    """
    directory = Path(config.data.cache or "")
    if not (directory / DESCRIPTION).is_file():
        raise UserError(
            "data.cache", config.data.cache, f"holds no {DESCRIPTION}", f"make it with `{COMMAND} CONFIG`"
        )
    description = read_json_object(directory / DESCRIPTION)
    for difference in _differences(config, description):
        raise UserError(
            "data.cache",
            config.data.cache,
            difference,
            f"make another with `{COMMAND} CONFIG`, or restore it",
        )
    samples = config.rollout.samples_per_prompt
    table = _read_parts(directory, description, samples)
    first = {name: row for row, name in enumerate(table.column("id").to_pylist()) if row % samples == 0}
    if lacking := [prompt.id for prompt in prompts if prompt.id not in first]:
        raise UserError(
            "data.cache",
            config.data.cache,
            f"lacks {len(lacking)} of the {len(prompts)} prompts, the first {lacking[0]!r}",
            f"make another with `{COMMAND} CONFIG`, or remove these prompts",
        )
    return table, [first[prompt.id] for prompt in prompts]


def _differences(config: TrainConfig, description: Mapping[str, Any]) -> Iterator[str]:
    """What keeps the run from reading a cache of that description."""
    if description.get("format_version") != _FORMAT_VERSION:
        yield f"has another format than this version's ({_FORMAT_VERSION})"
        return
    made_with = description["made_with"]
    if model_identity(config.student.path) != description["student"]:
        yield f"was sampled from another student ({made_with['student']})"
    # The run needs no teacher: its files may have gone.
    scorer = _scorer(config)
    if Path(scorer).is_dir() and model_identity(scorer) != description["teacher"]:
        yield f"was scored by another teacher ({made_with['teacher']})"
    if _tokenizer_hash(config) != description["tokenizer_sha256"]:
        yield "was made with another tokenizer or chat template"
    told = description["settings"]
    changed = [
        f"{name} {json.dumps(told.get(name))} -> {json.dumps(value)}"
        for name, value in _settings(config).items()
        if told.get(name) != value
    ]
    if changed:
        yield f"was made with other settings: {', '.join(changed)}"


def _read_parts(directory: Path, description: Mapping[str, Any], samples: int) -> pa.Table:
    writer = CacheWriter(directory, description)
    if missing := writer.missing_parts():
        done = description["prompts"] - sum(len(writer.prompts_of(part)) for part in missing)
        raise UserError(
            "data.cache",
            str(directory),
            f"is not complete: {done} of {description['prompts']} prompts",
            f"give the same `{COMMAND}` command again",
        )
    import pyarrow as pa

    schema, tables = _schema(), []
    for part in range(writer.num_parts):
        path = part_path(directory, part)
        try:
            table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        except (OSError, pa.ArrowInvalid) as error:
            raise UserError(
                str(path), None, f"not an Arrow file ({error})", "remove it and make it again"
            ) from error
        rows = len(writer.prompts_of(part)) * samples
        if table.schema != schema or table.num_rows != rows:
            raise UserError(
                str(path), None, f"does not hold {rows} responses of a cache", "remove it and make it again"
            )
        tables.append(table)
    return pa.concat_tables(tables)
