"""ATen operators that compute on the fake GPU.

The memory of the fake GPU is host memory, and its kernels do nothing. `install()` puts a Python kernel in front of
every ATen operator of the CUDA dispatch key. It first runs the real CUDA operator (its checks of devices, shapes and
dtypes, its allocations, launches and copies), then the operator's CPU kernel on the same memory, and leaves the CPU's
numbers where the GPU would have left its own.

A registration at the dispatch key, rather than a `TorchDispatchMode`: it holds in every thread (autograd's device
threads, vLLM's and Megatron's helpers) and for calls that C++ code makes.

What this cannot show: kernels run when they are called, so a missing wait between two streams goes unnoticed. Custom
operators (`vllm::`, `_C::`, Transformer Engine's) and Triton kernels are not ATen operators and still do nothing.
"""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from substitutes import SUBSTITUTES
from torch import Tensor

_CPU = torch.device("cpu")
_NUMBERS = (bool, int, float, complex)
_installed: list[torch.library.Library] = []

# Allocation, metadata and copies that the fake runtime performs: the real kernels do all there is to do.
_REAL_IS_ENOUGH = {
    *(
        "empty.memory_format",
        "empty_strided",
        "resize_",
        "record_stream",
        "is_pinned",
        "_pin_memory",
        "is_set_to",
    ),
    *("set_", "set_.source_Storage", "set_.source_Storage_storage_offset", "set_.source_Tensor"),
    *("_local_scalar_dense", "_fused_sdp_choice", "_efficientzerotensor", "_cudnn_init_dropout_state"),
}

# The shape of the result depends on values, so the real operator, whose kernels count nothing, cannot go first. Nor
# can a power of a number, which calls another operator with a number on the GPU: torch refuses to show that to Python.
_CPU_ONLY = {
    *("nonzero", "nonzero.out", "masked_select", "masked_select.out", "bincount", "_unique", "_unique2"),
    *("unique_dim", "unique_consecutive", "unique_dim_consecutive", "repeat_interleave.Tensor"),
    *("equal", "_is_all_true", "_is_any_true", "linalg_lstsq", "linalg_matrix_rank", "histc"),
    *("pow.Scalar", "pow.Scalar_out"),
}


def on_host(tensor: Tensor) -> Tensor:
    """A CPU tensor over the memory of a CUDA tensor, with its dtype, shape and strides."""
    storage = tensor.untyped_storage()
    if not storage.nbytes():
        return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype)
    host = torch._C._construct_storage_from_data_pointer(storage.data_ptr(), _CPU, storage.nbytes())
    alias = torch.empty(0, dtype=tensor.dtype)
    alias.set_(host, tensor.storage_offset(), tensor.size(), tensor.stride())
    return alias


def _as_host_argument(value: Any) -> Any:
    if isinstance(value, Tensor):
        return on_host(value) if value.is_cuda else value
    if isinstance(value, (list, tuple)):
        return type(value)(_as_host_argument(item) for item in value)
    if isinstance(value, torch.device):
        return _CPU
    # A CUDA generator: the numbers come from the CPU's, see `_drawing`.
    return None if isinstance(value, torch.Generator) else value


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


class _Nested(threading.local):
    """How many real operators this thread is inside of: many are made of other operators."""

    depth = 0


_nested = _Nested()


@contextmanager
def _inside_a_real_operator() -> Iterator[None]:
    _nested.depth += 1
    try:
        yield
    finally:
        _nested.depth -= 1


@contextmanager
def _drawing(seed: int, offset: int) -> Iterator[None]:
    """The CPU's default generator draws what a CUDA generator with this seed and offset stands for."""
    before = torch.get_rng_state()
    torch.default_generator.manual_seed(hash((seed, offset)) & (2**63 - 1))
    try:
        yield
    finally:
        torch.set_rng_state(before)


class _Computed:
    """The kernel of one operator: the real one, then the CPU's on the same memory."""

    def __init__(self, name: str, operator: Any) -> None:
        self.name = name
        self.operator = operator
        self.real = torch.library.get_kernel(operator, "CUDA")
        self.on_cpu: Callable[..., Any] = SUBSTITUTES.get(name, operator)
        self.cpu_only = name in _CPU_ONLY
        self.draws = torch.Tag.nondeterministic_seeded in operator.tags
        written = [
            (i, a) for i, a in enumerate(operator._schema.arguments) if a.alias_info and a.alias_info.is_write
        ]
        self.written_positions = {i for i, _ in written}
        self.written_names = {a.name for _, a in written}
        self.tensor_positions = [
            i for i, a in enumerate(operator._schema.arguments) if "Tensor" in str(a.type)
        ]
        self.returns_arguments = any(r.alias_info for r in operator._schema.returns)

    def __call__(self, keyset: Any, *args: Any, **kwargs: Any) -> Any:
        args = tuple(self._with_tensors(args))
        if self.cpu_only:
            return self._from_cpu(args, kwargs)
        updated = [*(args[i] for i in self.written_positions if i < len(args))]
        updated += [value for name, value in kwargs.items() if name in self.written_names]
        before = [(tensor, on_host(tensor).clone()) for tensor in _tensors(updated) if tensor.is_cuda]
        generator = self._generator(args, kwargs)
        drawn = (generator.initial_seed(), generator.get_offset()) if generator else None
        with _inside_a_real_operator():
            result = self.real.call_boxed(keyset, *args, **kwargs)
        for tensor, value in before:
            # An operator that is made of others, or of copies, has computed some already.
            if tensor.shape == value.shape:
                on_host(tensor).copy_(value)
        try:
            computed = self._compute(args, kwargs, drawn)
        except NotImplementedError as error:
            if _nested.depth:
                return result  # of a part that only the real operator around it uses
            raise RuntimeError(
                f"aten::{self.name} has no CPU kernel to compute with on the fake GPU"
            ) from error
        if not self.returns_arguments:
            result = _filled(self.name, result, computed)
        return result

    def _with_tensors(self, args: Any) -> list[Any]:
        """A Python number that stands for a tensor, as in `x * 2`, comes here bare, and a kernel wants a tensor.

        Beside tensors of one dimension or more a scalar tensor promotes as a number does; beside other scalar tensors
        it must have the dtype of the result.
        """
        given, dtype = list(args), None
        if all(tensor.dim() == 0 for tensor in _tensors(args)):
            dtypes = [
                torch.result_type(t, v) for t in _tensors(args) for v in args if isinstance(v, _NUMBERS)
            ]
            dtype = functools.reduce(torch.promote_types, dtypes) if dtypes else None
        for i in self.tensor_positions:
            if i < len(given) and isinstance(given[i], _NUMBERS):
                wide = torch.float64 if isinstance(given[i], float) else None
                given[i] = torch.tensor(given[i], dtype=dtype or wide)
        return given

    def _compute(self, args: Any, kwargs: Any, drawn: tuple[int, int] | None) -> Any:
        host_args = [_as_host_argument(value) for value in args]
        host_kwargs = {name: _as_host_argument(value) for name, value in kwargs.items()}
        if drawn is None:
            return self.on_cpu(*host_args, **host_kwargs)
        with _drawing(*drawn):
            return self.on_cpu(*host_args, **host_kwargs)

    def _from_cpu(self, args: Any, kwargs: Any) -> Any:
        given = [tensor for value in (*args, *kwargs.values()) for tensor in _tensors(value)]
        devices = {tensor.device for tensor in given}
        if len(devices) > 1:
            raise RuntimeError(
                f"aten::{self.name}: all tensors must be on one device, got {sorted(map(str, devices))}"
            )
        outputs = [value for value in kwargs.values() if isinstance(value, Tensor)]
        if not outputs:
            return _moved(self._compute(args, kwargs, None), given[0].device)
        (output,) = outputs
        computed = self.operator(
            *[_as_host_argument(v) for v in args], out=torch.empty(0, dtype=output.dtype)
        )
        output.resize_(computed.shape)
        on_host(output).copy_(computed)
        return output

    def _generator(self, args: Any, kwargs: Any) -> torch.Generator | None:
        for value in (*args, *kwargs.values()):
            if isinstance(value, torch.Generator):
                return value
        return torch.cuda.default_generators[torch.cuda.current_device()] if self.draws else None


def _filled(name: str, real: Any, computed: Any) -> Any:
    """The real operator's result with the computed numbers in its memory; None stands for nothing to compute."""
    if computed is None:
        return real
    if isinstance(real, Tensor):
        if real.shape != computed.shape:
            raise RuntimeError(
                f"aten::{name}: shape {tuple(real.shape)} on CUDA, {tuple(computed.shape)} on the CPU"
            )
        (on_host(real) if real.is_cuda else real).copy_(computed)
        return real
    if isinstance(real, (list, tuple)):
        return type(real)(_filled(name, *pair) for pair in zip(real, computed, strict=True))
    return computed


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, (list, tuple)):
        return type(value)(_moved(item, device) for item in value)
    return value


def _copy(real: Any, keyset: Any, target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """`copy_`: the runtime moves what is contiguous and of one dtype; between CUDA tensors the rest is a kernel."""
    real.call_boxed(keyset, target, source, non_blocking)
    if target.is_cuda and source.is_cuda:
        on_host(target).copy_(on_host(source))
    return target


def _is_view(operator: Any) -> bool:
    returns = operator._schema.returns
    return any(r.alias_info and not r.alias_info.is_write for r in returns)


def _operator(name: str) -> Any:
    base, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.aten, base), overload or "default")


def install() -> None:
    """Makes the ATen operators of CUDA tensors compute in this process; a second call does nothing."""
    if _installed:
        return
    library = torch.library.Library("aten", "IMPL")
    names = torch._C._dispatch_get_registrations_for_dispatch_key("CUDA")
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", UserWarning
        )  # that a registered kernel is overridden, which is the point
        for full_name in names:
            namespace, name = full_name.split("::")
            if namespace != "aten" or name in _REAL_IS_ENOUGH or _is_view(_operator(name)):
                continue
            library.impl(name, _Computed(name, _operator(name)), "CUDA", with_keyset=True)
        copy = torch.ops.aten.copy_.default
        library.impl(
            "copy_",
            functools.partial(_copy, torch.library.get_kernel(copy, "CUDA")),
            "CUDA",
            with_keyset=True,
        )
    # Its graphs are refused by the fake's cuDNN; flash and memory-efficient attention are taken instead.
    torch.backends.cuda.enable_cudnn_sdp(False)
    _installed.append(library)
