"""What an objective needs of the rest of the configuration: each refusal in one exact line, and what passes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sead_megatron.config import check_config, load_config
from sead_megatron.errors import UserError
from sead_megatron.objectives import OBJECTIVES
from tests.tiny_cache import write_cache
from tests.tiny_inputs import write_inputs, write_jsonl, write_model

CONTEXT = 'teacher.context="{problem} is {solution}"'


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration whose prompts have answers and solutions, with a third model beside it."""
    directory = tmp_path_factory.mktemp("inputs")
    path = write_inputs(directory)
    write_model(directory / "reference")
    prompts = [
        {"id": f"p{i}", "prompt": "one plus two", "answer": "3", "solution": "three"} for i in range(8)
    ]
    write_jsonl(directory / "prompts.jsonl", prompts)
    return path


def mistake(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as error:
        check_config(load_config(path, overrides), 1)
    return str(error.value)


ON_POLICY = "rollout.temperature=1.0"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["objective={name: opd, form: sampled}"],
         "rollout.temperature = 0.7: objective opd follows sampled tokens: must be objective.temperature (1), or its "
         "gradient is biased; use 1, or set objective.importance_clip, for example 5.0"),
        (["objective={name: reopold}", ON_POLICY, "rollout.top_p=0.95"],
         "rollout.top_p = 0.95: objective reopold follows sampled tokens: tokens that are never drawn bias its "
         "gradient; use 1, or set objective.importance_clip"),
        (["objective={name: reopold}", ON_POLICY, "rollout.top_k=20"],
         "rollout.top_k = 20: objective reopold follows sampled tokens: tokens that are never drawn bias its "
         "gradient; use 0, or set objective.importance_clip"),
        (["objective={name: grpo}", ON_POLICY],
         "rollout.samples_per_prompt = 1: objective grpo compares rollouts of one prompt: at least 2; use for example "
         "8"),
        (["objective={name: paced}", "curriculum={name: uniform}"],
         "curriculum.difficulty: required with objective paced: it weighs prompts by their pass rate; estimate "
         "difficulties"),
        (["objective={name: gopd}", ON_POLICY],
         "reference: required with this objective gopd; add it, with reference.path"),
        (["teacher={}"], "teacher.path: required with objective sead; add it, or teacher.domains"),
        (["objective={name: grpo}", ON_POLICY, "rollout.samples_per_prompt=2", "teacher={path: REFERENCE}"],
         'teacher = "REFERENCE": objective grpo as it is set reads no teacher; remove the section, or override it with '
         "teacher={}"),
        (["objective={name: grpo}", ON_POLICY, "rollout.samples_per_prompt=2", "teacher={}", "metrics.topk_lists=4"],
         "metrics.topk_lists = 4: compares with a teacher, and objective grpo as it is set reads none; use 0"),
        (["objective={name: grpo, distillation: 0.1}", ON_POLICY, "rollout.samples_per_prompt=2", "teacher={}"],
         "teacher.path: required with objective grpo; add it, or teacher.domains"),
        (["reference={path: REFERENCE}"],
         'reference.path = "REFERENCE": objective sead as it is set reads no reference model; remove the section'),
        (["objective={name: gopd}", ON_POLICY, "reference={path: REFERENCE, parallel: {tensor: 3}}"],
         "reference.parallel.tensor = 3: must divide num_attention_heads (8); use 1, 2 or 4"),
        (["objective={name: egrsd}", ON_POLICY],
         "teacher.context: required with objective egrsd: its teacher reads a gold solution; use for example "
         '"{problem}\\n\\nA correct solution:\\n{solution}"'),
        (['teacher.context="{problem} only"'],
         'teacher.context = "{problem} only": must hold {solution}; add it'),
        (["objective={name: lightning}", ON_POLICY],
         "data.cache: required with objective lightning: it trains on responses that were sampled and scored before; "
         "name a directory, and fill it with `python -m sead_megatron cache CONFIG`"),
        (["objective={name: lightning}"],
         "rollout.temperature = 0.7: objective lightning follows sampled tokens: must be objective.temperature (1), or "
         "its gradient is biased; use 1"),
        (["data.cache=somewhere"],
         'data.cache = "somewhere": objective sead samples its responses and reads no cache; remove it, or use '
         "objective lightning"),
        (["objective={name: lightning}", ON_POLICY, "data.cache=somewhere", "teacher.ema=0.5"],
         "teacher.ema = 0.5: a cache is scored by one teacher that stays as it is; remove it"),
        (["objective={name: lightning}", ON_POLICY, "data.cache=somewhere", "teacher.domains={math: REFERENCE}"],
         'teacher.domains = {"math": "REFERENCE"}: a cache is scored by one teacher that stays as it is; remove it'),
        (["objective={name: lightning}", ON_POLICY, "data.cache=somewhere", "metrics.topk_lists=4"],
         "metrics.topk_lists = 4: compares with the teacher, which objective lightning does not load; use 0"),
        (["objective={name: decoupled, lengths: [8, 8]}"],
         "objective.lengths = [8, 8]: must ascend and stay below rollout.max_new_tokens (16); use for example "
         "[1024, 2048, 4096]"),
        (["objective={name: tip, share: 0}"], "objective.share = 0: must be greater than 0; use for example 0.5"),
        (["objective={name: tip, alpha_start: 1}"],
         "objective.alpha_start: not a setting of objective tip; remove it"),
    ],
)  # fmt: skip
def test_each_mistake_is_one_exact_line(good: Path, overrides: list[str], message: str) -> None:
    reference = str(good.parent / "reference")
    given = [override.replace("REFERENCE", reference) for override in overrides]
    assert mistake(good, *given) == message.replace("REFERENCE", reference)


@pytest.mark.parametrize(
    ("key", "overrides", "reason"),
    [
        ("answer", ["objective={name: grpo}", "rollout.samples_per_prompt=4", "teacher={}"],
         "objective grpo rewards right answers"),
        ("solution", [CONTEXT], "teacher.context shows it to the teacher"),
    ],
)  # fmt: skip
def test_prompts_without_what_is_read(
    good: Path, tmp_path: Path, key: str, overrides: list[str], reason: str
) -> None:
    lines = [json.loads(line) for line in (good.parent / "prompts.jsonl").read_text().splitlines()]
    for line in lines[3:5]:
        del line[key]
    prompts = write_jsonl(tmp_path / "prompts.jsonl", lines)
    message = mistake(good, *overrides, ON_POLICY, f"data.prompts={prompts}")
    assert message == (
        f"data.prompts: {key}: missing in 2 of 8 prompts, the first 'p3'; {reason}; add it or remove these prompts"
    )


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_every_objective_can_be_configured(good: Path, name: str) -> None:
    """With what it asks for, and no more."""
    section = OBJECTIVES[name][0].model_validate({"name": name})
    overrides = [f"objective={{name: {name}}}"]
    if section.follows_sampled_tokens:
        overrides.append(ON_POLICY)
    if not section.needs_teacher:
        overrides.append("teacher={}")
    if section.needs_reference:
        overrides.append(f"reference={{path: {good.parent}/reference}}")
    if section.needs_solutions:
        overrides.append(CONTEXT)
    overrides.append(f"rollout.samples_per_prompt={section.min_samples_per_prompt}")
    if section.reads_cache:
        overrides.append(f"data.cache={good.parent}/cache")
        write_cache(load_config(good, overrides))
    check_config(load_config(good, overrides), 1)


def test_importance_weights_allow_another_sampling_distribution(good: Path) -> None:
    overrides = ["objective={name: opd, form: sampled, importance_clip: 5.0}", "rollout.top_p=0.95"]
    check_config(load_config(good, overrides), 1)
