"""What CUDA kernels in a library or object take of a GPU, from their machine code; no GPU is needed."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

REGISTERS = 65536
"""Of a multiprocessor, all of which one block may have."""
STATIC_SHARED_BYTES = 48 << 10
"""More only a launch may ask for."""
LOCAL_MEMORY = ("LDL", "STL")
"""Instructions that read and write local memory: spilled registers, arrays with an index made at run time."""

TENSOR_CORES = ("HMMA", "HGMMA", "IGMMA", "LDGSTS", "UTMALDG")
"""Products by tensor cores, of a warp and of four, and the asynchronous copies that feed them."""


def cuobjdump() -> str | None:
    """The tool: Triton brings it, or it is on PATH."""
    try:
        triton = Path(str(importlib.metadata.distribution("triton").locate_file("triton")))
    except importlib.metadata.PackageNotFoundError:
        triton = Path("/nowhere")
    folders = (triton / "backends" / "nvidia" / "bin", None)
    return next((found for folder in folders if (found := shutil.which("cuobjdump", path=folder))), None)


def dumped(path: Path, *words: str) -> Iterator[str]:
    """The tool's lines; there may be very many."""
    tool = cuobjdump()
    assert tool is not None
    with subprocess.Popen([tool, *words, str(path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield from process.stdout
    assert process.returncode == 0, f"cuobjdump {' '.join(words)} ended with {process.returncode}"


def parts(path: Path) -> set[str]:
    """Files within: SOURCE.CHIP.cubin, SOURCE.CHIP.ptx."""
    listed = " ".join((*dumped(path, "-lelf"), *dumped(path, "-lptx")))
    return set(re.findall(r"\S+\.(?:cubin|ptx)\b", listed))


@dataclass
class Kernel:
    """One kernel for one chip."""

    name: str
    chip: str
    registers: int = 0
    shared_bytes: int = 0
    local_bytes: int = 0
    threads: int = 0
    """Of its launch bounds; 0 without."""
    instructions: set[str] = field(default_factory=set)
    """Those of `LOCAL_MEMORY` and `TENSOR_CORES` that it has."""


def _chip_of(line: str) -> str | None:
    found = re.match(r"arch = (sm_\w+)", line)
    return found[1] if found else None


def with_usage(lines: Iterable[str]) -> dict[tuple[str, str], Kernel]:
    """Kernels by chip and name, from -res-usage."""
    found: dict[tuple[str, str], Kernel] = {}
    chip, name = "", ""
    for line in lines:
        chip = _chip_of(line) or chip
        if function := re.match(r"\s*Function (\S+):$", line):
            name = function[1]
        usage = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", line)}
        if "REG" in usage:
            local = usage["STACK"] + usage["LOCAL"]
            found[chip, name] = Kernel(name, chip, usage["REG"], usage["SHARED"], local)
    return found


def add_threads(kernels: Iterable[Kernel], lines: Iterable[str]) -> None:
    """Launch bounds, from -ptx: they are the same for every chip."""
    bounds: dict[str, int] = {}
    name = ""
    for line in lines:
        if entry := re.search(r"\.entry (\w+)", line):
            name = entry[1]
        if most := re.match(r"\s*\.maxntid (\d+)", line):
            bounds[name] = int(most[1])
    for kernel in kernels:
        kernel.threads = bounds.get(kernel.name, 0)


def add_instructions(kernels: dict[tuple[str, str], Kernel], lines: Iterable[str]) -> None:
    """Those of `LOCAL_MEMORY` and `TENSOR_CORES`, from -sass."""
    chip, name = "", ""
    wanted = re.compile(rf"\b({'|'.join((*LOCAL_MEMORY, *TENSOR_CORES))})\b")
    for line in lines:
        chip = _chip_of(line) or chip
        if function := re.match(r"\s*Function : (\S+)", line):
            name = function[1]
        elif (one := wanted.search(line)) and (chip, name) in kernels:
            kernels[chip, name].instructions.add(one[1])


def kernels_of(path: Path) -> list[Kernel]:
    """All kernels of a library or object, for every chip that it has machine code for."""
    found = with_usage(dumped(path, "-res-usage"))
    add_threads(found.values(), dumped(path, "-ptx"))
    add_instructions(found, dumped(path, "-sass"))
    return list(found.values())


def problems(kernel: Kernel) -> list[str]:
    """What a kernel must not have, or lacks."""
    wrong = [f"{one} in its code" for one in LOCAL_MEMORY if one in kernel.instructions]
    if kernel.local_bytes:
        wrong.append(f"{kernel.local_bytes} bytes of local memory")
    if kernel.shared_bytes > STATIC_SHARED_BYTES:
        wrong.append(f"{kernel.shared_bytes} bytes of static shared memory")
    if not kernel.threads:
        wrong.append("no launch bounds")
    if kernel.registers * kernel.threads > REGISTERS:
        wrong.append(f"{kernel.registers} registers for {kernel.threads} threads, there are {REGISTERS}")
    return wrong


def table(kernels: Iterable[Kernel]) -> list[str]:
    """A line per kernel and chip."""
    return [
        f"{kernel.chip:<7} {kernel.registers:4} registers {kernel.shared_bytes:6} shared"
        f" {kernel.threads:5} threads  {shown(kernel.name)}"
        for kernel in sorted(kernels, key=lambda one: (shown(one.name), one.chip))
    ]


def shown(name: str) -> str:
    """A kernel's name as C++ has it, without arguments, where a tool for that is there."""
    tool = shutil.which("c++filt")
    if tool is None:
        return name
    done = subprocess.run([tool, name], capture_output=True, text=True, check=True)
    plain = done.stdout.strip().replace("(anonymous namespace)::", "")
    return re.sub(r"^void |\(.*$", "", plain)
