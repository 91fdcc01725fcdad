"""What an operator allocates on the CPU, simulated CUDA kernels too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile


def traced(call: Callable[[], Any]) -> tuple[Any, list[int]]:
    """What a call gives, and bytes of each tensor that it makes, and gives back (below 0), in their order."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        given = call()
    sizes: list[tuple[int, int]] = []

    def visit(nodes: list[Any]) -> None:
        for node in nodes:
            if node.name == "[memory]":
                sizes.append((node.start_time_ns, node.extra_fields.alloc_size))
            visit(node.children)

    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    visit(profiler.profiler.kineto_results.experimental_event_tree())
    return given, [size for _, size in sorted(sizes, key=lambda one: one[0])]
