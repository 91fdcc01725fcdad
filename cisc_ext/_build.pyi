from collections.abc import Mapping, Sequence
from typing import TypedDict

from typing_extensions import NotRequired

class Info(TypedDict):
    compiler: str
    flags: tuple[str, ...]
    instruction_sets: tuple[str, ...]
    torch: str
    torch_target: str
    cuda_compiler: str
    cuda_chips: tuple[str, ...]
    left_out: str
    instruction_set_in_use: str

class Plan(TypedDict):
    tile: dict[str, int]
    workspace_bytes: int
    flops: int
    bytes: int
    packed_bytes: NotRequired[int]  # on a GPU

CUDA_CHIPS: tuple[str, ...]

def info() -> Info: ...
def plan(
    op: str,
    shapes: Mapping[str, Sequence[int]],
    dtype: str = "float32",
    device: str = "cpu",
    backward: bool = False,
    threads: int = 1,
    ohem: bool = False,
    reduction: str = "max",
    k: int = 8,
    return_index: bool = False,
    rounded: bool = False,
) -> Plan: ...
