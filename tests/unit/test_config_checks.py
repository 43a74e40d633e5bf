"""Cross-field, layout and file checks: from a set of inputs that passes, each test breaks one thing."""

from pathlib import Path

import pytest

from sead_megatron.config import check_config, load_config
from sead_megatron.config.schema import FP8_RECIPES
from sead_megatron.errors import UserError
from sead_megatron.models.fp8_shapes import row_multiple
from tests.tiny_inputs import write_inputs, write_jsonl, write_model, write_tokenizer_json


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def mistake(path: Path, world_size: int, *overrides: str) -> str:
    config = load_config(path, overrides)
    with pytest.raises(UserError) as error:
        check_config(config, world_size)
    message = str(error.value)
    assert "\n" not in message
    return message


def test_what_passes(good: Path) -> None:
    config = load_config(good, ["student.parallel.tensor=2", "teacher.parallel={tensor: 2, pipeline: 2}"])
    run = check_config(config, 8)
    assert (str(run.student), str(run.teacher), run.prompts, run.epochs) == (
        "TP2 PP1 DP4",
        "TP2 PP2 DP2",
        8,
        2.0,
    )
    assert run.summary("sorted_noise") == (
        "world size 8: student TP2 PP1 DP4, teacher TP2 PP2 DP2, 8 engines of TP1\n"
        "8 prompts, 2.00 epochs, curriculum sorted_noise\n"
        "note: sorted_noise starts every further epoch from easy prompts again, sorted with new noise"
    )
    assert "note" not in check_config(load_config(good, ["steps=2"]), 1).summary("sorted_noise")


@pytest.mark.parametrize(
    ("world", "overrides", "message"),
    [
        (3, ["student.parallel.tensor=3"],
         "student.parallel.tensor = 3: must divide num_attention_heads (8); use 1, 2 or 4"),
        (8, ["student.parallel.tensor=8"],
         "student.parallel.tensor = 8: must divide num_key_value_heads (4); use 1, 2 or 4"),
        (8, ["teacher.parallel.pipeline=8"],
         "teacher.parallel.pipeline = 8: must be at most num_hidden_layers (4): every stage holds a layer; use at most "
         "4"),
        (4, ["teacher.parallel.pipeline=2", "teacher.parallel.stages=[1, 2]"],
         "teacher.parallel.stages = [1, 2]: must be 2 numbers that add up to num_hidden_layers (4); leave it out: "
         "stages are then balanced by parameters"),
        (6, ["student.parallel.tensor=4"],
         "student.parallel tensor * pipeline = 4: must divide the world size (6); launch a multiple of 4 "
         "processes, "
         "or use 1 x 1, 1 x 2, 1 x 3, 2 x 1 or 2 x 3"),
        (4, ["student.parallel.sequence=true"],
         "student.parallel.sequence = true: needs tensor > 1; leave it out or raise tensor"),
        (4, ["rollout.tensor_parallel=3"],
         "rollout.tensor_parallel = 3: must divide the world size (4); use 1, 2 or 4"),
        (16, ["rollout.tensor_parallel=16", "data.prompts_per_step=8", "rollout.samples_per_prompt=2"],
         "rollout.tensor_parallel = 16: must divide the student's num_attention_heads (8); use 1, 2, 4 or 8"),
        (8, ["student.parallel.tensor=1"],
         "data.prompts_per_step = 4: times rollout.samples_per_prompt (1) must be at least the student's "
         "data-parallel size (8), or replicas have no sequence; use at least 8"),
        (1, ["rollout.max_new_tokens=64"],
         "rollout.max_model_len = 64: must be greater than max_new_tokens (64): it holds the prompt too; "
         "add the tokens of the longest prompt"),
        (1, ["batch.max_tokens_per_microbatch=63"],
         "batch.max_tokens_per_microbatch = 63: must be at least rollout.max_model_len (64): a sequence "
         "is never cut; "
         "use at least 64"),
        (1, ["rollout.max_model_len=129", "batch.max_tokens_per_microbatch=200"],
         "rollout.max_model_len = 129: must be at most the student's max_position_embeddings (128); "
         "shorten it, and "
         "rollout.max_new_tokens with it"),
        (1, ["device=cpu"], "rollout.kv_cache_gib: required with device: cpu; use for example 1.0"),
        (1, ["evaluation.every=5"],
         "evaluation.every = 5: needs evaluation.prompts or evaluation.benchmarks; set one, or use every: 0"),
        (1, ["evaluation.samples=4"],
         "evaluation.samples = 4: needs evaluation.temperature above 0: greedy responses to a problem are all the "
         "same; set it, for example to 0.6"),
        (1, ["evaluation.benchmarks=[none.parquet]"],
         'evaluation.benchmarks = "none.parquet": no such file; give the path of a JSONL or parquet file'),
        (1, ["evaluation.max_new_tokens=64"],
         "evaluation.max_new_tokens = 64: must be less than rollout.max_model_len (64): it holds prompts "
         "too; "
         "shorten it"),
        (1, ["curriculum.difficulty="],
         "curriculum.difficulty: required with curriculum.name sorted_noise; run tools/estimate_difficulty.py, or "
         "use name: uniform"),
        (1, ["curriculum.difficulty=", "curriculum.name=competence"],
         "curriculum.difficulty: required with curriculum.name competence; run tools/estimate_difficulty.py, or use "
         "name: uniform"),
        (1, ["curriculum.name=competence", "curriculum.c0=0.2"],
         "curriculum.c0 = 0.2: times 2^power must reach 1 (it is 0.4), or the hardest prompts are never "
         "eligible; "
         "use at least 0.5"),
        (1, ["optimizer.warmup_steps=4"],
         "optimizer.warmup_steps = 4: must be less than steps (4); shorten the warm-up"),
        (1, ["optimizer.min_lr=1e-3"],
         "optimizer.min_lr = 0.001: must be at most lr (1e-06); lower it or raise lr"),
        (1, ["objective={name: sead, zones: {a: 50, b: 30, c: 10}}"],
         'objective.zones = {"a": 50.0, "b": 30.0, "c": 10.0}: must sum to 100 (they sum to 90); use for '
         'example b: 40'),
        (1, ["objective={name: sead, zones: {a: 80, b: 0, c: 50}}"],
         'objective.zones = {"a": 80.0, "b": 0.0, "c": 50.0}: must sum to 100 (they sum to 130); '
         "use a: 50, b: 40, c: 10"),
        (1, ["objective={name: sead, zone_mode: absolute}"],
         "objective.absolute_after = 10: must be less than steps (4), or the thresholds are never frozen; "
         "lower it, or use zone_mode: percentile"),
        (1, ["objective={name: sead, teacher_entropy: topk}"],
         "objective.teacher_topk = 64: must be at most the teacher's vocab_size (8); use for example 64"),
        (1, ["data.prompts_per_step=9"],
         "data.prompts_per_step = 9: must be at most the number of prompts (8), or a step repeats a prompt; "
         "use at most 8"),
        (1, ["student.path=/no/model"],
         'student.path = "/no/model": no such directory; give a local Hugging Face directory'),
        (1, ["tokenizer=/no/tokenizer"],
         'tokenizer = "/no/tokenizer": no such directory; give a local tokenizer directory'),
    ],
)  # fmt: skip
def test_each_contradiction_is_one_exact_line(
    good: Path, world: int, overrides: list[str], message: str
) -> None:
    assert mistake(good, world, *overrides) == message


@pytest.mark.parametrize(
    "overrides",
    [
        ["rollout.tensor_parallel=8", "student.parallel.tensor=4"],  # 4 KV heads: each is held by two ranks
        ["curriculum={name: uniform}", "student.parallel.pipeline=2"],
        ["curriculum.name=competence", "student.parallel.pipeline=4"],
        ["objective={name: opd}", "student.parallel.tensor=2"],
        ["objective={name: sead, zone_mode: absolute, absolute_after: 3}", "student.parallel.tensor=2"],
        [
            "device=cpu",
            "rollout.kv_cache_gib=0.5",
            "optimizer.distributed=false",
            "student.parallel.tensor=2",
        ],
        ["optimizer.warmup_steps=3", "rollout.samples_per_prompt=2"],
    ],
)
def test_allowed_combinations(good: Path, overrides: list[str]) -> None:
    check_config(load_config(good, overrides), 8)


def test_blocks_must_nest(good: Path, tmp_path: Path) -> None:
    teacher = write_model(tmp_path / "teacher", num_hidden_layers=3)
    overrides = [f"teacher.path={teacher}", "teacher.parallel.pipeline=3", "student.parallel.tensor=2"]
    assert mistake(good, 12, *overrides) == (
        'teacher.parallel = "TP1 PP3": its block of 3 ranks must be a multiple or a divisor of the '
        "student's block "
        "of 2 (TP2 PP1); choose a teacher tensor * pipeline of 1, 2, 4, 6 or 12"
    )


def test_ffn_is_cut_evenly(good: Path, tmp_path: Path) -> None:
    student = write_model(tmp_path / "student", intermediate_size=90)
    assert mistake(good, 4, f"student.path={student}", "student.parallel.tensor=4") == (
        "student.parallel.tensor = 4: must divide intermediate_size (90); use 1 or 2"
    )
    assert mistake(good, 4, f"student.path={student}", "rollout.tensor_parallel=4") == (
        "rollout.tensor_parallel = 4: must divide the student's intermediate_size (90); use 1 or 2"
    )


def test_engine_key_value_heads(good: Path, tmp_path: Path) -> None:
    student = write_model(tmp_path / "student", num_attention_heads=12, num_key_value_heads=6, hidden_size=96)
    assert mistake(good, 4, f"student.path={student}", "rollout.tensor_parallel=4") == (
        "rollout.tensor_parallel = 4: must divide the student's num_key_value_heads (6) or be a multiple "
        "of it; "
        "use 1 or 2"
    )


def test_run_dir_is_not_a_file(good: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    path.touch()
    assert mistake(good, 1, f"run_dir={path}") == (
        f'run_dir = "{path}": exists and is not a directory; give another path'
    )


def test_missed_difficulties(good: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", [{"id": "p3", "difficulty": 0}])
    assert mistake(good, 1, f"curriculum.difficulty={path}") == (
        f'curriculum.difficulty = "{path}": has no difficulty for 7 of 8 prompts: p0, p1, p2, ...; '
        "estimate the difficulty of the same prompt file"
    )


def test_evaluation_needs_answers(good: Path, tmp_path: Path) -> None:
    path = write_jsonl(
        tmp_path / "e.jsonl", [{"id": "a", "prompt": "one"}, {"id": "b", "prompt": "two", "answer": "2"}]
    )
    assert mistake(good, 1, f"evaluation.prompts={path}") == (
        f'evaluation.prompts = "{path}": 1 of 2 prompts have no answer to grade by: a; add answers or '
        f"remove these "
        "prompts"
    )


def test_a_benchmark_with_the_name_of_another_metric(good: Path, tmp_path: Path) -> None:
    entry = {"id": "a", "prompt": "one", "answer": "1"}
    paths = [str(write_jsonl(tmp_path / f"{name}.jsonl", [entry])) for name in ("fine", "accuracy")]
    check_config(load_config(good, [f"evaluation.benchmarks={paths[:1]}", "evaluation.every=2"]), 1)
    assert mistake(good, 1, f"evaluation.benchmarks={paths}") == (
        f'evaluation.benchmarks = "{paths[1]}": evaluation/accuracy is the metric of evaluation.prompts; rename the '
        "file"
    )


def test_other_tokenizer(good: Path, tmp_path: Path) -> None:
    teacher = write_model(tmp_path / "teacher")
    write_tokenizer_json(teacher, ["<unk>", "<s>", "</s>", "one", "minus", "two", "is", "three"])
    assert mistake(good, 1, f"teacher.path={teacher}") == (
        f"teacher.path = \"{teacher}\": its tokenizer is not that of student.path: id 4 is 'minus', not "
        f"'plus'; "
        "use a pair of models that share a tokenizer"
    )
    assert "its tokenizer is not that of tokenizer: id 4" in mistake(good, 1, f"tokenizer={teacher}")


def test_truncated_weights(good: Path, tmp_path: Path) -> None:
    teacher = write_model(tmp_path / "teacher")
    file = teacher / "model.safetensors"
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-1])
    assert mistake(good, 1, f"teacher.path={teacher}") == (
        f"{file}: model.layers.3.mlp.down_proj.weight: ends at byte {size}, but the file has {size - 1}; "
        "complete the download"
    )


def test_unsupported_architecture(good: Path, tmp_path: Path) -> None:
    teacher = write_model(tmp_path / "teacher", architectures=["GPT2LMHeadModel"])
    assert mistake(good, 1, f"teacher.path={teacher}") == (
        f'{teacher}/config.json: architectures = ["GPT2LMHeadModel"]: not a supported architecture; '
        "use a model of LlamaForCausalLM, DeciLMForCausalLM, Olmo3ForCausalLM or Qwen3ForCausalLM"
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["precision.student=fp8_blockwise"],
         'precision.student = "fp8_blockwise": FP8 needs a GPU and Transformer Engine, not device: cpu; use '
         "bfloat16"),
        (["precision.teacher=fp8_tensorwise"],
         'precision.teacher = "fp8_tensorwise": FP8 needs a GPU and Transformer Engine, not device: cpu; use '
         "bfloat16, or modelopt_fp8 to simulate it"),
        (["rollout.quantization=fp8"],
         'rollout.quantization = "fp8": needs a GPU, not device: cpu; use none'),
        (["device=cuda", "precision.teacher=fp8_mxfp8", "teacher.parallel.tensor=4"],
         'precision.teacher = "fp8_mxfp8": hidden_size (64) must be a multiple of 32 on each of 4 tensor-parallel '
         "ranks; use bfloat16, or a smaller tensor-parallel size"),
        (["teacher.yarn_layers=all"],
         'teacher.yarn_layers = "all": the teacher has no YaRN rope scaling; use full_attention'),
    ],
)  # fmt: skip
def test_precisions_that_cannot_be(good: Path, overrides: list[str], message: str) -> None:
    cpu = ["device=cpu", "rollout.kv_cache_gib=1.0"]
    assert mistake(good, 4, *cpu, *overrides) == message


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["precision.teacher=fp8_blockwise", "teacher.parallel.tensor=2", "batch.max_tokens_per_microbatch=300"],
         "batch.max_tokens_per_microbatch = 300: must be a multiple of 256 with precision.teacher fp8_blockwise (128 "
         "tokens on each of 2 sequence-parallel ranks); use 512"),
        (["precision.student=fp8_tensorwise", "student.parallel.tensor=2", "batch.max_tokens_per_microbatch=80"],
         "batch.max_tokens_per_microbatch = 80: must be a multiple of 32 with precision.student fp8_tensorwise (16 "
         "tokens on each of 2 sequence-parallel ranks); use 96"),
        (["precision.student=fp8_mxfp8", "student.parallel.tensor=1",
          "batch.max_tokens_per_microbatch=80"],
         "batch.max_tokens_per_microbatch = 80: must be a multiple of 32 with precision.student fp8_mxfp8; use 96"),
        (["precision.teacher=modelopt_fp8", "teacher.parallel.tensor=4"],
         'precision.teacher = "modelopt_fp8": intermediate_size (96) must be a multiple of 16 on each of 4 '
         "tensor-parallel ranks; use bfloat16, or a smaller tensor-parallel size"),
    ],
)  # fmt: skip
def test_shapes_that_fp8_does_not_take(good: Path, overrides: list[str], message: str) -> None:
    assert mistake(good, 4, "device=cuda", *overrides) == message


def test_rows_of_fp8() -> None:
    """What Transformer Engine 2.20 quantises before it gathers; Megatron's own alignment where nothing is cut."""
    cut = {recipe: row_multiple(recipe, 4, sequence_parallel=True) for recipe in FP8_RECIPES.values()}
    assert cut == {"tensorwise": 4 * 16, "blockwise": 4 * 128, "mxfp8": 4 * 32}
    whole = {recipe: row_multiple(recipe, 4, sequence_parallel=False) for recipe in FP8_RECIPES.values()}
    assert whole == {"tensorwise": 16, "blockwise": 16, "mxfp8": 32}
    assert [row_multiple(None, 4, sequence_parallel=cut) for cut in (True, False)] == [4, 1]


def test_fp8_on_a_gpu_passes(good: Path) -> None:
    config = load_config(good, ["precision.teacher=fp8_tensorwise", "precision.student=fp8_blockwise"])
    assert check_config(config, 1).prompts == 8
