"""The configuration of a run. Torch-free; every field is documented below it and read by exactly one
owner."""

from typing import Annotated, Literal

from pydantic import Field

from sead_megatron.config.models import ReferenceConfig, StudentConfig, TeacherConfig
from sead_megatron.objectives import AnyObjective
from sead_megatron.objectives.sead import SeadObjective
from sead_megatron.section import (
    Name,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
)

DType = Literal["bfloat16", "float32"]


FP8_RECIPES = {"fp8_tensorwise": "tensorwise", "fp8_blockwise": "blockwise", "fp8_mxfp8": "mxfp8"}
"""Precisions with FP8 GEMMs, and Megatron-core's names of their recipes."""


class PrecisionConfig(Section):
    """Number formats of both models. Everything FP8 needs a GPU and Transformer Engine, `modelopt_fp8` ModelOpt."""

    student: Literal["bfloat16", "float32", "fp8_tensorwise", "fp8_blockwise", "fp8_mxfp8"] = "bfloat16"
    """Format of the student. With bfloat16 and FP8, parameters are bfloat16 and the optimizer keeps float32 masters;
    FP8 multiplies in E4M3 with one scale a tensor (`fp8_tensorwise`), one a 128 x 128 or 1 x 128 block
    (`fp8_blockwise`, Hopper) or one for 32 elements (`fp8_mxfp8`, Blackwell)."""
    teacher: Literal[
        "bfloat16", "float32", "fp8_tensorwise", "fp8_blockwise", "fp8_mxfp8", "modelopt_fp8"
    ] = "bfloat16"
    """Format of the teacher. With FP8 it keeps its linear weights in FP8 only, half of bfloat16's memory.
    `modelopt_fp8`: per-tensor FP8 by ModelOpt, calibrated on training prompts; on the CPU it is simulated."""
    first_last_bfloat16: bool = True
    """Keep the first and the last decoder layer of each model in bfloat16 when the others are FP8."""
    calibration_prompts: PositiveInt = 32
    """Training prompts that `modelopt_fp8` is calibrated on."""
    allow_local_layers: bool = False
    """Run on CUDA where Transformer Engine is not installed: layers of plain torch operators, an attention call for
    each sequence, no FP8 recipes. Much slower; the memory plan counts on these layers."""


class DataConfig(Section):
    """What the student is trained on."""

    prompts: Name = Field(examples=["data/train.jsonl"])
    """JSONL of training prompts: `id`, `messages` or `prompt`, optional `answer` and `domain`."""
    prompts_per_step: PositiveInt = Field(examples=[96])
    """Prompts of one optimizer step, over the whole world (the paper: 96)."""
    cache: Name | None = Field(default=None, examples=["data/cache"])
    """Directory of responses that were sampled and scored once: `python -m sead_megatron cache` writes it, objective
    `lightning` trains on it in place of rollouts and teacher."""


class EvaluationConfig(Section):
    """Pass rate on held-out prompts."""

    prompts: Name | None = Field(default=None, examples=["data/eval.jsonl"])
    """JSONL of evaluation prompts, each with an `answer`, decoded greedily. Default: none."""
    benchmarks: list[Name] = Field(default=[], examples=[["data/MATH-500.parquet"]])
    """Benchmarks, JSONL or parquet (docs/evaluation.md); each has a metric of its own, `evaluation/<file name>`."""
    samples: PositiveInt = 1
    """Responses to each problem of the benchmarks."""
    temperature: NonNegativeFloat = 0.0
    """Sampling temperature of the benchmarks' responses; 0 is greedy."""
    every: NonNegativeInt = 0
    """Evaluate every so many steps; 0: only before the first and after the last step."""
    max_new_tokens: PositiveInt | None = Field(default=None, examples=[1024])
    """Longest evaluation response, tokens. Default: `rollout.max_new_tokens`."""
    limit: PositiveInt | None = Field(default=None, examples=[100])
    """Use only the first so many evaluation prompts, and problems of each benchmark. Default: all."""


class RolloutConfig(Section):
    """The vLLM engine inside every rank, and how it samples."""

    tensor_parallel: PositiveInt = 1
    """Tensor-parallel size of an engine; world / this many engines share the prompts."""
    temperature: PositiveFloat = Field(
        default=0.7,
        json_schema_extra={"remedy": "training needs sampled rollouts: use for example 0.7 or 1.0"},
    )
    """Sampling temperature (the paper: 0.7). Not the loss's, which is `objective.temperature`."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus sampling; 1 is off."""
    top_k: NonNegativeInt = 0
    """Sample among the k most likely tokens; 0 is off."""
    samples_per_prompt: PositiveInt = 1
    """Rollouts of each prompt (the paper: 1)."""
    max_new_tokens: PositiveInt = Field(examples=[16384])
    """Longest response, tokens; longer ones are cut and count as unfinished (the paper: 16384)."""
    max_model_len: PositiveInt = Field(examples=[18432])
    """Longest prompt and response together, tokens."""
    max_num_seqs: PositiveInt = 64
    """Sequences that an engine decodes at the same time."""
    kv_cache_gib: PositiveFloat | None = Field(default=None, examples=[1.0])
    """Size of an engine rank's KV cache, GiB; required on the CPU. Default: from `gpu_memory_utilization`."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of the GPU's memory for the engine, its weights included; the trainer needs the rest."""
    dtype: DType | None = Field(default=None, examples=["bfloat16"])
    """Type of the engine's weights. Default: the student's (bfloat16 with FP8)."""
    quantization: Literal["none", "fp8"] = "none"
    """`fp8`: vLLM multiplies in FP8 (CUDA only), re-quantised from the student's weights in every step. The engine's
    distribution then differs from the trainer's: watch `rollout/logprob_diff_mean`."""
    enforce_eager: bool | None = Field(default=None, examples=[True])
    """Do not capture CUDA graphs. Default: true on the CPU, false on CUDA."""
    async_scheduling: bool | None = Field(default=None, examples=[False])
    """Plan the next decoding step while the GPU works on this one (CUDA only). Default: as vLLM decides."""
    sync_bucket_mib: PositiveInt = 256
    """Weights are gathered for the engine in buckets of this size, MiB."""


class CurriculumConfig(Section):
    """Which prompts a step takes (SEAD, section 2.5 and Appendix B.2)."""

    name: Literal["sorted_noise", "competence", "uniform"] = "sorted_noise"
    """`sorted_noise`: one pass without replacement in the order of difficulty + N(0, sigma^2); a further
    epoch sorts again with new noise. `competence`: uniform over the prompts with difficulty <= c(step).
    `uniform`: ignores it.

    Ambiguity: Algorithm 1 has the competence function, Appendix B.2 the sort "without explicit thresholds";
    the appendix describes what was run."""
    difficulty: Name | None = Field(default=None, examples=["data/difficulty.jsonl"])
    """JSONL of `id` and `difficulty` (1 - pass rate of the initial student); required unless `name:
    uniform`. `tools/estimate_difficulty.py` writes it."""
    sigma: NonNegativeFloat = 0.02
    """Standard deviation of the sort's noise (Appendix B.2); with 8 rollouts a prompt it only breaks ties."""
    c0: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Initial competence: c(s) = min(1, c0 * (1 + s / steps)^power). Not published."""
    power: PositiveFloat = 1.0
    """Exponent of the competence; c0 * 2^power must reach 1. Not published."""


class KernelConfig(Section):
    """The fused output layer and divergences."""

    backend: Literal["auto", "cuda", "cpu", "triton", "torch"] = "auto"
    """`cuda`: library GEMMs and CUDA C++ tile kernels (needs nvcc once). `cpu`: library GEMMs and C++ tile kernels
    (needs a C++ compiler once). `triton`: fused kernels, Hopper and newer. `torch`: plain torch, tile by tile,
    anywhere. `auto`: the first of these that works on the device."""
    tile_tokens: PositiveInt = 1024
    """Tokens of a tile."""
    tile_vocab: PositiveInt = 4096
    """Vocabulary entries of a tile; full-vocabulary logits never exist."""
    cache_mib: NonNegativeInt = 0
    """MiB of logits per microbatch that the loss keeps from its forward to its backward pass (backends `cuda` and
    `cpu`). 8 bytes per active token and vocabulary entry of a rank's shard keep them all and save two of six GEMMs."""
    check_finite: bool = False
    """Stop with an error at the first NaN or infinity in a hidden state or output layer. Reads them once more and
    synchronises: for debugging."""


class BatchConfig(Section):
    """How a step's rollouts are cut into microbatches."""

    max_tokens_per_microbatch: PositiveInt = Field(examples=[32768])
    """Longest packed row, tokens, at least `rollout.max_model_len`."""
    packing: bool = True
    """Pack several sequences into a row. False: one sequence a row."""


class OptimizerConfig(Section):
    """Adam as Megatron runs it."""

    lr: PositiveFloat = 1e-6
    """Peak learning rate.

    Ambiguity: the paper prints 5e-9, with which 181 steps of Adam could not move a bfloat16 weight; read as a
    misprint. Related methods use 5e-7 to 3e-6."""
    min_lr: NonNegativeFloat = 0.0
    """Learning rate at the end of the decay."""
    warmup_steps: NonNegativeInt = 0
    """Steps of linear warm-up."""
    decay: Literal["linear", "cosine", "constant"] = "linear"
    """Shape after the warm-up, down to `min_lr` at the last step."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Adam's first moment decay."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Adam's second moment decay."""
    eps: PositiveFloat = 1e-8
    """Adam's epsilon."""
    clip_grad: NonNegativeFloat = 1.0
    """Largest global gradient norm; 0 is off.

    Ambiguity: the paper's "clipped gradient step" with eps 0.2 has no ratio to clip with one update per
    batch; read as a norm clip."""
    distributed: bool = True
    """Shard the optimizer state over the data-parallel ranks."""
    max_skipped_steps: PositiveInt = 5
    """Stop after this many steps in a row that were skipped for a non-finite loss or gradient."""


class MetricsConfig(Section):
    """What is measured and written beyond the loss."""

    full_stats_every: NonNegativeInt = 0
    """Measure every statistic of every token, zone A included, every so many steps; 0: never."""
    topk_lists: Annotated[int, Field(ge=0, le=128)] = 0
    """With the statistics of every token: compare the models' lists of the k likeliest tokens too (`topk/...`; at least
    2); 0: not. Five more passes over an output layer."""
    rollout_samples: NonNegativeInt = 8
    """Rollouts written to `rollouts/step_N.jsonl` in each step."""
    logprob_diff_alarm: PositiveFloat = 0.05
    """Warn when the engine's and the trainer's logprobs of the sampled tokens differ by more, on average,
    nats."""
    wandb: Literal["off", "offline", "online"] = "off"
    """Weights & Biases logging."""
    wandb_project: Name = "sead_megatron"
    """Weights & Biases project."""
    tensorboard: bool = False
    """TensorBoard event files in RUN_DIR/tensorboard."""


class CheckpointConfig(Section):
    """When the whole state is written, and how many are kept."""

    every: PositiveInt = 50
    """Steps between checkpoints; the last step always writes one."""
    keep: PositiveInt = 2
    """Newest checkpoints that are kept."""


class ProfileConfig(Section):
    """Steps that are profiled: for Nsight Systems with `device: cuda`, as a torch trace in RUN_DIR/profile with
    `device: cpu` (docs/profiling.md)."""

    start_step: NonNegativeInt = 0
    """First step that is profiled; steps count from 1, as in metrics.jsonl. 0, with `stop_step: 0`: none."""
    stop_step: NonNegativeInt = 0
    """First step after those that are profiled: 3 and 5 profile steps 3 and 4."""
    ranks: list[NonNegativeInt] = Field(default=[0], min_length=1)
    """Ranks of the world that are profiled."""

    @property
    def enabled(self) -> bool:
        """Whether any step is profiled."""
        return self.start_step > 0 or self.stop_step > 0


class TrainConfig(Section):
    """A run: everything that `python -m sead_megatron train` reads."""

    seed: NonNegativeInt = 1234
    """Seed of the sampling, the curriculum and the model's random states."""
    device: Literal["cuda", "cpu"] = "cuda"
    """`cuda` (NCCL) or `cpu` (gloo; the same loop, for tests and the quick start)."""
    run_dir: Name = Field(examples=["runs/first"])
    """Directory that the run writes to, and continues from when it holds a checkpoint."""
    steps: PositiveInt = Field(examples=[181])
    """Optimizer steps in total."""
    preset: Name | None = Field(default=None, examples=["sead"])
    """Published settings of a method (a file of `sead_megatron/presets`) below everything that is set here."""
    tokenizer: Name | None = Field(default=None, examples=["models/student"])
    """Directory of the tokenizer and chat template. Default: `student.path`."""
    student: StudentConfig
    """The model that is trained."""
    teacher: TeacherConfig = TeacherConfig()
    """The model that scores, or several. Without a directory there is none: for objectives that read no teacher."""
    reference: ReferenceConfig | None = Field(default=None, examples=[{"path": "models/student"}])
    """The reference model of `gopd` and of GRPO's KL term. It is computed in the teacher's precision."""
    precision: PrecisionConfig = PrecisionConfig()
    """Number formats of both models."""
    data: DataConfig
    """Training prompts."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Held-out prompts."""
    rollout: RolloutConfig
    """Sampling."""
    curriculum: CurriculumConfig = CurriculumConfig()
    """Order of the prompts."""
    objective: AnyObjective = SeadObjective()
    """The loss: `name: sead`, `name: opd` or another method of `sead_megatron/objectives`, and its settings."""
    kernel: KernelConfig = KernelConfig()
    """The loss kernel."""
    batch: BatchConfig
    """Microbatches."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Optimizer and learning rate."""
    metrics: MetricsConfig = MetricsConfig()
    """Measurements."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Saved state."""
    profile: ProfileConfig = ProfileConfig()
    """Profiled steps."""

    @property
    def teachers(self) -> dict[str, str]:
        """`teacher.directories` of a run that loads them: of one that reads a cache they only tell who scored it."""
        return {} if self.objective.reads_cache else self.teacher.directories

    @property
    def loads_engine(self) -> bool:
        """Whether anything is sampled: rollouts, or responses to held-out prompts."""
        return self.samples_rollouts or bool(self.evaluation.prompts or self.evaluation.benchmarks)

    @property
    def samples_rollouts(self) -> bool:
        """Whether any step samples."""
        return not self.objective.reads_cache and self.objective.own_batches > 0

    @property
    def tokenizer_path(self) -> str:
        """`tokenizer` with its default applied."""
        return self.tokenizer or self.student.path

    @property
    def rollout_dtype(self) -> DType:
        """`rollout.dtype` with its default applied."""
        return self.rollout.dtype or ("float32" if self.precision.student == "float32" else "bfloat16")

    @property
    def evaluation_max_new_tokens(self) -> int:
        """`evaluation.max_new_tokens` with its default applied."""
        return self.evaluation.max_new_tokens or self.rollout.max_new_tokens
