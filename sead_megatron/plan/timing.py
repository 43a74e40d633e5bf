"""How long the phases of a step take on GPUs: a model of FLOPs, bytes and latencies. Torch-free.

Nothing here was measured on a GPU. The peaks are data-sheet values, the efficiencies assumptions that are printed with
every estimate; read the result as which layout is faster, not as seconds to rely on.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass, fields

import numpy as np

from sead_megatron.config.schema import FP8_RECIPES
from sead_megatron.models.architecture import HFConfig
from sead_megatron.models.stages import layer_parameters
from sead_megatron.parallel.layout import Layout
from sead_megatron.plan.devices import Device
from sead_megatron.plan.lengths import Lengths
from sead_megatron.plan.memory import Run

_DRAWS = 32


@dataclass(frozen=True)
class Assumptions:
    """What an estimate takes for granted beside the data sheet."""

    forward_efficiency: float = 0.50
    """Share of the tensor cores' peak in forward-only passes."""
    update_efficiency: float = 0.40
    """The same in forward and backward passes together."""
    head_efficiency: float = 0.40
    """The same in the loss kernel."""
    fp8_speedup: float = 1.5
    """Of GEMMs in FP8 over bfloat16, quantisation included."""
    memory_efficiency: float = 0.75
    """Share of the memory bandwidth that decoding reaches."""
    link_efficiency: float = 0.70
    """Share of NVLink's and the network's bandwidth that large transfers reach."""
    collective_latency: float = 10e-6
    """Seconds of a small all-reduce inside a node."""
    decode_overhead: float = 1.0e-3
    """Seconds of an engine's step beside its kernels: scheduling, sampling, our entropy tap."""
    host_bandwidth: float = 20e9
    """Bytes/s of a GPU's copy to host memory, where all of a node's GPUs copy at once."""
    prompt_tokens: int = 200
    """Mean length of a prompt."""
    active_share: float = 0.5
    """Response tokens whose loss is computed (SEAD: zones B and C)."""
    fixed_overhead: float = 3.0
    """Seconds a step for waking the engine, packing, gathering objects, logging."""


@dataclass(frozen=True)
class StepTime:
    """Seconds by phase, and what they are made of."""

    rollout: float
    rollout_tail: float
    """Part of the rollout in which at most a tenth of the sequences are still running."""
    teacher: float
    update: float
    sync: float
    overhead: float
    flops: dict[str, float]
    """Of the whole world, by phase."""
    tokens: float
    """Prompt and response tokens of a step."""

    @property
    def total(self) -> float:
        """Seconds of a step without a checkpoint."""
        return self.rollout + self.teacher + self.update + self.sync + self.overhead


def estimate(run: Run, lengths: Lengths, assumptions: Assumptions | None = None) -> StepTime:
    """The mean over seeded draws of the lengths. ValueError without a GPU to reckon with."""
    if run.device is None:
        raise ValueError("the time of a step is estimated for a GPU")
    given = assumptions or Assumptions()
    model = _Model(run, run.device, given)
    generator = np.random.default_rng(0)
    draws = [model.step(lengths.draw(run.rollouts, generator)) for _ in range(_DRAWS)]
    means = {
        field.name: float(np.mean([getattr(draw, field.name) for draw in draws]))
        for field in fields(StepTime)
        if field.name != "flops"
    }
    flops = {name: float(np.mean([draw.flops[name] for draw in draws])) for name in draws[0].flops}
    return StepTime(**means, flops=flops)


class _Model:
    """The time of one step for given lengths."""

    def __init__(self, run: Run, device: Device, given: Assumptions) -> None:
        self._run = run
        self._device = device
        self._given = given
        self._student_trunk = _trunk_matrices(run.student)
        self._student_matrices = self._student_trunk + _vocabulary(run.student)
        self._engine_weights = run.engine_weights()
        self._kv_bytes = run.kv_bytes_per_token()

    def step(self, responses: np.ndarray) -> StepTime:
        rollout, tail = self.rollout(responses)
        teacher, teacher_flops = self.teacher(responses)
        update, update_flops = self.update(responses)
        sampled = 2.0 * self._student_matrices * float(self._tokens(responses).sum())
        return StepTime(
            rollout=rollout,
            rollout_tail=tail,
            teacher=teacher,
            update=update,
            sync=self.sync(),
            overhead=self._given.fixed_overhead,
            flops={"rollout": sampled, "teacher": teacher_flops, "update": update_flops},
            tokens=float(self._tokens(responses).sum()),
        )

    def _tokens(self, responses: np.ndarray) -> np.ndarray:
        return responses + self._given.prompt_tokens

    def rollout(self, responses: np.ndarray) -> tuple[float, float]:
        """(seconds until the slowest engine is done, of that with a tenth of the sequences or fewer)."""
        if not self._run.config.samples_rollouts:
            return 0.0, 0.0
        engines = self._run.world // self._run.config.rollout.tensor_parallel
        ends: list[float] = []
        for engine in range(min(engines, len(responses))):
            ends += self._decode(responses[engine::engines])
        ends.sort()
        # The running ones are a tenth from the end of the one that leaves that many behind.
        last_busy = ends[-1 - math.ceil(len(ends) / 10)] if len(ends) > 10 else 0.0
        return ends[-1], ends[-1] - last_busy

    def _decode(self, lengths: np.ndarray) -> list[float]:
        """When each of an engine's sequences ends, seconds from the start."""
        slots = self._run.config.rollout.max_num_seqs
        waiting = list(lengths[slots:])
        running = [int(length) for length in lengths[:slots]]
        heapq.heapify(running)
        now, position, ends = self._prefill(len(lengths)), 0, []
        while running:
            end = heapq.heappop(running)
            batch = len(running) + 1
            if end > position:
                context = self._given.prompt_tokens + (position + end) / 2
                now += (end - position) * self._decode_step(batch, min(context, self._longest_context()))
                position = end
            ends.append(now)
            if waiting:
                heapq.heappush(running, position + int(waiting.pop(0)))
        return ends

    def _longest_context(self) -> float:
        return float(self._run.config.rollout.max_model_len)

    def _prefill(self, sequences: int) -> float:
        tensor = self._run.config.rollout.tensor_parallel
        flops = 2.0 * self._student_matrices * sequences * self._given.prompt_tokens
        return flops / (tensor * self._device.bf16_flops * self._given.forward_efficiency)

    def _decode_step(self, batch: int, context: float) -> float:
        """Seconds for one token of each of `batch` sequences: weights and KV cache are read, TP ranks agree twice a
        layer."""
        run, given, device = self._run, self._given, self._device
        rollout = run.config.rollout
        read = self._engine_weights + batch * context * self._kv_bytes
        memory = read / (device.memory_bandwidth * given.memory_efficiency)
        rate = device.fp8_flops if rollout.quantization == "fp8" else device.bf16_flops
        compute = (
            2.0 * self._student_matrices * batch / (rollout.tensor_parallel * rate * given.forward_efficiency)
        )
        collectives = 0.0
        if rollout.tensor_parallel > 1:
            message = batch * run.student.hidden_size * 2
            one = given.collective_latency + 2 * message / (device.link_bandwidth * given.link_efficiency)
            collectives = 2 * run.student.num_layers * one
        return max(memory, compute) + collectives + given.decode_overhead

    def teacher(self, responses: np.ndarray) -> tuple[float, float]:
        """Scoring: the trunk on all tokens, the entropy of the output layer on response tokens.

        Rollouts are taken to be spread evenly over several teachers.
        """
        times = [self._scoring(teacher, responses) for teacher in self._run.teachers]
        count = max(1, len(times))
        return sum(seconds for seconds, _ in times) / count, sum(flops for _, flops in times) / count

    def _scoring(self, teacher: HFConfig, responses: np.ndarray) -> tuple[float, float]:
        """By one teacher that scores everything."""
        run, given = self._run, self._given
        tokens = self._tokens(responses)
        trunk = 2.0 * _trunk_matrices(teacher) * float(tokens.sum()) + _attention_flops(teacher, tokens)
        head = 2.0 * teacher.vocab_size * teacher.hidden_size * float(responses.sum())
        fast = given.fp8_speedup if run.config.precision.teacher in _FAST else 1.0
        rate = run.world * self._device.bf16_flops
        seconds = trunk / (rate * given.forward_efficiency * fast)
        seconds *= self._bubble(run.teacher_layout, tokens)
        seconds += self._collectives(teacher, run.teacher_layout, tokens, passes=1)
        moved = float(responses.sum()) * teacher.hidden_size * 2 / run.teacher_layout.data
        seconds += moved / (self._device.link_bandwidth * given.link_efficiency)
        scorers = run.world // run.student_layout.pipeline
        seconds += head / (scorers * self._device.bf16_flops * given.head_efficiency)
        return seconds, trunk + head

    def update(self, responses: np.ndarray) -> tuple[float, float]:
        """Forward and backward pass, loss head, gradient reduction and Adam."""
        run, given, device = self._run, self._given, self._device
        tokens, layout = self._tokens(responses), run.student_layout
        passes = 4 if run.config.student.recompute == "full" else 3
        forward = 2.0 * self._student_trunk * float(tokens.sum()) + _attention_flops(run.student, tokens)
        trunk = passes * forward
        # Both models' logits in both passes, and two GEMMs for the gradients.
        teacher = sum(model.hidden_size for model in run.teachers) / max(1, len(run.teachers))
        widths = 2 * (run.student.hidden_size + teacher) + 2 * run.student.hidden_size
        head = 2.0 * run.student.vocab_size * widths * float(responses.sum()) * given.active_share
        fast = given.fp8_speedup if run.config.precision.student in FP8_RECIPES else 1.0
        seconds = trunk / (run.world * device.bf16_flops * given.update_efficiency * fast)
        seconds *= self._bubble(layout, tokens)
        scorers = run.world // layout.pipeline
        seconds += head / (scorers * device.bf16_flops * given.head_efficiency)
        seconds += self._collectives(run.student, layout, tokens, passes=passes)
        return seconds + self._optimizer(), trunk + head

    def _optimizer(self) -> float:
        """Gradients reduced in float32 and parameters gathered over the replicas; masters, moments and gradients read
        and written."""
        run, device, layout = self._run, self._device, self._run.student_layout
        shard = (self._student_trunk + 2 * _vocabulary(run.student)) / layout.block_size
        across = layout.world > device.gpus_per_node
        bandwidth = (
            device.network_bandwidth if across else device.link_bandwidth
        ) * self._given.link_efficiency
        share = (layout.data - 1) / layout.data
        reduced = (4 + 2) * shard * share / bandwidth
        owned = shard / (layout.data if run.config.optimizer.distributed else 1)
        return reduced + owned * 30 / (device.memory_bandwidth * self._given.memory_efficiency)

    def sync(self) -> float:
        """Weights gathered over the student's ranks and written into the engine."""
        run, device, given = self._run, self._device, self._given
        size = 2.0 * (self._student_trunk + 2 * _vocabulary(run.student))
        gathered = (
            size / (device.link_bandwidth * given.link_efficiency)
            if run.student_layout.block_size > 1
            else 0.0
        )
        if run.student_layout.block_size > device.gpus_per_node:
            gathered = size / (device.network_bandwidth * given.link_efficiency)
        written = 4 * size / (device.memory_bandwidth * given.memory_efficiency)
        return gathered + written

    def _bubble(self, layout: Layout, tokens: np.ndarray) -> float:
        """Idle stages: (p - 1) of the m + p - 1 microbatch times."""
        rows = max(1.0, float(tokens.sum()) / layout.data / self._run.config.batch.max_tokens_per_microbatch)
        return (rows + layout.pipeline - 1) / rows

    def _collectives(self, model: HFConfig, layout: Layout, tokens: np.ndarray, *, passes: int) -> float:
        """Two reduce-scatters and all-gathers of the activations a layer and pass, in no overlap with GEMMs."""
        if layout.tensor == 1:
            return 0.0
        local = float(tokens.sum()) / layout.data
        layers = model.num_layers / layout.pipeline
        share = 2 * (layout.tensor - 1) / layout.tensor
        moved = passes * 2 * layers * local * model.hidden_size * 2 * share
        return moved / (self._device.link_bandwidth * self._given.link_efficiency)


_FAST = {*FP8_RECIPES, "modelopt_fp8"}


def _vocabulary(config: HFConfig) -> int:
    return config.vocab_size * config.hidden_size


def _trunk_matrices(config: HFConfig) -> int:
    """Weights of the decoder layers (norms are too few to matter)."""
    return sum(layer_parameters(config))


def _attention_flops(config: HFConfig, tokens: np.ndarray) -> float:
    """Forward FLOPs of scores and their products with values: 4 a pair of tokens, head and dimension."""
    lengths = tokens.astype(np.float64)
    full = float((lengths * lengths).sum() / 2)
    total = 0.0
    for layer in config.layers:
        if not layer.has_attention:
            continue
        pairs = full
        if layer.attention == "sliding" and config.sliding_window is not None:
            window = float(config.sliding_window)
            seen = np.minimum(lengths, window)
            pairs = float((seen * seen / 2 + (lengths - seen) * window).sum())
        total += 4.0 * config.num_attention_heads * config.head_dim * pairs
    return total
