"""Configuration of a run: schema, loading with overrides, and the checks that run before anything heavy is
imported."""

from sead_megatron.config.checks import CheckedModels, CheckedRun, check_config, check_models
from sead_megatron.config.load import dump_config, load_config
from sead_megatron.config.models import ParallelConfig, StudentConfig, TeacherConfig
from sead_megatron.config.schema import (
    BatchConfig,
    CheckpointConfig,
    CurriculumConfig,
    DataConfig,
    EvaluationConfig,
    KernelConfig,
    MetricsConfig,
    OptimizerConfig,
    PrecisionConfig,
    RolloutConfig,
    TrainConfig,
)

__all__ = [
    "BatchConfig",
    "CheckedModels",
    "CheckedRun",
    "CheckpointConfig",
    "CurriculumConfig",
    "DataConfig",
    "EvaluationConfig",
    "KernelConfig",
    "MetricsConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PrecisionConfig",
    "RolloutConfig",
    "StudentConfig",
    "TeacherConfig",
    "TrainConfig",
    "check_config",
    "check_models",
    "dump_config",
    "load_config",
]
