"""Jobs of the command line on tiny models, with and without an injected fault."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.integration.hooks.job_mark import VARIABLE, is_marked, running_processes
from tests.tiny_inputs import write_jsonl, write_tokenizer_json
from tests.tiny_models import save_tiny_llama

ROOT = Path(__file__).parents[2]
HOOKS = Path(__file__).parent / "hooks"
WORDS = ["<unk>", "<s>", "</s>", "is", "plus", "times", *(f"n{i}" for i in range(61))]
NUM_PROMPTS = 64


@dataclass(frozen=True)
class Finished:
    """How and when (seconds since the epoch) a job ended.

    `leftover`: ids of its processes that were alive 20 s after its launcher had ended.
    """

    returncode: int
    output: str
    ended_at: float
    leftover: list[int]


def write_job(directory: Path, **changes: Any) -> Path:
    """Models (67 tokens, so that padding is at work), tokenizer, prompts and a config.yaml; returns the latter.

    `changes` replace or extend sections of the configuration.
    """
    shape: dict[str, Any] = {"vocab_size": len(WORDS), "head_dim": 32, "initializer_range": 0.08}
    student = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    save_tiny_llama(directory / "student", seed=1, tie_word_embeddings=True, **shape, **student)
    save_tiny_llama(directory / "teacher", seed=2, num_hidden_layers=2, **shape)
    for name in ("student", "teacher"):
        write_tokenizer_json(directory / name, WORDS)
    prompts = [
        {
            "id": f"p{i}",
            "prompt": f"n{i % 61} {'plus' if i % 2 else 'times'} n{i * 7 % 61}",
            "answer": str(i % 10),
        }
        for i in range(NUM_PROMPTS)
    ]
    write_jsonl(directory / "train.jsonl", prompts)
    write_jsonl(directory / "eval.jsonl", prompts[:8])
    write_jsonl(
        directory / "difficulty.jsonl", [{"id": p["id"], "difficulty": i / 64} for i, p in enumerate(prompts)]
    )
    config: dict[str, Any] = {
        "device": "cpu",
        "run_dir": str(directory / "run"),
        "steps": 6,
        "student": {"path": str(directory / "student")},
        "teacher": {"path": str(directory / "teacher"), "parallel": {"tensor": 2}},
        "precision": {"student": "float32", "teacher": "float32"},
        "data": {"prompts": str(directory / "train.jsonl"), "prompts_per_step": 12},
        "evaluation": {"prompts": str(directory / "eval.jsonl"), "every": 3},
        "rollout": {"max_new_tokens": 16, "max_model_len": 64, "kv_cache_gib": 0.0625},
        "curriculum": {"difficulty": str(directory / "difficulty.jsonl")},
        "batch": {"max_tokens_per_microbatch": 128},
        "optimizer": {"lr": 1e-3},
        "metrics": {"full_stats_every": 1},
        "checkpoint": {"every": 2},
    }
    for section, values in changes.items():
        config[section] = config.get(section, {}) | values if isinstance(values, dict) else values
    path = directory / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def run_job(
    config: Path, ranks: int, *overrides: str, fault: dict[str, Any] | None = None, timeout: int = 300
) -> Finished:
    """`python -m sead_megatron train CONFIG --nproc-per-node RANKS OVERRIDES` to its end."""
    command = ["train", str(config), f"--nproc-per-node={ranks}", *overrides]
    return run_command(command, config.with_suffix(".log"), fault, timeout)


def run_command(
    arguments: Sequence[str], log_path: Path, fault: dict[str, Any] | None = None, timeout: int = 300
) -> Finished:
    """`python -m sead_megatron ARGUMENTS` to its end."""
    token = uuid.uuid4().hex
    environment = os.environ | {VARIABLE: token, "OMP_NUM_THREADS": "1"}
    if fault is not None:
        environment["SEAD_TEST_FAULT"] = json.dumps({"rank": 0, "call": 1, "action": "kill"} | fault)
        environment["PYTHONPATH"] = os.pathsep.join([str(HOOKS), os.environ.get("PYTHONPATH", "")])
    try:
        with open(log_path, "w+") as log:
            ended = subprocess.run(
                [sys.executable, "-m", "sead_megatron", *arguments],
                stdout=log,
                stderr=subprocess.STDOUT,
                timeout=timeout,
                env=environment,
                cwd=ROOT,
                check=False,
            )
            ended_at = time.time()
            log.seek(0)
            output = log.read()
        deadline = time.monotonic() + 20
        while (alive := processes_of(token)) and time.monotonic() < deadline:
            time.sleep(0.2)
    finally:
        # Whatever happened, a test leaves nothing running: a time limit ends the launcher alone.
        for process in processes_of(token):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
    return Finished(ended.returncode, output, ended_at, alive)


def processes_of(token: str) -> list[int]:
    """Ids of the living processes that a job started, by the mark in their environment."""
    return [process for process in running_processes() if is_marked(process, token)]
