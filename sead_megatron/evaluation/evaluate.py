"""One rank of `python -m sead_megatron evaluate`: engines share the responses of a batch of problems, all ranks grade,
rank 0 writes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import torch.distributed as dist
from rich.console import Console
from rich.text import Text

from sead_megatron.evaluation.benchmarks import Benchmark
from sead_megatron.evaluation.checks import Encoded, Evaluation, encode
from sead_megatron.evaluation.graded import Graded
from sead_megatron.evaluation.grader import Grader
from sead_megatron.evaluation.responses import Sampler, respond
from sead_megatron.evaluation.tables import show, write_results
from sead_megatron.models.tokenizer import Tokenizer, load_tokenizer
from sead_megatron.progress import duration
from sead_megatron.rollout.checkpoint_weights import CheckpointWeights
from sead_megatron.rollout.engine import RolloutEngine, Sampling
from sead_megatron.training.job import init_world

# Of sequences an engine decodes at once: the wait for the longest response is shorter the fewer batches there are, and
# a kill loses one.
_WAVES = 2


def main(evaluation: Evaluation) -> None:
    """Evaluates what OUTPUT does not hold yet, and writes and shows the results (a collective over the world)."""
    settings, output = evaluation.settings, evaluation.output
    console = Console(stderr=True)
    tokenizer = load_tokenizer(evaluation.companions)
    encoded = encode(evaluation, tokenizer)
    init_world(settings.device)
    head = dist.get_rank() == 0
    replicas = dist.get_world_size() // settings.tensor_parallel
    batch = settings.batch or max(1, _WAVES * settings.max_num_seqs * replicas // settings.samples)
    if head:
        output.open(evaluation.asked())
    found = [[output.rewind(b, batch) for b in evaluation.benchmarks] if head else None]
    dist.broadcast_object_list(found)
    done = dict(zip((b.name for b in evaluation.benchmarks), found[0] or [], strict=True))

    def report(text: str) -> None:
        if head:
            console.print(Text(text), soft_wrap=True)

    if any(done[b.name] < len(b.problems) for b in evaluation.benchmarks):
        with Grader() as grader:
            _answer(evaluation, encoded, tokenizer, grader, done, batch, report)
            timeouts, crashes = grader.take_counts()
        if timeouts or crashes:
            console.print(
                f"rank {dist.get_rank()}: {timeouts + crashes} answers could not be graded and are wrong"
            )
    if head:
        show(write_results(output))
    dist.barrier()
    dist.destroy_process_group()


def _answer(
    evaluation: Evaluation,
    encoded: Encoded,
    tokenizer: Tokenizer,
    grader: Grader,
    done: Mapping[str, int],
    batch: int,
    report: Callable[[str], None],
) -> None:
    """Responses to every problem that is left, appended batch by batch."""
    settings, output = evaluation.settings, evaluation.output
    engine = _engine(evaluation, encoded.max_model_len, report)
    stop = tuple(tokenizer.eos_ids)
    sampling = Sampling(settings.temperature, settings.max_new_tokens, stop, settings.top_p)
    sampler = Sampler(
        engine, tokenizer, grader, settings.samples, sampling, settings.seed, settings.save_text
    )
    for benchmark in evaluation.benchmarks:
        clock = _Clock(benchmark, done[benchmark.name])
        prompts = encoded.prompts[benchmark.name]
        for start in range(done[benchmark.name], len(prompts), batch):
            records = respond(sampler, benchmark.name, prompts[start : start + batch])
            if dist.get_rank() == 0:
                output.append(benchmark.name, records)
            report(clock.line(records))
    engine.close()


def _engine(evaluation: Evaluation, max_model_len: int, report: Callable[[str], None]) -> RolloutEngine:
    settings = evaluation.settings
    report("starting the engine")
    engine = RolloutEngine(
        settings.rollout(max_model_len),
        evaluation.companions,
        dtype=settings.dtype,
        on_cpu=settings.device == "cpu",
        seed=settings.seed,
        scored_temperature=1.0,
    )
    report("loading the weights")
    engine.load_weights(CheckpointWeights(settings.model, settings.companions), 0)
    return engine


class _Clock:
    """One line a batch: how far, how right, how fast."""

    def __init__(self, benchmark: Benchmark, done: int) -> None:
        self._name, self._total = benchmark.name, len(benchmark.problems)
        self._done_before = self._done = done
        self._right = self._responses = self._tokens = 0
        self._started = time.perf_counter()

    def line(self, records: Sequence[Graded]) -> str:
        """After a batch; rates are those of this process."""
        self._done += len(records)
        self._right += sum(sum(record.correct) for record in records)
        self._responses += sum(len(record.correct) for record in records)
        self._tokens += sum(sum(record.lengths) for record in records)
        seconds = time.perf_counter() - self._started
        left = seconds / (self._done - self._done_before) * (self._total - self._done)
        return (
            f"{self._name}: {self._done}/{self._total} problems  {self._right / self._responses:.1%} right  "
            f"{self._tokens / seconds:,.0f} tokens/s  ETA {duration(left)}"
        )
