"""Several teachers by the domains of the prompts: who scores what, and each refusal in one exact line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sead_megatron.config import TrainConfig, check_config, load_config
from sead_megatron.errors import UserError
from tests.tiny_inputs import WORDS, write_inputs, write_jsonl, write_model, write_tokenizer_json

DOMAINS = ["math", "math", "code", "code", "code", "chat", None, None]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration with prompts of three domains and of none, and two more teachers beside it."""
    directory = tmp_path_factory.mktemp("inputs")
    path = write_inputs(directory)
    write_model(directory / "small", hidden_size=32, num_hidden_layers=2)
    write_tokenizer_json(write_model(directory / "other"), [*WORDS[:-1], "four"])
    write_tokenizer_json(directory / "small")
    for name in ("student", "teacher"):
        write_tokenizer_json(directory / name)
    prompts = [
        {"id": f"p{i}", "prompt": "one plus two", "answer": "3"} | ({"domain": domain} if domain else {})
        for i, domain in enumerate(DOMAINS)
    ]
    write_jsonl(directory / "prompts.jsonl", prompts)
    return path


def load(path: Path, *overrides: str) -> TrainConfig:
    """SMALL, OTHER and so on stand for the directories beside the configuration."""
    for name in ("small", "other", "student", "teacher"):
        overrides = tuple(o.replace(name.upper(), str(path.parent / name)) for o in overrides)
    return load_config(path, overrides)


def mistake(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as error:
        check_config(load(path, *overrides), 4)
    return str(error.value).replace(str(path.parent), "DIR")


def test_which_teacher_scores_a_domain(good: Path) -> None:
    teacher = load(good, "teacher.domains={math: SMALL, code: OTHER, chat: SMALL}").teacher
    paths = [str(good.parent / name) for name in ("teacher", "small", "other")]
    assert list(teacher.directories) == paths
    assert [teacher.index_of(domain) for domain in ("math", "code", "chat", "law", None)] == [1, 2, 1, 0, 0]
    teacher = load(good, "teacher={domains: {math: SMALL, code: OTHER}}").teacher
    assert list(teacher.directories) == paths[1:] and teacher.index_of("code") == 1
    with pytest.raises(KeyError, match="no teacher for the domain 'law'"):
        teacher.index_of("law")


@pytest.mark.parametrize(
    "overrides",
    [
        ["teacher.domains={math: SMALL}"],
        ["teacher.domains={math: SMALL, code: SMALL, chat: TEACHER}"],
        ["objective={name: mopd}", "teacher.domains={math: SMALL}", "rollout.samples_per_prompt=2"],
        ["objective={name: mopd, outcome: 0}", "teacher.domains={math: SMALL}"],
        ["teacher.ema=0.99", "teacher.parallel.tensor=2", "student.parallel.tensor=2"],
    ],
)
def test_what_can_be_configured(good: Path, overrides: list[str]) -> None:
    assert check_config(load(good, *overrides), 4).prompts == len(DOMAINS)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["teacher.domains={maths: SMALL}"],
         'teacher.domains.maths = "DIR/small": no training prompt has this domain; there are chat, code and math; '
         "remove it, or give the prompts their domain"),
        (["teacher={domains: {math: SMALL, code: TEACHER, chat: TEACHER}}"],
         "teacher.path: 2 of 8 training prompts have no teacher in teacher.domains, the first 'p6' with no domain; "
         "add it for all other prompts, or their domains"),
        (["teacher={domains: {math: SMALL, code: TEACHER}}"],
         "teacher.path: 3 of 8 training prompts have no teacher in teacher.domains, the first 'p5' with the domain "
         "'chat'; add it for all other prompts, or their domains"),
        (["teacher.domains={code: OTHER}"],
         'teacher.domains.code = "DIR/other": its tokenizer is not that of student.path: id 7 is \'four\', not '
         "'three'; use a pair of models that share a tokenizer"),
        (["teacher.domains={code: missing}"],
         'teacher.domains.code = "missing": no such directory; give a local Hugging Face directory'),
        (["teacher.domains={code: SMALL}", "teacher.parallel.pipeline=4"],
         "teacher.parallel.pipeline = 4: must be at most the code teacher's num_hidden_layers (2): every stage holds "
         "a layer; use at most 2"),
        (["teacher.domains={code: SMALL}", "teacher.yarn_layers=all"],
         'teacher.yarn_layers = "all": the teacher has no YaRN rope scaling; use full_attention'),
        (["teacher.domains=SMALL"],
         'teacher.domains = "DIR/small": must be a section of keys and values; use for example '
         "{'math': 'models/math_teacher'}"),
        (["teacher.domains={math: 3}"],
         "teacher.domains = 3: must be text; use for example {'math': 'models/math_teacher'}"),
        (["teacher.path=STUDENT", "teacher.ema=1"],
         "teacher.ema = 1: must be less than 1; use for example 0.999"),
        (["teacher.ema=0.99", "teacher.domains={code: SMALL}"],
         "teacher.ema = 0.99: only a single teacher follows the student; remove it, or teacher.domains"),
        (["teacher={path: SMALL, ema: 0.99}"],
         'teacher.path = "DIR/small": a teacher that follows the student (teacher.ema) must be of the student\'s '
         "architecture; use for example DIR/student"),
        (["teacher.ema=0.99", "precision.teacher=modelopt_fp8"],
         'precision.teacher = "modelopt_fp8": a teacher that follows the student (teacher.ema) is not quantised; use '
         "bfloat16"),
        (["teacher.ema=0.99", "teacher.parallel.tensor=2", "student.parallel.stages=[4]"],
         'teacher.parallel = "tensor 2, pipeline 1": a teacher that follows the student (teacher.ema) is cut as the '
         "student is: must be tensor 1, pipeline 1, stages [4]; use student.parallel's"),
        (["objective={name: mopd}"],
         "rollout.samples_per_prompt = 1: objective mopd compares rollouts of one prompt: at least 2; use for example "
         "8"),
        (["objective={name: mopd, outcome: 0, ratio_low: 2}"],
         "objective.ratio_low = 2.0: must be less than objective.ratio_high (2); use for example 0.5 and 2.0"),
    ],
)  # fmt: skip
def test_each_mistake_is_one_exact_line(good: Path, overrides: list[str], message: str) -> None:
    assert mistake(good, *overrides) == message


def test_outcomes_need_answers(good: Path, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in (good.parent / "prompts.jsonl").read_text().splitlines()]
    del lines[5]["answer"]
    prompts = f"data.prompts={write_jsonl(tmp_path / 'prompts.jsonl', lines)}"
    mopd = "objective={name: mopd, outcome: OUTCOME}"
    assert mistake(good, prompts, mopd.replace("OUTCOME", "1.0"), "rollout.samples_per_prompt=2") == (
        "data.prompts: answer: missing in 1 of 8 prompts, the first 'p5'; objective mopd rewards right answers; add it "
        "or remove these prompts"
    )
    check_config(load(good, prompts, mopd.replace("OUTCOME", "0.0")), 1)
