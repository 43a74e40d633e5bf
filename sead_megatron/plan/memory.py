"""Memory of every rank in every phase of a step, term by term. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from sead_megatron.config import TrainConfig
from sead_megatron.config.models import ParallelConfig
from sead_megatron.config.schema import FP8_RECIPES
from sead_megatron.models.architecture import HFConfig
from sead_megatron.models.layouts import padded_vocab_size
from sead_megatron.models.stages import stage_layers
from sead_megatron.parallel.layout import Layout
from sead_megatron.plan.activations import (
    ActivationShape,
    final_norm_bytes,
    forward_bytes,
    input_bytes,
    layer_bytes,
)
from sead_megatron.plan.buffers import trained_bytes
from sead_megatron.plan.devices import GIB, Device
from sead_megatron.plan.shards import ParameterShard, stage_parameters

PHASES = ("rollout", "teacher", "update", "sync")
MIB = 1 << 20

# Assumed, not measured: CUDA context, NCCL's buffers for the groups of two models, cuBLAS and TE workspaces; what an
# awake engine computes with; and what a sleeping one keeps (graphs, sampler buffers).
PROCESS_BYTES = int(2.5 * GIB)
ENGINE_WORKSPACE_BYTES = int(2.0 * GIB)
ENGINE_ASLEEP_BYTES = int(1.0 * GIB)


@dataclass(frozen=True)
class Run:
    """What is planned: a configuration on a world of equal devices."""

    config: TrainConfig
    student: HFConfig
    teachers: tuple[HFConfig, ...]
    """None where the configuration loads none."""
    world: int
    device: Device | None
    """None on the CPU, where Transformer Engine's layers do not run and engines do not sleep."""
    reference: HFConfig | None = None
    """The reference model, where the configuration has one."""

    @property
    def student_layout(self) -> Layout:
        """The student's layout over the world."""
        return _layout(self.config.student.parallel, self.world)

    @property
    def teacher_layout(self) -> Layout:
        """The teachers' layout over the world; without one nothing is split."""
        return _layout(self.config.teacher.parallel if self.teachers else ParallelConfig(), self.world)

    @property
    def rollouts(self) -> int:
        """Rollouts of a step, over the whole world."""
        return self.config.data.prompts_per_step * self.config.rollout.samples_per_prompt

    @property
    def response_share(self) -> float:
        """Responses' largest share of a row's tokens."""
        return self.config.rollout.max_new_tokens / self.config.rollout.max_model_len

    def engine_weights(self) -> int:
        """Bytes of the engine's weights on a rank."""
        tensor = self.config.rollout.tensor_parallel
        linear, other = _parameter_counts(self.student, tensor)
        element = 4 if self.config.rollout_dtype == "float32" else 2
        return linear * (1 if self.config.rollout.quantization == "fp8" else element) + other * element

    def kv_bytes_per_token(self) -> int:
        """Bytes of a token in the KV cache of one rank."""
        element = 4 if self.config.rollout_dtype == "float32" else 2
        heads = sum(
            max(1, layer.num_key_value_heads // self.config.rollout.tensor_parallel)
            for layer in self.student.layers
            if layer.has_attention
        )
        return 2 * heads * self.student.head_dim * element


@dataclass(frozen=True)
class RankMemory:
    """Bytes by term on one rank: what is there in every phase, and what each phase adds."""

    rank: int
    always: dict[str, int]
    from_step_2: dict[str, int]
    """Of the optimizer: it appears in the first update."""
    phases: dict[str, dict[str, int]]
    checkpoint_copy: int
    """Of host memory, on a GPU too: a copy of the rank's share of a checkpoint, from the first one on."""

    def terms(self, phase: str, *, first_step: bool = False) -> dict[str, int]:
        """Everything that is there at a phase's peak. The first update ends with the optimizer's moments too."""
        later = {} if first_step and phase != "update" else self.from_step_2
        return self.always | later | self.phases[phase]

    def total(self, phase: str, *, first_step: bool = False) -> int:
        """Bytes at a phase's peak."""
        return sum(self.terms(phase, first_step=first_step).values())

    @property
    def peak_phase(self) -> str:
        """The phase that needs most."""
        return max(PHASES, key=self.total)

    @property
    def peak(self) -> int:
        """Bytes at the peak of a step, from the second one on."""
        return self.total(self.peak_phase)


def plan_memory(run: Run, ranks: Iterable[int] | None = None) -> list[RankMemory]:
    """The memory of every rank, or of some."""
    planner = _Planner(run)
    return [planner.rank(rank) for rank in (range(run.world) if ranks is None else ranks)]


def _layout(parallel: ParallelConfig, world: int) -> Layout:
    return Layout(parallel.tensor, parallel.pipeline, world)


def _parameter_counts(config: HFConfig, tensor: int) -> tuple[int, int]:
    """(matrices of the layers, everything else) in elements of a rank that holds all layers."""
    shards = stage_parameters(config, tensor, (config.num_layers,), 0, trained=True, fused_norms=False)
    linear = sum(shard.numel for shard in shards if shard.is_matrix)
    return linear, sum(shard.numel for shard in shards) - linear


class _Planner:
    """Computes what ranks have in common once."""

    def __init__(self, run: Run) -> None:
        self._run = run
        config = run.config
        # Where other layers are allowed, Transformer Engine is likely to be missing.
        self._fused = run.device is not None and not config.precision.allow_local_layers
        # ModelOpt compresses on a GPU only, and wants Megatron's linear layers, whose norms stand alone.
        self._modelopt = run.device is not None and config.precision.teacher == "modelopt_fp8"
        self._student_stages = stage_layers(
            run.student, config.student.parallel.pipeline, config.student.parallel.stages
        )
        parallel = config.teacher.parallel
        self._teacher_stages = [
            stage_layers(teacher, parallel.pipeline, parallel.stages) for teacher in run.teachers
        ]
        self._student_element = 4 if config.precision.student == "float32" else 2
        self._teacher_element = 4 if config.precision.teacher == "float32" else 2
        self._row = config.batch.max_tokens_per_microbatch

    def rank(self, rank: int) -> RankMemory:
        run = self._run
        student, teacher = run.student_layout, run.teacher_layout
        stage, teacher_stage = student.pp_rank(rank), teacher.pp_rank(rank)
        parameters = self._parameters(stage)
        trained = trained_bytes(
            parameters,
            self._student_element,
            data=student.data,
            data_rank=student.dp_rank(rank),
            distributed=run.config.optimizer.distributed,
        )
        always = {} if run.device is None else {"process": PROCESS_BYTES}
        always |= {
            "student weights": trained.parameters,
            "gradients": trained.gradients,
            "optimizer masters": trained.masters,
        }
        if run.teachers:
            always["teacher weights"] = sum(
                self._frozen_bytes(model, teacher.tensor, stages, teacher_stage, modelopt=self._modelopt)
                for model, stages in zip(run.teachers, self._teacher_stages, strict=True)
            )
            always["teacher output layer"] = sum(self._output_bytes(model, stage) for model in run.teachers)
        if run.config.teacher.ema is not None and self._teacher_element == 2:
            # In float32, of every parameter of the student, whose layout is the teacher's.
            always["teacher averages"] = 4 * sum(shard.numel for shard in parameters)
        always |= self._reference_bytes(rank, stage)
        if run.config.precision.student in FP8_RECIPES:
            # A quantised copy of each matrix and its transpose, kept from the first microbatch to the last.
            always["student FP8 copies"] = 2 * sum(p.numel for p in parameters if p.is_matrix)
        phases = {
            "rollout": self._engine_bytes(),
            "teacher": self._teacher_phase(teacher_stage, stage),
            "update": self._update_phase(stage),
            "sync": self._sync_phase(),
        }
        asleep = self._engine_asleep()
        for phase in ("teacher", "update"):
            phases[phase] |= asleep
        copy = trained.checkpoint
        if run.config.teacher.ema is not None:
            copy += math.ceil(4 * sum(shard.numel for shard in parameters) / student.data)
        return RankMemory(rank, always, {"optimizer moments": trained.moments}, phases, copy)

    def _parameters(self, stage: int) -> tuple[ParameterShard, ...]:
        tensor = self._run.student_layout.tensor
        return stage_parameters(
            self._run.student, tensor, self._student_stages, stage, trained=True, fused_norms=self._fused
        )

    def _reference_bytes(self, rank: int, student_stage: int) -> dict[str, int]:
        run, config = self._run, self._run.config
        if run.reference is None or config.reference is None:
            return {}
        parallel = config.reference.parallel
        stages = stage_layers(run.reference, parallel.pipeline, parallel.stages)
        stage = _layout(parallel, run.world).pp_rank(rank)
        weights = self._frozen_bytes(run.reference, parallel.tensor, stages, stage, modelopt=False)
        return {"reference model": weights + self._output_bytes(run.reference, student_stage)}

    def _frozen_bytes(
        self, model: HFConfig, tensor: int, stages: tuple[int, ...], stage: int, *, modelopt: bool
    ) -> int:
        fused = self._fused and not modelopt
        shards = stage_parameters(model, tensor, stages, stage, trained=False, fused_norms=fused)
        return sum(
            math.ceil(shard.numel * self._frozen_element_of(model, shard, modelopt)) for shard in shards
        )

    def _frozen_element_of(self, model: HFConfig, shard: ParameterShard, modelopt: bool) -> float:
        """Bytes of an element of a frozen model's parameter, FP8's scales included."""
        recipe = self._run.config.precision.teacher
        quantised = recipe in FP8_RECIPES or modelopt
        if not quantised or not shard.is_matrix or self._stays_bfloat16(model, shard.layer):
            return self._teacher_element
        return {"fp8_blockwise": 1 + 4 / 128**2, "fp8_mxfp8": 1 + 1 / 32}.get(recipe, 1.0)

    def _stays_bfloat16(self, model: HFConfig, layer: int | None) -> bool:
        """Whether FP8 leaves a layer as it is."""
        return self._run.config.precision.first_last_bfloat16 and layer in (0, model.num_layers - 1)

    def _output_bytes(self, frozen: HFConfig, stage: int) -> int:
        """A frozen model's output layer, in the student's partition."""
        layout = self._run.student_layout
        if stage < layout.pipeline - 1:
            return 0
        rows = padded_vocab_size(frozen.vocab_size, layout.tensor) // layout.tensor
        return rows * frozen.hidden_size * self._teacher_element

    def _engine_bytes(self) -> dict[str, int]:
        run, rollout = self._run, self._run.config.rollout
        if not run.config.loads_engine:
            return {}
        weights = run.engine_weights()
        terms = {"engine weights": weights}
        if run.device is not None:
            terms["engine workspace"] = ENGINE_WORKSPACE_BYTES
        if rollout.kv_cache_gib is not None or run.device is None:
            return terms | {"KV cache": int((rollout.kv_cache_gib or 0.0) * GIB)}
        budget = int(run.device.memory_bytes * rollout.gpu_memory_utilization)
        return terms | {"KV cache": max(0, budget - sum(terms.values()))}

    def _engine_asleep(self) -> dict[str, int]:
        if self._run.device is None or not self._run.config.loads_engine:
            return self._engine_bytes()
        return {"engine asleep": ENGINE_ASLEEP_BYTES}

    def _sync_phase(self) -> dict[str, int]:
        """A bucket of this rank's shard, gathered over TP, then merged into whole tensors."""
        if not self._run.config.loads_engine:
            return {}
        bucket = self._run.config.rollout.sync_bucket_mib * MIB * (2 * self._run.student_layout.tensor + 1)
        own = sum(shard.numel for shard in self._parameters(0)) * self._student_element
        bucket = min(bucket, own * (2 * self._run.student_layout.tensor + 1))
        engine = (
            self._engine_bytes()
            if self._run.device is None
            else {"engine weights": self._run.engine_weights()}
        )
        return engine | {"gathered weights": bucket}

    def _hidden_bytes(self, replicas: int) -> int:
        """Teacher hidden states of all response tokens of a replica's rollouts, at their longest, of the widest one."""
        rollouts = math.ceil(self._run.rollouts / replicas)
        tokens = rollouts * self._run.config.rollout.max_new_tokens
        return tokens * self._teacher_width * self._teacher_element

    @property
    def _teacher_width(self) -> int:
        return max((teacher.hidden_size for teacher in self._run.teachers), default=0)

    def _hidden_on_device(self) -> bool:
        if not self._run.teachers:
            return False
        return self._run.device is None or not self._run.config.teacher.offload_hidden

    def _teacher_phase(self, teacher_stage: int, stage: int) -> dict[str, int]:
        run, config = self._run, self._run.config
        if not run.teachers:
            return {}
        shape = ActivationShape(
            run.teacher_layout.tensor,
            config.teacher.parallel.sequence_parallel,
            self._teacher_element,
            self._fused,
            self._teacher_element,
        )
        token_bytes = [forward_bytes(teacher, shape) for teacher in run.teachers]
        if run.teacher_layout.pipeline > 1:
            # What came from the stage before and goes to the next one.
            sent = [2 * input_bytes(teacher, shape) for teacher in run.teachers]
            token_bytes = [own + other for own, other in zip(token_bytes, sent, strict=True)]
        # One teacher after the other.
        terms = {"teacher activations": int(self._row * max(token_bytes, default=0))}
        hidden = 0
        if self._hidden_on_device():
            if teacher_stage == run.teacher_layout.pipeline - 1:
                # The microbatches' outputs, then the same in the order of the batch.
                hidden += 2 * self._hidden_bytes(run.teacher_layout.data)
            if stage == run.student_layout.pipeline - 1:
                hidden = max(
                    hidden,
                    self._hidden_bytes(run.teacher_layout.data) + self._hidden_bytes(run.student_layout.data),
                )
        return terms | {"teacher hidden states": hidden}

    def _update_phase(self, stage: int) -> dict[str, int]:
        run, config = self._run, self._run.config
        layout = run.student_layout
        shape = ActivationShape(
            layout.tensor,
            config.student.parallel.sequence_parallel,
            self._student_element,
            self._fused,
            self._student_element,
        )
        first = sum(self._student_stages[:stage])
        saved = [
            layer_bytes(run.student, run.student.layers[i], self._shape_of_layer(i, shape))
            for i in range(first, first + self._student_stages[stage])
        ]
        if config.student.recompute == "full":
            kept = len(saved) * input_bytes(run.student, shape)
            working = max(saved)
        else:
            kept, working = sum(saved), 0.0
        if stage < layout.pipeline - 1:
            # Megatron keeps the outputs that it sent to the next stage until their gradient comes back.
            kept += input_bytes(run.student, shape)
        if shape.sequence_parallel:
            # A linear layer's backward pass gathers its input, and the input's gradient before it is cut again.
            working += 2 * run.student.hidden_size * shape.element_bytes
        in_flight = min(layout.pipeline - stage, self._microbatches())
        terms = {"activations": int(self._row * (in_flight * kept + working))}
        if stage == layout.pipeline - 1:
            terms |= self._head_bytes(shape)
            if self._hidden_on_device():
                terms["teacher hidden states"] = self._hidden_bytes(layout.data)
        return terms

    def _shape_of_layer(self, layer: int, shape: ActivationShape) -> ActivationShape:
        """`shape`, with inputs in FP8 where the student's layer computes in FP8."""
        recipe = self._run.config.precision.student
        if recipe not in FP8_RECIPES or self._stays_bfloat16(self._run.student, layer):
            return shape
        # Scales: of 128 elements in float32, of 32 in a byte, or one of the tensor.
        scales = {"fp8_blockwise": 4 / 128, "fp8_mxfp8": 1 / 32}
        return replace(shape, linear_input_bytes=1 + scales.get(recipe, 0.0))

    def _microbatches(self) -> int:
        """Rows of a replica at the longest responses."""
        rollouts = math.ceil(self._run.rollouts / self._run.student_layout.data)
        return max(1, math.ceil(rollouts * self._run.config.rollout.max_model_len / self._row))

    def _head_bytes(self, shape: ActivationShape) -> dict[str, int]:
        """The final norm, the response rows of both models with their gradient, and the kernel's scratch."""
        run, kernel = self._run, self._run.config.kernel
        responses = self._row * run.response_share
        norm = self._row * final_norm_bytes(run.student, shape)
        student = responses * 2 * run.student.hidden_size * self._student_element
        gradient = self._row * run.student.hidden_size * self._student_element
        teacher = responses * self._teacher_width * self._teacher_element
        shard = padded_vocab_size(run.student.vocab_size, shape.tensor) // shape.tensor
        tile = min(kernel.tile_tokens, responses) * min(kernel.tile_vocab, shard)
        scratch = _TILES * 4 * tile + _STATE_FLOATS * 4 * responses
        return {
            "loss head": int(norm + student + gradient + teacher + scratch),
            "logit cache": kernel.cache_mib * MIB,
        }


# Tiles of logits that the kernel's two passes hold at once, and numbers a token that they keep.
_TILES = 4
_STATE_FLOATS = 32
