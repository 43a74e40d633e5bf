"""vLLM's samplers with a script in place of their kernels, which compute nothing on the fake GPU.

Every token is `TOKEN`; the request in slot or row 0 is given `STOP` in every fourth step. Everything around the choice
of a token is vLLM's own: batches, chunks of prompts, logits processors, asynchronous copies, the scheduler.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.sample.sampler import Sampler as SamplerV1

TOKEN, STOP, LOGPROB = 7, 2, -1.0
_STOPS_EVERY = 4


class _Script:
    """Counts the steps of this process, and knows how V1 goes on with the tokens."""

    def __init__(self) -> None:
        self.steps = 0
        self.ids_v1 = torch.int32

    def tokens(self, rows: int) -> list[int]:
        """The tokens of the next step's rows."""
        self.steps += 1
        tokens = [TOKEN] * rows
        if rows and self.steps % _STOPS_EVERY == 0:
            tokens[0] = STOP
        return tokens


_script = _Script()


def _on_device(values: Any, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    # A copy from the host: a cast or a fill on the device is a kernel.
    return torch.tensor(values, dtype=dtype).to(device)


def _logprobs(tokens: list[int], device: torch.device) -> LogprobsTensors:
    ids = _on_device([[token] for token in tokens], torch.int32, device)
    values = _on_device([[LOGPROB]] * len(tokens), torch.float32, device)
    return LogprobsTensors(ids, values, _on_device([1] * len(tokens), torch.int32, device))


def _sample_v1(self: Any, logits: Any, sampling_metadata: Any, *arguments: Any, **options: Any) -> Any:
    logits = logits.to(torch.float32)
    logits = self.apply_logits_processors(logits, sampling_metadata, predict_bonus_token=False)
    tokens, device = _script.tokens(len(logits)), logits.device
    ids = _on_device([[token] for token in tokens], _script.ids_v1, device)
    return SamplerOutput(sampled_token_ids=ids, logprobs_tensors=_logprobs(tokens, device))


def _sample_v2(self: Any, logits: Any, input_batch: Any) -> Any:
    """As `Sampler.__call__` of the V2 runner, whose rows of unfinished prompts sample nothing."""
    from vllm.v1.worker.gpu.sample.output import SamplerOutput as SamplerOutputV2

    slots = input_batch.idx_mapping_np
    lengths = input_batch.seq_lens_cpu_upper_bound.numpy()
    self.apply_sampling_params(
        logits,
        input_batch.expanded_idx_mapping,
        input_batch.idx_mapping,
        slots,
        input_batch.positions[input_batch.logits_indices],
        input_batch.input_ids[input_batch.logits_indices],
        input_batch.expanded_local_pos,
        lengths,
    )
    device = logits.device
    tokens = _script.tokens(len(slots))
    counts = (lengths[: len(slots)] >= self.req_states.prefill_len.np[slots]).astype(np.int32)
    output = SamplerOutputV2(
        sampled_token_ids=_on_device([[token] for token in tokens], torch.int64, device),
        logprobs_tensors=_logprobs(tokens, device),
        num_nans=None,
        num_sampled=_on_device(counts, torch.int32, device),
        num_rejected=_on_device(np.zeros_like(counts), torch.int32, device),
    )
    return output


def install(*, asynchronous: bool) -> None:
    """Scripts both runners' samplers in this process.

    V1 copies the tokens, which are int32, to an int64 buffer of the host when scheduling is synchronous; that
    conversion is a kernel, so they are int64 at once.
    """
    _script.ids_v1 = torch.int32 if asynchronous else torch.int64
    from vllm.v1.worker.gpu.sample.sampler import Sampler as SamplerV2

    SamplerV1.forward = _sample_v1
    SamplerV2.__call__ = _sample_v2
