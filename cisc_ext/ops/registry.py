"""What an operator is made of, and which implementation of it runs.

An operator describes itself once, in an `Operator` entry: its implementations, inputs to try it on, its work
and its memory. Tests and benchmarks loop over `OPERATORS`; nothing else lists the operators.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

IMPLEMENTATIONS = ("reference", "cpp", "triton")
EXTRA_BYTES_CPU = 64 * 2**20
"""Most that an operator may allocate on the CPU beyond inputs, outputs, gradients and saved winners.

A gradient made in the forward pass is one, in float32 until it is scaled. The references hold whole rows of
labels and upsampled logits: the bound is theirs up to about 2**20 numbers, classes times width, in a row. The
compiled kernels keep to it on any number of threads: with labels no smaller than maps or logits and up to
2**18 wide, up to 2**16 classes or maps, in prototype_similarity 2**21 numbers in an image's prototypes; in
cross_similarity up to 2**19 pixels, a guide pixel that is best 2**20 times, and 2**21 numbers in the means of
the classes.
"""

_log = logging.getLogger("cisc_ext.ops")
_logged: set[tuple[str, str, str, tuple[torch.dtype, ...]]] = set()


@dataclass(frozen=True)
class Found:
    """What a machine has to run operators with."""

    library: str
    """Why the compiled library cannot be used; empty where it can."""
    triton: str
    """The same of Triton."""
    driver: str = ""
    """Why Triton, though it is there, cannot be started on a GPU."""
    interpreted: bool = False
    """Whether Triton runs on the CPU, in its interpreter (TRITON_INTERPRET=1)."""
    cuda_kernels: frozenset[str] = frozenset()
    """Operators for which the library has CUDA kernels."""
    cuda_faster: frozenset[tuple[str, tuple[int, int] | None]] = frozenset()
    """Those whose CUDA kernels were measured to be faster than Triton's, each with the compute capability of
    the GPU."""


@dataclass(frozen=True)
class Call:
    """The properties of a call on which the choice of an implementation depends, and of the machine."""

    device: str
    dtypes: tuple[torch.dtype, ...]
    capability: tuple[int, int] | None = None
    """Compute capability of a GPU, where it is known."""
    found: Found | None = None
    """What there is; None for what this machine has."""


def never(call: Call) -> list[str]:
    """No obstacles: the reference runs everywhere."""
    return []


@dataclass(frozen=True)
class Implementation:
    """One way to compute an operator.

    `obstacles` gives the reasons why it cannot serve a call, none if it can; `reservations`, why "auto"
    passes over it though it can, such as that another was measured to be faster. Both are functions of the
    call and of what was found, nothing else.
    """

    name: str
    function: Callable[..., Any]
    obstacles: Callable[[Call], list[str]]
    reservations: Callable[[Call], list[str]] = never


PASSES = ("forward", "backward", "both")
"""What is timed: the outputs alone; the gradients from what forward saved; a loss with its gradient."""


@dataclass(frozen=True)
class Sample:
    """Inputs to try an operator on: float64 tensors on the CPU, to be cast and moved by the caller."""

    name: str
    inputs: dict[str, Any]


@dataclass(frozen=True)
class Workload:
    """Inputs to measure an operator on, at a size that matters: float32 tensors on the CPU, made when asked.

    `passes` are those of `PASSES` worth timing, `dtypes` the precisions; `ladder` marks one of a series of
    sizes that is there for the curve over them.
    """

    name: str
    shape: dict[str, int]
    make: Callable[[], dict[str, Any]]
    passes: tuple[str, ...] = ("forward", "backward")
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    mode: str | None = None
    reduction: str | None = None
    ladder: bool = False


@dataclass(frozen=True)
class Cost:
    """The least work a call needs: floating-point operations, and bytes read and written once.

    The operations go at the rate of float32, or with `products` at that of products in the inputs' dtype. An
    exponential or a logarithm counts as 12 operations, a linear interpolation as 3. Pairs and pixels that
    labels rule out do not count.
    """

    flops: int
    bytes: int
    products: bool = False


@dataclass(frozen=True)
class Operator:
    """An operator's entry. `implementations` are in the order in which "auto" tries them."""

    name: str
    function: Callable[..., Any]
    implementations: tuple[Implementation, ...]
    samples: Callable[[], Iterator[Sample]]
    cost: Callable[[dict[str, Any], str], Cost]
    """Of some inputs and one of `PASSES`."""
    workloads: Callable[[], Iterator[Workload]]
    differentiable: tuple[str, ...] = ()
    features: tuple[str, ...] = field(default=())
    """Names of the inputs that may have any floating-point dtype."""
    extra_bytes_cpu: int = EXTRA_BYTES_CPU
    """Most that it may allocate on the CPU, counted like `EXTRA_BYTES_CPU`."""

    def call(self, device: str, dtype: torch.dtype = torch.float32) -> Call:
        """A call of it on this machine, with all features in `dtype`."""
        return Call(device, (dtype,) * len(self.features), capability(device, None))

    def obstacles(self, impl: str, device: str, dtype: torch.dtype = torch.float32) -> list[str]:
        """Why an implementation of it cannot serve such a call."""
        (one,) = (one for one in self.implementations if one.name == impl)
        return one.obstacles(self.call(device, dtype))


OPERATORS: dict[str, Operator] = {}


def register(operator: Operator) -> Operator:
    """Add an entry; called once by each operator's file."""
    OPERATORS[operator.name] = operator
    return operator


def decide(name: str, impl: str | None, call: Call) -> tuple[Implementation, dict[str, list[str]]]:
    """The implementation that serves `call`, and why those before it in the order do not.

    With `impl=None` or "auto" the first without obstacles and reservations; otherwise the one named, or a
    `ValueError` with its obstacles.
    """
    passed_over: dict[str, list[str]] = {}
    candidates = OPERATORS[name].implementations
    if impl is None or impl == "auto":
        for candidate in candidates:
            reasons = candidate.obstacles(call) or candidate.reservations(call)
            if not reasons:
                return candidate, passed_over
            passed_over[candidate.name] = reasons
        raise AssertionError(f"{name}: the reference must have no obstacles")
    if impl not in IMPLEMENTATIONS:
        raise ValueError(
            f"{name}: impl must be 'auto', {', '.join(map(repr, IMPLEMENTATIONS))} or None, got {impl!r}"
        )
    for candidate in candidates:
        if candidate.name == impl:
            reasons = candidate.obstacles(call)
            if reasons:
                raise ValueError(f"{name}: impl={impl!r} cannot run here: {'; '.join(reasons)}")
            return candidate, passed_over
    raise ValueError(f"{name}: impl={impl!r} does not exist for this operator")


@torch.compiler.assume_constant_result
def capability(device: str, index: int | None) -> tuple[int, int] | None:
    """Compute capability of a GPU; None for other devices."""
    return torch.cuda.get_device_capability(index) if device == "cuda" else None


def choose(name: str, impl: str | None, *features: Tensor) -> Callable[..., Any]:
    """The function of the implementation that serves these tensors; logs a choice the first time it is made.

    Raises `NotImplementedError`, as torch's own operators do, for inputs with a forward-mode tangent: torch
    lets custom operators define backward only, and would drop the tangent without a word.
    """
    device = features[0].device
    call = Call(device.type, tuple(t.dtype for t in features), capability(device.type, device.index))
    chosen, passed_over = decide(name, impl, call)
    if not torch.compiler.is_compiling():
        if OPERATORS[name].differentiable and any(
            forward_ad.unpack_dual(t).tangent is not None for t in features
        ):
            raise NotImplementedError(
                f"{name}: forward-mode differentiation is refused, since torch's custom operators can define"
                " backward only: use backward"
            )
        key = (name, chosen.name, call.device, call.dtypes)
        if key not in _logged:
            _logged.add(key)
            reasons = "".join(f"; not {other}: {', '.join(why)}" for other, why in passed_over.items())
            _log.info("%s on %s: %s%s", name, call.device, chosen.name, reasons)
    return chosen.function


def choices(
    device: str,
    dtype: torch.dtype = torch.float32,
    found: Found | None = None,
    chip: tuple[int, int] | None = None,
) -> list[str]:
    """A line per operator: the implementation that "auto" takes for tensors of a device, and why not
    another; on this machine, or on one that has what is `found` and a GPU of that compute capability."""
    lines = []
    for name in sorted(OPERATORS):
        call = Call(device, (dtype,), capability(device, None) if found is None else chip, found)
        chosen, passed_over = decide(name, None, call)
        existing = [implementation.name for implementation in OPERATORS[name].implementations]
        reasons = [f"{other}: {', '.join(why)}" for other, why in passed_over.items()]
        reasons += [
            f"{other}: not written for this operator" for other in IMPLEMENTATIONS if other not in existing
        ]
        lines.append(f"{name}: {chosen.name}" + (f" (not {'; not '.join(reasons)})" if reasons else ""))
    return lines
