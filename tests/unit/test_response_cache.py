"""A response cache that is written in parts, continued and read, and each refusal in one exact line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from sead_megatron.config import TrainConfig, check_config, load_config
from sead_megatron.data.response_cache import cache_writer, part_path, read_cache, scoring_config
from sead_megatron.data.tokenised import training_prompts
from sead_megatron.data.types import TokenTable
from sead_megatron.errors import UserError
from sead_megatron.models.tokenizer import load_tokenizer
from sead_megatron.training.cached_responses import CachedResponses
from tests.tiny_cache import write_cache
from tests.tiny_inputs import write_inputs, write_jsonl, write_model

MAKE = "make another with `python -m sead_megatron cache CONFIG`"
IDS = [f"p{i}" for i in range(10)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A configuration of 10 prompts, whose cache has parts of 4, 4 and 2."""
    path = write_inputs(tmp_path)
    write_jsonl(tmp_path / "prompts.jsonl", [{"id": name, "prompt": "one plus two"} for name in IDS])
    return path


def configured(path: Path, *overrides: str) -> TrainConfig:
    ours = ["objective={name: lightning}", "rollout.temperature=1.0", "curriculum={name: uniform}"]
    return load_config(path, [*ours, f"data.cache={path.parent}/cache", *overrides])


def prompts_of(config: TrainConfig) -> CachedResponses:
    return CachedResponses(config, training_prompts(config, load_tokenizer(config.student.path)))


def test_rollouts_are_those_of_the_file(path: Path) -> None:
    config = configured(path, "rollout.samples_per_prompt=2")
    write_cache(config)
    rollouts = prompts_of(config).rollouts([9, 2])
    assert [rollout.prompt_index for rollout in rollouts] == [9, 9, 2, 2]
    assert [rollout.finished for rollout in rollouts] == [False, False, True, True]
    assert [len(rollout.response_ids) for rollout in rollouts] == [1, 2, 2, 3]
    last = rollouts[-1]
    assert last.prompt_ids.tolist() == [1, 3, 4, 5, 6] and last.response_ids.tolist() == [3, 4, 5]
    assert last.teacher_logprobs is not None
    assert last.teacher_logprobs.tolist() == [-3210.0, -3211.0, -3212.0]
    table = TokenTable.from_rollouts(rollouts, "cpu")
    for n, column in enumerate(("rollout_logprob", "student_entropy", "sampling_logprob", "teacher_logprob")):
        expected = -1000 * n - np.array([900, 910, 911, 200, 201, 210, 211, 212])
        assert getattr(table, column).tolist() == expected.tolist(), column


def test_the_order_of_the_prompts_may_change(path: Path) -> None:
    config = configured(path)
    write_cache(config)
    lines = [json.loads(line) for line in (path.parent / "prompts.jsonl").read_text().splitlines()]
    write_jsonl(path.parent / "prompts.jsonl", lines[::-1][:7])
    table, first = read_cache(config, training_prompts(config, load_tokenizer(config.student.path)))
    assert (table.num_rows, first) == (10, [9, 8, 7, 6, 5, 4, 3])


def test_a_cache_is_continued(path: Path) -> None:
    config = configured(path)
    writer = cache_writer(scoring_config(config))
    assert not writer.is_complete and not (path.parent / "cache").exists()
    write_cache(config, parts=[0, 2])
    (path.parent / "cache/.part_00001.arrow.tmp").write_bytes(b"half")  # what a kill left
    writer = cache_writer(scoring_config(config))
    assert writer.missing_parts() == [1] and list(writer.prompts_of(1)) == [4, 5, 6, 7]
    write_cache(config, parts=[1])
    assert cache_writer(scoring_config(config)).is_complete
    check_config(config, 1)


def mistake(act: Callable[[], object]) -> str:
    with pytest.raises(UserError) as error:
        act()
    return str(error.value)


def test_a_cache_that_is_not_whole(path: Path) -> None:
    config = configured(path)
    cache = f'data.cache = "{path.parent}/cache": '
    assert mistake(lambda: check_config(config, 1)) == (
        cache + "holds no cache.json; make it with `python -m sead_megatron cache CONFIG`"
    )
    write_cache(config, parts=[0, 2])
    assert mistake(lambda: check_config(config, 1)) == (
        cache
        + "is not complete: 6 of 10 prompts; give the same `python -m sead_megatron cache` command again"
    )
    write_cache(config)
    part = part_path(path.parent / "cache", 1)
    shutil.copy(part_path(path.parent / "cache", 2), part)
    assert mistake(lambda: check_config(config, 1)) == (
        f"{part}: does not hold 4 responses of a cache; remove it and make it again"
    )
    part.write_bytes(part.read_bytes()[:-50])
    assert mistake(lambda: check_config(config, 1)).startswith(f"{part}: not an Arrow file (")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["student.path=OTHER"], "was sampled from another student (STUDENT)"),
        (["teacher.path=OTHER"], "was scored by another teacher (TEACHER)"),
        (["tokenizer=TOKENIZER"], "was made with another tokenizer or chat template"),
        (["rollout.max_new_tokens=8", "rollout.samples_per_prompt=2"],
         "was made with other settings: rollout.max_new_tokens 16 -> 8, rollout.samples_per_prompt 1 -> 2"),
        (["rollout.temperature=0.5", "objective.temperature=0.5"],
         "was made with other settings: rollout.temperature 1.0 -> 0.5, objective.temperature 1.0 -> 0.5"),
    ],
)  # fmt: skip
def test_a_cache_of_something_else(path: Path, overrides: list[str], message: str) -> None:
    directory = path.parent
    write_model(directory / "other", num_hidden_layers=2)
    shutil.copytree(directory / "student", directory / "tokenizer")
    template = {"chat_template": "{{ messages[0].content }}"}
    settings = json.loads((directory / "tokenizer/tokenizer_config.json").read_text())
    (directory / "tokenizer/tokenizer_config.json").write_text(json.dumps(settings | template))
    for model in ("student", "other"):  # the template is in one of the directories only
        (directory / model / "tokenizer_config.json").write_text(
            json.dumps(settings | {"chat_template": None})
        )
    write_cache(configured(path))
    names = {"OTHER": "other", "STUDENT": "student", "TEACHER": "teacher", "TOKENIZER": "tokenizer"}
    for name, place in names.items():
        overrides = [override.replace(name, str(directory / place)) for override in overrides]
        message = message.replace(name, str(directory / place))
    assert mistake(lambda: check_config(configured(path, *overrides), 1)) == (
        f'data.cache = "{directory}/cache": {message}; {MAKE}, or restore it'
    )


def test_a_teacher_that_has_gone_is_not_missed(path: Path) -> None:
    config = configured(path)
    write_cache(config)
    shutil.rmtree(path.parent / "teacher")
    checked = check_config(config, 1)
    assert checked.teacher is None
    assert "student TP1 PP1 DP1, no teacher, no engine" in checked.summary("uniform")


def test_prompts_that_the_cache_has_not(path: Path) -> None:
    config = configured(path)
    write_cache(config)
    lines = [{"id": name, "prompt": "one plus two"} for name in (*IDS[:8], "new", "newer")]
    write_jsonl(path.parent / "prompts.jsonl", lines)
    cache = f'data.cache = "{path.parent}/cache": '
    assert mistake(lambda: check_config(config, 1)) == (
        cache + f"lacks 2 of the 10 prompts, the first 'new'; {MAKE}, or remove these prompts"
    )
    write_jsonl(path.parent / "prompts.jsonl", [{"id": name, "prompt": "two plus one"} for name in IDS])
    check_config(config, 1)
    assert mistake(lambda: prompts_of(config)) == (
        cache + f"has responses to another text of prompt 'p0'; {MAKE}, or restore data.prompts"
    )


def test_what_is_in_the_way_of_a_cache(path: Path) -> None:
    config = configured(path)
    write_cache(config, parts=[0])
    cache = f'data.cache = "{path.parent}/cache": '
    assert mistake(lambda: cache_writer(scoring_config(configured(path, "seed=7")))) == (
        cache
        + "holds a cache that was made from something else: made_with differ; choose another, or remove it to "
        "make it again"
    )
    (path.parent / "cache/cache.json").unlink()
    assert mistake(lambda: cache_writer(scoring_config(config))) == (
        cache + "holds files but no cache.json; choose another"
    )
    assert mistake(lambda: scoring_config(load_config(path))) == (
        'objective.name = "sead": reads no cache; use for example preset: lightning'
    )
