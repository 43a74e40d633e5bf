"""Every check of a configuration that is possible before anything heavy is imported."""

from dataclasses import dataclass

from sead_megatron.config.checks_fields import check_fields, check_model_limits, check_profile
from sead_megatron.config.checks_inputs import check_inputs
from sead_megatron.config.checks_layout import check_layouts, check_reference
from sead_megatron.config.checks_precision import check_precision
from sead_megatron.config.checks_teacher import check_moving
from sead_megatron.config.schema import TrainConfig
from sead_megatron.models.architecture import HFConfig
from sead_megatron.models.hf_config import read_hf_config
from sead_megatron.parallel.layout import Layout


@dataclass(frozen=True)
class CheckedRun:
    """What the checks found out on their way."""

    student: Layout
    teacher: Layout | None
    """None where there is none."""
    engine_tensor_parallel: int
    """0 for a run without an engine."""
    prompts: int
    epochs: float
    """Passes over the training prompts in the whole run."""

    def summary(self, curriculum: str) -> str:
        """The run in a few lines, for people."""
        world, tensor = self.student.world, self.engine_tensor_parallel
        lines = [
            f"world size {world}: student {self.student}, "
            + ("no teacher" if self.teacher is None else f"teacher {self.teacher}")
            + (f", {world // tensor} engines of TP{tensor}" if tensor else ", no engine"),
            f"{self.prompts} prompts, {self.epochs:.2f} epochs, curriculum {curriculum}",
        ]
        if curriculum == "sorted_noise" and self.epochs > 1:
            lines.append(
                "note: sorted_noise starts every further epoch from easy prompts again, sorted with new noise"
            )
        return "\n".join(lines)


@dataclass(frozen=True)
class CheckedModels:
    """All architectures, and the layouts of student and teachers."""

    student: HFConfig
    teachers: dict[str, HFConfig]
    """By the fields that name them, in the order of `TrainConfig.teachers`."""
    student_layout: Layout
    teacher_layout: Layout
    """Without a teacher: one over which nothing is split."""
    reference: HFConfig | None = None


def check_models(config: TrainConfig, world_size: int) -> CheckedModels:
    """Check the fields and the layouts on `world_size` ranks; of the files, only each config.json is read.

    Raises UserError for the first mistake.
    """
    check_fields(config)
    check_profile(config.profile, config.steps, world_size)
    student = read_hf_config(config.student.path, "student.path")
    teachers = {field: read_hf_config(path, field) for path, field in config.teachers.items()}
    check_model_limits(config, student, teachers)
    check_moving(config, student, teachers)
    layouts = check_layouts(config, world_size, student, teachers)
    reference = None
    if config.reference is not None:
        reference = read_hf_config(config.reference.path, "reference.path")
        check_reference(config.reference, world_size, layouts[0], student, reference)
    check_precision(config, student, teachers, reference)
    return CheckedModels(student, teachers, *layouts, reference)


def check_config(config: TrainConfig, world_size: int) -> CheckedRun:
    """`check_models`, and the files. Raises UserError for the first mistake."""
    models = check_models(config, world_size)
    prompts = check_inputs(config)
    return CheckedRun(
        models.student_layout,
        models.teacher_layout if models.teachers else None,
        config.rollout.tensor_parallel if config.loads_engine else 0,
        prompts,
        config.steps * config.data.prompts_per_step / prompts,
    )
