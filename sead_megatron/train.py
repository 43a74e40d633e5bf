"""On-policy distillation: the loop.

One step reads like the method: choose prompts, sample with the current student, score with the teacher, turn the
statistics of the global batch into coefficients, update, give the engine the new weights.
"""

from __future__ import annotations

import logging
import os
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console

from sead_megatron import metrics as metric_table
from sead_megatron.config import TrainConfig
from sead_megatron.data.mixture import fixed_rollouts, is_own_batch
from sead_megatron.data.types import Coefficients, Rollout, RolloutFacts, TokenTable
from sead_megatron.evaluation.grader import Grader
from sead_megatron.evaluation.greedy import evaluate_greedy, pass_flags
from sead_megatron.evaluation.responses import evaluate_benchmarks
from sead_megatron.progress import Progress
from sead_megatron.rollout.collect import as_rollout, generate_everywhere, request_seed
from sead_megatron.run_directory import RunDirectory
from sead_megatron.summary import summary_table
from sead_megatron.tensorboard_logger import TensorboardLogger
from sead_megatron.training import step_metrics
from sead_megatron.training.checkpoint import Checkpointer, FoundCheckpoint, find_checkpoint
from sead_megatron.training.checkpoint_reader import load_checkpoint
from sead_megatron.training.facts import rollout_facts
from sead_megatron.training.job import Job, build_job, init_world, run_path
from sead_megatron.training.nonfinite import Blame
from sead_megatron.training.scoring import with_reference_column, with_teacher_columns
from sead_megatron.training.step_plan import StepPlan, plan_step
from sead_megatron.training.student import Update
from sead_megatron.training.teachers import Scores
from sead_megatron.training.throughput import throughput
from sead_megatron.wandb_logger import WandbLogger

log = logging.getLogger(__name__)


class Trainer:
    """A run on this rank: the job's parts and the few numbers that change from step to step."""

    def __init__(self, job: Job, run: RunDirectory, progress: Progress, grader: Grader) -> None:
        self.job = job
        self.run = run
        self.grader = grader
        self.progress = progress
        self.config = job.config
        self.step = 0
        self.skipped_steps = 0
        self.skipped_in_a_row = 0
        self._is_head = job.rank == 0
        self._loggers: list[WandbLogger | TensorboardLogger] = []

    def train(self, found: FoundCheckpoint | None) -> None:
        """Runs from a checkpoint, or from the start, to the last step."""
        self.resume(found)
        if self._is_head:
            self._loggers.append(WandbLogger(self.config, self.run.path))
            self._loggers.append(TensorboardLogger(self.config, self.run.path, self.step))
        self.job.sync_weights(self.step)
        if self.step == 0:
            self.evaluate()
        self.progress.start_training()
        profile = self.job.profile
        if profile is not None:
            profile.resume(self.step)
        while self.step < self.config.steps:
            with nullcontext() if profile is None else profile.step(self.step + 1):
                self.train_step()
        for logger in self._loggers:
            logger.finish()

    @cached_property
    def checkpoints(self) -> Checkpointer:
        """What writes this run's checkpoints."""
        models, keep = self.job.models, self.config.checkpoint.keep
        return Checkpointer(self.run.checkpoints_path, keep, models.student, models.moving)

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Times a phase of the step; a profiled one is a range as well."""
        timed = self.progress.phase(name)
        return timed if self.job.profile is None else self.job.profile.phase(name, timed)

    def train_step(self) -> None:
        """One optimizer step, its record, and the checkpoint when one is due."""
        job = self.job
        with self.phase("rollout"):
            rollouts = self.roll_out()
        with self.phase("grading"):
            passed = self.grade(rollouts)
        with self.phase("teacher"):
            models = job.models
            plan = plan_step(rollouts, models.student.model.groups.layout, self.teacher_of(rollouts))
            scores = models.teachers.score(plan)
            table = TokenTable.from_rollouts(rollouts, job.device, self.facts(rollouts, passed))
            table = with_teacher_columns(models, job.objective, plan, scores, table)
            table = with_reference_column(models, plan, table)
            blame = self.blame(plan, scores, table)
        engine_table = table
        with self.phase("stats"):
            table = self.token_stats(plan, scores, table)
        with self.phase("coefficients"):
            coefficients = job.objective.coefficients(table, self.step)
        with self.phase("update"):
            update = models.student.train_step(plan, scores, coefficients)
        if models.moving is not None and update.applied:
            with self.phase("moving_teacher"):
                models.moving.follow()
        if not update.applied and blame is None:
            blame = job.frozen.blame_for_columns(plan, update.columns)
        self.count_skipped(update, blame)
        self.step += 1
        with self.phase("sync"):
            job.sync_weights(self.step)
        with self.phase("record"):
            record = self.record(rollouts, passed, engine_table, table, coefficients, update, blame)
        evaluation = self.evaluation_if_due()
        self.write(record, evaluation, plan, passed, table, coefficients)

    def roll_out(self) -> list[Rollout]:
        """The step's rollouts in prompt order, on every rank."""
        job = self.job
        batch = job.curriculum.next_batch(self.step)
        if self.is_fixed_batch():
            if job.optional_engine is not None:
                job.engine.sleep()
            samples = self.config.rollout.samples_per_prompt
            cache = job.cache
            fixed = fixed_rollouts(batch, job.prompts, samples) if cache is None else cache.rollouts(batch)
            return fixed
        sampling = job.sampling(job.objective.longest_response(self.step))
        indices = [i for i in batch for _ in range(self.config.rollout.samples_per_prompt)]
        seeds = [request_seed(self.config.seed, self.step, i) for i in range(len(indices))]
        prompts = [job.prompts[i] for i in indices]
        generations = generate_everywhere(job.engine, [p.token_ids for p in prompts], seeds, sampling)
        job.engine.sleep()
        return [
            as_rollout(i, prompt.token_ids, generation, job.engine.weight_version, prompt.teacher_token_ids)
            for i, prompt, generation in zip(indices, prompts, generations, strict=True)
        ]

    def grade(self, rollouts: list[Rollout]) -> list[bool | None]:
        """Whether each rollout has the right answer; None where nothing is to be graded."""
        if self.is_fixed_batch():
            return [None] * len(rollouts)
        job = self.job
        prompts = [job.prompts[rollout.prompt_index] for rollout in rollouts]
        responses = [rollout.response_ids for rollout in rollouts]
        return pass_flags(prompts, responses, job.tokenizer, self.grader)

    def teacher_of(self, rollouts: list[Rollout]) -> list[int]:
        """The number of the teacher that scores each rollout."""
        prompts, teacher = self.job.prompts, self.config.teacher
        if not self.config.teachers:
            return [0] * len(rollouts)
        return [teacher.index_of(prompts[rollout.prompt_index].domain) for rollout in rollouts]

    def is_fixed_batch(self) -> bool:
        """Whether this step trains on responses that were there before."""
        share = self.config.objective.own_batches
        return self.job.cache is not None or not is_own_batch(self.config.seed, self.step, share)

    def facts(self, rollouts: list[Rollout], passed: list[bool | None]) -> RolloutFacts:
        """What an objective may know of whole rollouts."""
        return rollout_facts(
            rollouts,
            passed,
            self.job.prompts,
            self.job.difficulties,
            samples_per_prompt=self.config.rollout.samples_per_prompt,
            longest=self.job.objective.longest_response(self.step) or self.config.rollout.max_new_tokens,
        )

    def measures_everything(self) -> bool:
        """Whether this step needs, or is due for, the statistics of every token."""
        every = self.config.metrics.full_stats_every
        return self.job.objective.needs_token_stats(self.step) or bool(every and self.step % every == 0)

    def token_stats(self, plan: StepPlan, scores: Scores | None, table: TokenTable) -> TokenTable:
        """The table with the trainer's statistics of every token, where this step has them.

        A column that is there stays, unless the objective asks for the trainer's: measuring more than the objective
        needs must not change its coefficients.
        """
        if not self.measures_everything():
            return table
        topk = max(self.job.objective.topk_lists, self.config.metrics.topk_lists)
        # Fixed responses have their own targets.
        argmax = self.job.objective.teacher_argmax and not self.is_fixed_batch()
        columns = self.job.models.student.token_stats(plan, scores, topk, teacher_argmax=argmax)
        stay = ["teacher_entropy", "teacher_logprob"]
        if not self.job.objective.uses_trainer_entropy:
            stay.append("student_entropy")
        for name in stay:
            if getattr(table, name) is not None:
                columns.pop(name, None)
        return table.with_columns(**columns)

    def blame(self, plan: StepPlan, scores: Scores | None, table: TokenTable) -> Blame | None:
        """What frozen models gave that is not finite, told on rank 0: whatever follows from it is not the student's."""
        blame = self.job.frozen.blame_for_scores(plan, scores, table, self.job.device)
        if blame is not None and self._is_head:
            log.warning("step %d: %s", self.step + 1, blame.message)
        return blame

    def count_skipped(self, update: Update, blame: Blame | None = None) -> None:
        """Counts steps skipped for a non-finite loss or gradient; too many in a row end the run.

        `blame`: of the frozen models in this step, which the error names as the cause.
        """
        self.skipped_in_a_row = 0 if update.applied else self.skipped_in_a_row + 1
        self.skipped_steps += not update.applied
        if self.skipped_in_a_row > self.config.optimizer.max_skipped_steps:
            raise RuntimeError(
                f"{self.skipped_in_a_row} steps in a row had a non-finite loss or gradient "
                f"(loss {update.loss}, gradient norm {update.grad_norm})"
                + (f"; the cause: {blame.message}" if blame else "")
            )

    def record(
        self,
        rollouts: list[Rollout],
        passed: list[bool | None],
        engine_table: TokenTable,
        table: TokenTable,
        coefficients: Coefficients,
        update: Update,
        blame: Blame | None,
    ) -> dict[str, Any]:
        """The step's record, equal on every rank but for the times (a collective over the world)."""
        job = self.job
        differences = {}
        if rollouts[0].weight_version == self.step - 1:  # not of older ones, as cached responses become
            differences = step_metrics.engine_trainer_differences(engine_table, table, update)
        alarm = self.config.metrics.logprob_diff_alarm
        if self._is_head and differences.get("rollout/logprob_diff_mean", 0.0) > alarm:
            log.warning(
                "step %d: engine and trainer logprobs differ by %.4f nats on average (alarm at %.4f): "
                "check rollout.dtype and the weight sync",
                self.step,
                differences["rollout/logprob_diff_mean"],
                alarm,
            )
        return (
            {
                "step": self.step,
                "loss": update.loss,
                "grad_norm": update.grad_norm,
                "lr": update.lr,
                "skipped_steps": self.skipped_steps,
                "weight_version": rollouts[0].weight_version,
                "memory/peak_bytes": step_metrics.peak_memory_bytes(job.device),
            }
            | ({"teacher/nonfinite_tokens": blame.tokens} if blame else {})
            | step_metrics.active_kl(update)
            | coefficients.metrics
            | step_metrics.rollout_metrics(rollouts, passed)
            | step_metrics.grader_counts(self.grader, job.device)
            | differences
            | job.curriculum.metrics
        )

    def evaluation_if_due(self) -> dict[str, Any] | None:
        """Evaluates after the last step and every `evaluation.every` steps."""
        every = self.config.evaluation.every
        due = self.step == self.config.steps or bool(every and self.step % every == 0)
        return self.evaluate() if due else None

    def evaluate(self) -> dict[str, Any] | None:
        """Held-out pass rates of the weights that the engine holds; None when the configuration names no problems."""
        job = self.job
        if not job.eval_prompts and not job.benchmarks:
            return None
        record: dict[str, Any] = {"step": self.step}
        with self.phase("evaluation"):
            max_new_tokens = self.config.evaluation_max_new_tokens
            if job.eval_prompts:
                record |= evaluate_greedy(
                    job.engine, job.eval_prompts, job.tokenizer, self.grader, max_new_tokens, self.step
                )
            if job.benchmarks:
                record["benchmarks"] = evaluate_benchmarks(job.sampler(self.grader), job.benchmarks)
        if self._is_head:
            self.run.append_evaluation(record)
        return record

    def write(
        self,
        record: dict[str, Any],
        evaluation: dict[str, Any] | None,
        plan: StepPlan,
        passed: list[bool | None],
        table: TokenTable,
        coefficients: Coefficients,
    ) -> None:
        """The step's record, and a copy of everything for its checkpoint when one is due.

        The checkpoint is written while the next steps go on, and committed after one of them. A job killed before the
        commit repeats the steps since the last checkpoint and forgets their records; one killed after it has both.
        """
        config, job = self.config, self.job
        is_last = self.step == config.steps
        checkpoint_due = is_last or self.step % config.checkpoint.every == 0
        if checkpoint_due or self.checkpoints.is_busy:
            with self.phase("checkpoint"):
                if checkpoint_due:
                    self.checkpoints.save(self.step, self.state())
                else:
                    self.checkpoints.poll()
                if is_last:
                    self.checkpoints.wait()
        with self.phase("record"):
            if (limit := config.metrics.rollout_samples) and self._is_head:
                samples = step_metrics.rollout_records(
                    plan.rollouts, job.prompts, passed, table, coefficients, job.tokenizer, limit
                )
                self.run.write_rollouts(self.step, samples)
        times = self.progress.take_times()
        record |= times | throughput(
            times, plan, job.models, job.device, measured=table.student_logprob is not None
        )
        record |= step_metrics.evaluation_metrics(evaluation)
        record |= self.checkpoints.take_metrics()
        metric_table.check_keys(record)
        if self._is_head:
            with self.phase("record"):
                self.run.append_metrics(record)
                for logger in self._loggers:
                    logger.log(record)
        if is_last:
            with self.phase("checkpoint"):
                self.checkpoints.finish()
        self.progress.finish_step(record)

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds beside model, optimizer and random states."""
        return {
            "step": self.step,
            "weight_version": self.step,
            "skipped_steps": self.skipped_steps,
            "skipped_in_a_row": self.skipped_in_a_row,
            "schedule": self.job.models.student.optimizer.state_dict(),
            "curriculum": self.job.curriculum.state_dict(),
            "objective": self.job.objective.state_dict(),
            "config": self.config.model_dump(mode="json"),
        }

    def resume(self, found: FoundCheckpoint | None) -> None:
        """Takes up a checkpoint, and forgets everything that was logged after it."""
        if found is not None:
            load_checkpoint(found, self.job.models.student, self.job.models.moving)
            state = found.state
            self.step = state["step"]
            self.skipped_steps = state["skipped_steps"]
            self.skipped_in_a_row = state["skipped_in_a_row"]
            self.job.models.student.optimizer.load_state_dict(state["schedule"])
            self.job.curriculum.load_state_dict(state["curriculum"])
            self.job.objective.load_state_dict(state["objective"])
        # Without a checkpoint the initial evaluation is repeated too.
        if self._is_head:
            self.run.rewind(-1 if found is None else self.step)
        dist.barrier()


def main(config: TrainConfig) -> None:
    """Runs this rank of a training job; torchrun starts one process a rank."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    head = int(os.environ["RANK"]) == 0
    run = RunDirectory.open(config) if head else RunDirectory(run_path(config))
    # The grader's worker starts first, while this process holds nothing yet.
    with Grader() as grader:
        device = init_world(config.device)
        found = find_checkpoint(run.checkpoints_path)
        done = 0 if found is None else found.step
        if done < config.steps:
            synchronise = torch.cuda.synchronize if config.device == "cuda" else None
            with Progress(config.steps, enabled=head, done=done, synchronise=synchronise) as progress:
                job = build_job(config, device, progress.status)
                Trainer(job, run, progress, grader).train(found)
            if job.optional_engine is not None:
                job.engine.close()
        dist.barrier()
        dist.destroy_process_group()
    if head:
        Console().print(summary_table(run.path))
