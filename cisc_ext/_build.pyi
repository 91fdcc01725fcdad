from typing import TypedDict

class Info(TypedDict):
    compiler: str
    flags: tuple[str, ...]
    instruction_sets: tuple[str, ...]
    torch: str
    torch_target: str
    cuda_compiler: str
    cuda_chips: tuple[str, ...]
    left_out: str

def info() -> Info: ...
def masked_average_pool_bytes(channels: int, height: int, width: int, classes: int) -> int: ...
