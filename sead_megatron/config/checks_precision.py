"""Can the models be computed in the formats that the configuration asks for? No file is opened here."""

from collections.abc import Mapping

from sead_megatron.config.models import ParallelConfig
from sead_megatron.config.schema import FP8_RECIPES, TrainConfig
from sead_megatron.errors import UserError
from sead_megatron.models.architecture import HFConfig, YarnRope
from sead_megatron.models.fp8_shapes import WIDTH_MULTIPLE, row_multiple


def check_precision(
    config: TrainConfig,
    student: HFConfig,
    teachers: Mapping[str, HFConfig],
    reference: HFConfig | None = None,
) -> None:
    """Raises UserError for a format that the device, a model's shape or the length of rows does not allow."""
    precision = config.precision
    for name, value in (("student", precision.student), ("teacher", precision.teacher)):
        if value in FP8_RECIPES and config.device == "cpu":
            raise UserError(
                f"precision.{name}",
                value,
                "FP8 needs a GPU and Transformer Engine, not device: cpu",
                "use bfloat16" if name == "student" else "use bfloat16, or modelopt_fp8 to simulate it",
            )
    if config.rollout.quantization == "fp8" and config.device == "cpu":
        raise UserError("rollout.quantization", "fp8", "needs a GPU, not device: cpu", "use none")
    _check_model(config, "student", precision.student, student, config.student.parallel)
    for teacher in teachers.values():
        _check_model(config, "teacher", precision.teacher, teacher, config.teacher.parallel)
    if reference is not None and config.reference is not None and precision.teacher in FP8_RECIPES:
        _check_model(config, "teacher", precision.teacher, reference, config.reference.parallel)
    for field, teacher in teachers.items():
        if config.teacher.yarn_layers == "all" and not isinstance(teacher.rope.scaling, YarnRope):
            raise UserError(
                "teacher.yarn_layers",
                "all",
                f"the {config.teacher.owner_of(field)} has no YaRN rope scaling",
                "use full_attention",
            )


def _check_model(
    config: TrainConfig, name: str, precision: str, model: HFConfig, parallel: ParallelConfig
) -> None:
    if precision in FP8_RECIPES:
        recipe = FP8_RECIPES[precision]
        _check_widths(name, precision, WIDTH_MULTIPLE[recipe], model, parallel.tensor)
        _check_rows(config, name, precision, parallel)
    elif precision == "modelopt_fp8" and config.device == "cuda":
        # torch._scaled_mm's, which takes rows of any number; simulated FP8 has no such limits.
        _check_widths(name, precision, WIDTH_MULTIPLE["tensorwise"], model, parallel.tensor)


def _check_rows(config: TrainConfig, name: str, precision: str, parallel: ParallelConfig) -> None:
    """A row is padded to a multiple: the longest must have one already, or it would exceed its own limit."""
    sequence_parallel = parallel.sequence_parallel
    multiple = row_multiple(FP8_RECIPES[precision], parallel.tensor, sequence_parallel=sequence_parallel)
    longest = config.batch.max_tokens_per_microbatch
    if longest % multiple == 0:
        return
    where = ""
    if sequence_parallel:
        where = (
            f" ({multiple // parallel.tensor} tokens on each of {parallel.tensor} sequence-parallel ranks)"
        )
    raise UserError(
        "batch.max_tokens_per_microbatch",
        longest,
        f"must be a multiple of {multiple} with precision.{name} {precision}{where}",
        f"use {-(-longest // multiple) * multiple}",
    )


def _check_widths(name: str, precision: str, multiple: int, model: HFConfig, tensor: int) -> None:
    widths = [("hidden_size", model.hidden_size)]
    widths += [("num_attention_heads * head_dim", model.num_attention_heads * model.head_dim)]
    widths += [("intermediate_size", width) for width in model.ffn_hidden_sizes]
    for key, width in widths:
        # Of a row-parallel layer the input is cut, of a column-parallel one the output.
        if width % (multiple * tensor):
            raise UserError(
                f"precision.{name}",
                precision,
                f"{key} ({width}) must be a multiple of {multiple} on each of {tensor} tensor-parallel ranks",
                "use bfloat16, or a smaller tensor-parallel size",
            )
