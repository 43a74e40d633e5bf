"""YAML, overrides and types: every mistake gives one exact line; every leaf is documented and reachable."""

from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
import yaml
from pydantic import ValidationError
from sead_kernels.split_kl import BACKENDS, MAX_TOPK

from sead_megatron.config import TrainConfig, dump_config, load_config
from sead_megatron.config.fields import find_field, leaves, sections_of, variant_name
from sead_megatron.config.schema import KernelConfig
from sead_megatron.errors import UserError
from sead_megatron.objectives import OBJECTIVES
from sead_megatron.objectives.sead import SeadObjective
from tests.tiny_inputs import minimal


@pytest.fixture
def config_yaml(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(minimal(Path("in"))))
    return path


def mistake(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as error:
        load_config(path, overrides)
    message = str(error.value)
    assert "\n" not in message
    return message


def test_defaults(config_yaml: Path) -> None:
    config = load_config(config_yaml)
    assert (config.seed, config.device, config.optimizer.lr, config.rollout.temperature) == (
        1234,
        "cuda",
        1e-6,
        0.7,
    )
    assert isinstance(config.objective, SeadObjective)
    zones = config.objective.zones
    assert (zones.a, zones.b, zones.c, config.objective.alpha_start, config.objective.alpha_end) == (
        50,
        40,
        10,
        0.8,
        0,
    )
    assert (config.objective.zone_c, config.objective.lambda_fkl, config.curriculum.sigma) == (
        "fkl_decay",
        1.0,
        0.02,
    )


def test_derived_defaults(config_yaml: Path) -> None:
    config = load_config(
        config_yaml, ["device=cpu", "precision.student=float32", "student.parallel.tensor=2"]
    )
    assert (config.tokenizer_path, config.rollout_dtype) == ("in/student", "float32")
    assert config.evaluation_max_new_tokens == 16
    assert (config.student.parallel.sequence_parallel, config.teacher.parallel.sequence_parallel) == (
        True,
        False,
    )
    config = load_config(
        config_yaml,
        [
            *(
                "tokenizer=t",
                "rollout.dtype=float32",
                "evaluation.max_new_tokens=3",
            ),
            *("student.parallel.tensor=2", "student.parallel.sequence=false"),
        ],
    )
    assert (config.tokenizer_path, config.rollout_dtype) == ("t", "float32")
    assert (config.evaluation_max_new_tokens, config.student.parallel.sequence_parallel) == (3, False)


def test_config_is_frozen(config_yaml: Path) -> None:
    config = load_config(config_yaml)
    with pytest.raises(ValidationError, match="frozen"):
        config.student.parallel.tensor = 2  # type: ignore[misc]


def test_last_override_wins_and_values_are_yaml(config_yaml: Path) -> None:
    config = load_config(
        config_yaml, ["steps=7", "steps=9", "optimizer.lr=1e-5", "objective={name: opd}", "tokenizer="]
    )
    assert (config.steps, config.optimizer.lr, config.objective.name, config.tokenizer) == (
        9,
        1e-5,
        "opd",
        None,
    )


def test_dump_is_read_back_equal(config_yaml: Path, tmp_path: Path) -> None:
    config = load_config(
        config_yaml, ["objective={name: sead, lambda_fkl: auto}", "optimizer.lr=3e-7", "metrics.wandb=off"]
    )
    (tmp_path / "dumped.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "dumped.yaml") == config


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-6", 1e-6), ("1.5E3", 1500.0), (".5", 0.5), ("010", 10), ("-3", -3), ("off", "off"), ("no", "no"),
     ("1:30", "1:30"), ("2024-01-01", "2024-01-01"), ("true", True), ("null", None), ("~", None), ("", None)],
)  # fmt: skip
def test_yaml_scalars_mean_what_they_say(tmp_path: Path, text: str, value: object) -> None:
    from sead_megatron.config.yaml_file import parse_yaml

    parsed = parse_yaml(f"key: {text}", "test")
    assert parsed == {"key": value} and type(parsed["key"]) is type(value)  # type: ignore[index]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("studnet.path=x", "studnet: unknown key; did you mean student?"),
        ("student.paralell.tensor=2", "student.paralell: unknown key; did you mean student.parallel?"),
        ("student.parallel.tesnor=2", "student.parallel.tesnor: unknown key; did you mean "
                                      "student.parallel.tensor?"),
        ("max_new_tokens=2", "max_new_tokens: unknown key; did you mean evaluation.max_new_tokens?"),
        ("lr=1", "lr: unknown key; did you mean optimizer.lr?"),
        ("checkpoint.zzzzz=1", "checkpoint.zzzzz: unknown key; known are every and keep"),
        ("steps.foo=1", "steps.foo: steps is a value, it has no keys; set steps=VALUE"),
        ("steps", "override 'steps': must be key=value; write for example steps=100"),
        ("steps=[1", "override 'steps=[1', line 1, column 3: not valid YAML (expected ',' or ']', but got "
                     "'<stream end>'); correct the syntax there"),
        ("student.parallel.tensor=two",
         'student.parallel.tensor = "two": must be an integer; use for example 1'),
        ("steps=1.5", "steps = 1.5: must be an integer; use for example 181"),
        ("steps='3'", 'steps = "3": must be an integer; use for example 181'),
        ("steps=true", "steps = true: must be an integer; use for example 181"),
        ("steps=0", "steps = 0: must be greater than 0; use for example 181"),
        ("steps=", "steps: must be an integer, not null; use for example 181"),
        ("seed=-1", "seed = -1: must be at least 0; use for example 1234"),
        ("device=gpu", 'device = "gpu": must be cuda or cpu; use for example cuda'),
        ("batch.packing=no", 'batch.packing = "no": must be true or false; use for example true'),
        ("optimizer.lr=fast", 'optimizer.lr = "fast": must be a number; use for example 1e-06'),
        ("optimizer.lr=.inf", "optimizer.lr = Infinity: must be finite; use for example 1e-06"),
        ("optimizer.beta1=1", "optimizer.beta1 = 1: must be less than 1; use for example 0.9"),
        ("objective.alpha_start=1.5", "objective.alpha_start = 1.5: must be at most 1; use for example 0.8"),
        ("objective.teacher_topk=129", "objective.teacher_topk = 129: must be at most 128; use for example 64"),
        ("rollout.temperature=0",
         "rollout.temperature = 0: must be greater than 0; training needs sampled rollouts: use for "
         "example 0.7 or 1.0"),
        ("rollout.dtype=fp8",
         'rollout.dtype = "fp8": must be bfloat16 or float32; use for example bfloat16'),
        ("run_dir=3", 'run_dir = 3: must be text; use for example runs/first'),
        ("tokenizer=''", 'tokenizer = "": must not be empty; use for example models/student'),
        ("student.parallel=2", "student.parallel = 2: must be a section of keys and values; indent its "
                               "keys below it"),
        ("student.parallel=", "student.parallel: must be a section of keys and values, not null; "
                              "indent its keys below it"),
        ("objective={}", "objective.name: missing; add it, for example sead"),
        ("objective=sead", 'objective = "sead": must be a section of keys and values; indent its keys '
                           'below it'),
        ("objective={name: saed}",
         f'objective.name = "saed": must be {", ".join(OBJECTIVES)}; use for example sead'),
        ("objective={name: opd, alpha_start: 1.0}",
         "objective.alpha_start: not a setting of objective opd; remove it"),
        ("objective={name: sead, lambda_fkl: big}",
         'objective.lambda_fkl = "big": must be a number or auto; use for example 1.0'),
        ("objective={name: sead, lambda_fkl: -1}",
         "objective.lambda_fkl = -1: must be greater than 0 or auto; use for example 1.0"),
        ("objective={name: sead, zones: {d: 1}}",
         "objective.zones.d: unknown key; known are a, b and c"),
        ("student={}", "student.path: missing; add it, for example models/student"),
    ],
)  # fmt: skip
def test_each_mistake_is_one_exact_line(config_yaml: Path, override: str, message: str) -> None:
    overrides = ["objective={name: sead}", override] if override.startswith("objective.") else [override]
    assert mistake(config_yaml, *overrides) == message


def test_misspelt_key_in_the_file_wins_over_the_missing_one(tmp_path: Path) -> None:
    content = minimal(tmp_path)
    content["stpes"] = content.pop("steps")
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    assert mistake(path) == "stpes: unknown key; did you mean steps?"


def test_missing_section_names_what_it_needs(tmp_path: Path) -> None:
    content = minimal(tmp_path)
    del content["data"]
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    assert mistake(path) == "data: missing; add it, with prompts and prompts_per_step"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "{path}: the file is empty; start from the config.yaml of an example"),
        (b"- a\n", "{path}: must hold keys and values, like `steps: 100`; correct its top level"),
        (b"steps: 1\nseed: [1\ndevice: cpu\n",
         "{path}, line 3, column 7: not valid YAML (expected ',' or ']', but got ':'); correct the syntax "
         "there"),
        (b"steps: 1\nsteps: 2\n", "{path}, line 2, column 1: not valid YAML (key 'steps' twice); correct "
                                  "the syntax there"),
        (b"steps: 1\nseed: \x01\n", "{path}, line 2: not valid YAML (special characters are not allowed); "
                                    "remove the character"),
        (b"steps: \xff\n", "{path}: not UTF-8 (byte 7); save the file as UTF-8"),
        (b"1: 2\n", "1: unknown key; known are batch, checkpoint, curriculum, data, device, evaluation, "
                    "kernel, metrics, "
                    "objective, optimizer, precision, preset, profile, reference, rollout, run_dir, seed, steps, "
                    "student, teacher and tokenizer"),
    ],
)  # fmt: skip
def test_malformed_files(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    assert mistake(path) == message.format(path=path)


def test_missing_file_and_directory(tmp_path: Path) -> None:
    remedy = "give the path of a YAML configuration"
    assert mistake(tmp_path / "none.yaml") == f"{tmp_path / 'none.yaml'}: no such file; {remedy}"
    assert mistake(tmp_path) == f"{tmp_path}: is not a file; {remedy}"


def flat(annotation: object) -> list[object]:
    """The types and literal values that an annotation allows."""
    arguments = get_args(annotation)
    return [inner for argument in arguments for inner in flat(argument)] if arguments else [annotation]


def other_value(annotation: object, default: object) -> Any:
    """A valid value that differs from the default."""
    allowed = flat(annotation)
    if any(get_origin(branch) is list for branch in (annotation, *get_args(annotation))):
        return ["elsewhere"] if str in allowed else [7]
    if get_origin(annotation) is dict:
        return {"math": "elsewhere"}
    words = [word for word in allowed if isinstance(word, str) and word != default]
    if words:
        return words[-1]
    if bool in allowed:
        return not default
    if str in allowed:
        return "elsewhere"
    return 0.25 if float in allowed else 7


def _leaves() -> list[tuple[str, str, Any]]:
    """(path, what selects the section it is in, field); the leaves of every objective."""
    found = [(path, "", field) for path, field in leaves() if not path.startswith("objective.")]
    for name, (section, _) in OBJECTIVES.items():
        own = leaves((section,), "objective.")
        found += [(path, name, field) for path, field in own if path != "objective.name"]
    return found


@pytest.mark.parametrize(("path", "objective", "field"), _leaves(), ids=lambda value: str(value)[:40])
def test_every_leaf_is_documented_and_reachable(
    config_yaml: Path, path: str, objective: str, field: Any
) -> None:
    assert field.description and field.description.strip().endswith("."), f"{path} has no documentation"
    assert field.examples or field.default is not None, (
        f"{path} has neither example nor default for its errors"
    )
    value = "opd" if path == "preset" else other_value(field.annotation, field.default)
    overrides = [f"{path}={value if not isinstance(value, bool) else str(value).lower()}"]
    if objective:
        overrides.insert(0, f"objective.name={objective}")
    if path.startswith("reference.parallel."):
        overrides.insert(0, "reference.path=models/student")
    reached: Any = load_config(config_yaml, overrides)
    for key in path.split("."):
        reached = getattr(reached, key)
    assert reached == value


def test_schema_walk() -> None:
    paths = [path for path, _ in leaves()]
    assert {path for path in paths if paths.count(path) > 1} >= {"objective.name", "objective.temperature"}
    assert not [path for path in paths if paths.count(path) > 1 and not path.startswith("objective.")]
    assert {"student.parallel.tensor", "objective.zones.a", "objective.lambda_fkl", "seed"} <= set(paths)
    objectives = sections_of(TrainConfig.model_fields["objective"].annotation)
    assert [variant_name(section) for section in objectives] == list(OBJECTIVES)
    assert find_field(["objective", "zones", "q"]) is None


def test_the_kernels_limits_are_those_of_the_kernels(config_yaml: Path) -> None:
    """The configuration imports no torch, so it repeats what the kernels know."""
    backends = get_args(KernelConfig.model_fields["backend"].annotation)
    assert backends == ("auto", *BACKENDS)
    assert load_config(config_yaml, [f"objective={{name: sead, teacher_topk: {MAX_TOPK}}}"])
    with pytest.raises(UserError, match=f"must be at most {MAX_TOPK}"):
        load_config(config_yaml, [f"objective={{name: sead, teacher_topk: {MAX_TOPK + 1}}}"])
