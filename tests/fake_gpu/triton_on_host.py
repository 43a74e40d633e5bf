"""Triton kernels that compute on the fake GPU: Triton's interpreter on the memory itself.

Needs TRITON_INTERPRET=1 before Triton is imported. The interpreter would copy every storage that a kernel is given to
the host and back; here that memory is the host's already. Without copies, kernels that are given addresses as integers
(tables of pointers) see the same memory as the others.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any

from computing import on_host


def _host_argument(value: Any) -> Any:
    from triton.tools.tensor_descriptor import TensorDescriptor

    if isinstance(value, tuple):
        items = map(_host_argument, value)
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, TensorDescriptor):
        return dataclasses.replace(value, base=_host_argument(value.base))
    return on_host(value) if getattr(value, "is_cuda", False) else value


def install() -> None:
    """Gives the interpreter aliases of CUDA tensors (seen with Triton 3.8)."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("Triton kernels compute in its interpreter only: set TRITON_INTERPRET=1")
    from triton.runtime import interpreter

    executor: Any = interpreter.GridExecutor

    def init(self: Any, args: Any, kwargs: Any) -> tuple[list[Any], dict[str, Any]]:
        return [_host_argument(a) for a in args], {name: _host_argument(v) for name, v in kwargs.items()}

    executor._init_args_hst = init
    executor._restore_args_dev = lambda self, *given: None
