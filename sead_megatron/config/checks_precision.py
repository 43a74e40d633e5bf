"""Can the models be computed in the formats that the configuration asks for? No file is opened here."""

from collections.abc import Mapping

from sead_megatron.config.schema import FP8_RECIPES, TrainConfig
from sead_megatron.errors import UserError
from sead_megatron.models.architecture import HFConfig, YarnRope

# What an FP8 GEMM's dimensions must be multiples of; MXFP8 scales 32 elements at once.
_FP8_MULTIPLE = {"tensorwise": 16, "blockwise": 16, "mxfp8": 32}


def check_precision(config: TrainConfig, student: HFConfig, teachers: Mapping[str, HFConfig]) -> None:
    """Raises UserError for a format that the device or a model's shape does not allow."""
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
    _check_widths("student", precision.student, student, config.student.parallel.tensor)
    for field, teacher in teachers.items():
        _check_widths("teacher", precision.teacher, teacher, config.teacher.parallel.tensor)
        if config.teacher.yarn_layers == "all" and not isinstance(teacher.rope.scaling, YarnRope):
            raise UserError(
                "teacher.yarn_layers",
                "all",
                f"the {config.teacher.owner_of(field)} has no YaRN rope scaling",
                "use full_attention",
            )


def _check_widths(name: str, precision: str, model: HFConfig, tensor: int) -> None:
    if precision not in FP8_RECIPES:
        return
    multiple = _FP8_MULTIPLE[FP8_RECIPES[precision]]
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
