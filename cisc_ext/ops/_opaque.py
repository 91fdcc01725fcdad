"""Operators that torch calls without looking inside."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def opaque_op(name: str, schema: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """Register a Python function as the operator `cisc_ext::name`.

    Opaque to `torch.compile`, so that it may read values, work in pieces or launch kernels of any shape; its
    body runs without autocast, and on a GPU with the device of its tensors as the current one.
    """

    def register(body: Callable[..., Any]) -> Any:
        @functools.wraps(body)
        def without_autocast(*args: Any) -> Any:
            device = next(a.device for a in args if isinstance(a, Tensor))
            with torch.autocast(device.type, enabled=False):
                if device.type == "cuda":
                    with torch.cuda.device(device):
                        return body(*args)
                return body(*args)

        op = torch.library.custom_op(f"cisc_ext::{name}", without_autocast, mutates_args=(), schema=schema)
        op.register_fake(fake)
        return op

    return register


def triton_body(name: str, function: str) -> Callable[..., Any]:
    """The function of that name in the operator's `_triton` file, which is imported when it is called."""

    def body(*arguments: Any) -> Any:
        module = importlib.import_module(f"{__package__}.{name}_triton")
        return getattr(module, function)(*arguments)

    return body
