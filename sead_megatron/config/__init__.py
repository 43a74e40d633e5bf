"""Configuration of a run: schema, loading with overrides, and the checks that run before anything heavy is
imported."""

from sead_megatron.config.checks import CheckedRun, check_config
from sead_megatron.config.load import dump_config, load_config
from sead_megatron.config.objective import Objective, OpdObjective, SeadObjective, ZoneShares
from sead_megatron.config.schema import (
    BatchConfig,
    CheckpointConfig,
    CurriculumConfig,
    DataConfig,
    EvaluationConfig,
    KernelConfig,
    MetricsConfig,
    OptimizerConfig,
    ParallelConfig,
    PrecisionConfig,
    RolloutConfig,
    StudentConfig,
    TeacherConfig,
    TrainConfig,
)

__all__ = [
    "BatchConfig",
    "CheckedRun",
    "CheckpointConfig",
    "CurriculumConfig",
    "DataConfig",
    "EvaluationConfig",
    "KernelConfig",
    "MetricsConfig",
    "Objective",
    "OpdObjective",
    "OptimizerConfig",
    "ParallelConfig",
    "PrecisionConfig",
    "RolloutConfig",
    "SeadObjective",
    "StudentConfig",
    "TeacherConfig",
    "TrainConfig",
    "ZoneShares",
    "check_config",
    "dump_config",
    "load_config",
]
