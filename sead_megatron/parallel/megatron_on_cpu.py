"""Megatron-core on the CPU: the one file that redirects `torch.cuda` names.

Megatron-core calls `torch.cuda.*` and names the device "cuda" in many places, yet its arithmetic, its
schedules and its optimizers are device-free and run exactly on gloo. `install()` redirects those names. It is
called once, only when the config says `device: cpu`; no other file of this package knows about it. Its Adam also
serves a GPU without Transformer Engine and apex (`use_group_step_adam_without_fused`).

Seen to be needed with megatron-core 0.16.1 and 0.19.2 on torch 2.13 (CPU build).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")
_installed: list[TorchFunctionMode] = []


def _names_cuda(device: object) -> bool:
    """True for every spelling of a CUDA device that Megatron uses, bare ordinals included."""
    if isinstance(device, bool):
        return False
    if isinstance(device, int):
        return True
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, torch.device) and device.type == "cuda"


class _CudaMeansCpu(TorchFunctionMode):
    """Replaces a CUDA device argument by the CPU in every torch function call."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.Tensor.cuda:
            return args[0]
        if kwargs and "device" in kwargs and _names_cuda(kwargs["device"]):
            kwargs = {**kwargs, "device": _CPU}
        if func is torch.Tensor.to:
            # `tensor.to(0)` does not occur in Megatron; strings and torch.device do.
            args = tuple(_CPU if not isinstance(a, int) and _names_cuda(a) else a for a in args)
        elif func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # Megatron buckets gradients by `tensor.type()` and knows only the torch.cuda.* names.
            return func(*args).replace("torch.", "torch.cuda.")
        return func(*args, **(kwargs or {}))


class _NullStream:
    """Stands for torch.cuda.Stream and torch.cuda.Event: CPU work is already in program order."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __enter__(self) -> _NullStream:
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def wait_stream(self, stream: object) -> None:
        pass

    def wait_event(self, event: object) -> None:
        pass

    def record_event(self, event: object = None) -> _NullStream:
        return self

    def record(self, stream: object = None) -> None:
        pass

    def wait(self, stream: object = None) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True


class GroupStepAdam(torch.optim.Optimizer):
    """AdamW whose step counter lives in the parameter group, as in apex's and Transformer Engine's FusedAdam.

    torch keeps one counter per parameter, which Megatron's distributed optimizer cannot load again (0.16.1: the
    assertion `len(steps) == 1`). Same update rule as torch.optim.AdamW (Loshchilov & Hutter 2019, Alg. 2).
    """

    def __init__(
        self,
        params: Any,
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        adam_w_mode: bool = True,
        capturable: bool = False,  # 0.19 passes it; for CUDA graphs
    ) -> None:
        if not adam_w_mode or capturable:
            raise ValueError("GroupStepAdam is AdamW without CUDA graphs; Megatron asked for something else")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One AdamW update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            step = int(group.get("step", 0)) + 1
            group["step"] = step
            beta1, beta2 = group["betas"]
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                if not state:
                    state["exp_avg"] = torch.zeros_like(param, dtype=torch.float32)
                    state["exp_avg_sq"] = torch.zeros_like(param, dtype=torch.float32)
                grad = param.grad.to(torch.float32)
                state["exp_avg"].lerp_(grad, 1 - beta1)
                state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
                denominator = (state["exp_avg_sq"] / (1 - beta2**step)).sqrt_().add_(group["eps"])
                param.mul_(1 - group["lr"] * group["weight_decay"])
                param.addcdiv_(state["exp_avg"], denominator, value=-group["lr"] / (1 - beta1**step))
        return loss


def _redirect_streams_and_memory() -> None:
    cuda: Any = torch.cuda
    cuda.current_device = lambda: _CPU
    cuda.synchronize = lambda *args, **kwargs: None
    cuda.empty_cache = lambda: None
    cuda.Stream = cuda.Event = _NullStream
    cuda.current_stream = cuda.default_stream = cuda.stream = lambda *args, **kwargs: _NullStream()


def _redirect_rng() -> None:
    cuda: Any = torch.cuda
    cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    cuda.manual_seed = torch.manual_seed
    # Megatron binds these two at import time, so replacing torch.cuda's is not enough.
    import megatron.core.tensor_parallel.random as megatron_random

    rng: Any = megatron_random
    rng._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
    rng._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()


def use_group_step_adam_without_fused() -> None:
    """GroupStepAdam where Megatron found neither Transformer Engine's nor apex's Adam.

    torch's own would train, and the checkpoint that it leaves could not be loaded again.
    """
    import megatron.core.optimizer as megatron_optimizer

    if megatron_optimizer.USING_PYTORCH_OPTIMIZER:
        _use_group_step_adam()


def _use_group_step_adam() -> None:
    """Presents GroupStepAdam as the fused Adam that Megatron finds on a GPU machine."""
    import megatron.core.optimizer as megatron_optimizer
    import megatron.core.optimizer.distrib_optimizer as distributed_optimizer

    optimizer: Any = megatron_optimizer
    optimizer.Adam = GroupStepAdam
    optimizer.USING_PYTORCH_OPTIMIZER = False
    distributed: Any = distributed_optimizer
    distributed.Adam = GroupStepAdam
    distributed.HAVE_APEX_OR_TE = distributed.USING_APEX_OPTIMIZER = True


def install() -> None:
    """Redirects `torch.cuda` to the CPU for this process; a second call does nothing."""
    if _installed:
        return
    _redirect_streams_and_memory()
    mode = _CudaMeansCpu()
    mode.__enter__()
    _installed.append(mode)
    _redirect_rng()
    _use_group_step_adam()
