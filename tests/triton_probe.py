"""Compiles what the Triton operators launch, for a GPU that need not be there, and looks at the code.

    python tests/triton_probe.py --chip 80|89|90 [--all] [--op NAME ...] [--json FILE]

The operators run on CPU tensors of their samples' and workloads' sizes, with every launch taken aside:
nothing is computed. Each kernel is then compiled once for each set of tensors' types and constants, and its
machine code must have no local memory, fit the chip, and use its matrix units where it should. `--all` takes
every dtype, layout and label type, the kinds of integers, the ladders of sizes, and the tiles that only a
search would try. A process of its own, without TRITON_INTERPRET: test_triton_compile.py runs it.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from cisc_ext.ops import _cross_means_triton, _implementations, _tiles, _triton, cross_similarity_triton
from cisc_ext.ops.registry import OPERATORS, Operator

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SHARED = {80: 166912, 89: 101376, 90: 232448}
"""Bytes of shared memory that a block may have, by chip."""
REGISTERS = 65536
"""Of a multiprocessor, all of which one block may have."""
WARP = 32
MULTIPLIES = "sweep"
"""In the names of kernels that multiply matrices."""

Arguments = tuple[Any, ...]
Constants = Mapping[str, Any]


class Mock:
    """The driver of a GPU that is not there."""

    def __init__(self, chip: int) -> None:
        self.chip = chip

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.chip, WARP)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        pass

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        return torch.cuda

    @staticmethod
    def is_active() -> bool:
        return True


@dataclass(frozen=True)
class Launch:
    """A kernel with its arguments, and the case that launched it."""

    kernel: Any
    arguments: Arguments
    constants: Constants
    case: str
    candidate: bool
    """Whether only a search tries it."""

    @property
    def name(self) -> str:
        return str(self.kernel.__name__)

    @property
    def types(self) -> tuple[str, ...]:
        return tuple(map(kind, self.arguments))

    def key(self, every: bool) -> tuple[Any, ...]:
        """What is compiled once: by the kinds of all arguments, or of the tensors alone."""
        types = self.types if every else tuple(one for one in self.types if one[0] in "*d")
        return self.name, types, tuple(sorted(self.constants.items(), key=lambda item: item[0]))

    @property
    def low_precision(self) -> bool:
        return any("float16" in one for one in self.types)


def kind(value: Any) -> str:
    """What Triton compiles an argument for: dtype and alignment; of an integer its width, whether it is 1,
    whether 16 divides it."""
    if isinstance(value, Tensor):
        aligned = value.data_ptr() % 16 == 0
        return f"*{str(value.dtype).removeprefix('torch.')}{'' if aligned else ' unaligned'}"
    if isinstance(value, TensorDescriptor):
        return f"descriptor {value.base.dtype} {list(value.block_shape)}"
    if isinstance(value, bool) or value is None:
        return type(value).__name__
    if isinstance(value, int):
        width = "int32" if -(2**31) <= value < 2**31 else "int64"
        return "1" if value == 1 else f"{width} of 16" if value % 16 == 0 else width
    return type(value).__name__


@dataclass
class Recorder:
    """Takes launches aside, each kind once."""

    launches: dict[tuple[Any, ...], Launch] = field(default_factory=dict)
    rows: dict[str, dict[int, bool]] = field(default_factory=dict)
    """Of each table of tiles, whether a row was taken."""
    case: str = ""
    every: bool = False
    """Kinds of integers too, and the tiles that are not the first that fits."""
    candidate: bool = False
    larger: dict[tuple[str, int], tuple[str, Callable[[], Any]]] = field(default_factory=dict)
    """Rows for larger sizes, with a case that fits them too and its launches."""

    def __call__(self, kernel: Any, programs: int, arguments: Arguments, constants: Constants) -> None:
        launch = Launch(kernel, arguments, constants, self.case, self.candidate)
        key = launch.key(self.every)
        known = self.launches.get(key)
        if known is None or (known.candidate and not self.candidate):
            # The tensors are let go: there are too many. Their kind is what is compiled for.
            self.launches[key] = dataclasses.replace(launch, arguments=tuple(map(_without_memory, arguments)))

    def tiles(self) -> Callable[..., Any]:
        """Stands for `Tiles.run`."""

        def run(
            table: _tiles.Tiles,
            launch: Callable[[_tiles.Tile], Any],
            capability: tuple[int, int],
            device: torch.device,
            shape: Mapping[str, int],
        ) -> Any:
            fitting = table.fitting(capability, shape)
            used = self.rows.setdefault(table.name, dict.fromkeys(range(len(table.rows)), False))
            used[next(i for i, row in enumerate(table.rows) if row.fits(capability, shape))] = True
            for i, row in enumerate(table.rows):
                if row.fits(capability, shape) and not _behind(table.rows[:i], row, capability):
                    self.larger.setdefault((table.name, i), (self.case, partial(launch, row.tile)))
            if self.every:
                self.candidate = True
                for tile in [*fitting[1:], *table.candidates]:
                    launch(tile)
                self.candidate = False
            return launch(fitting[0])

        return run


def _behind(rows: Sequence[_tiles.Row], row: _tiles.Row, capability: tuple[int, int]) -> bool:
    """Whether a row is never taken on a chip, since one in front of it fits whatever it fits."""

    def wider(other: _tiles.Row) -> bool:
        least = row.at_most or {}
        return all(limit >= least.get(key, math.inf) for key, limit in (other.at_most or {}).items())

    return any(capability >= other.capability and wider(other) for other in rows)


def _without_memory(value: Any) -> Any:
    """An argument of the same kind that holds next to nothing."""
    if isinstance(value, Tensor):
        offset = 0 if value.data_ptr() % 16 == 0 else 1
        return torch.empty(16, dtype=value.dtype)[offset:]
    if isinstance(value, TensorDescriptor):
        few = torch.empty(1, dtype=value.base.dtype).as_strided(value.base.shape, (0,) * value.base.dim())
        return dataclasses.replace(value, base=few)
    return value


@dataclass(frozen=True)
class Setting:
    """How an operator's inputs are given."""

    dtype: torch.dtype
    channels_last: bool = False
    precision: str = "highest"
    labels: torch.dtype | None = None


USUAL = (
    Setting(torch.float32),
    Setting(torch.bfloat16),
    Setting(torch.bfloat16, channels_last=True),
    Setting(torch.float32, precision="high"),
)
EVERY = (
    *(
        Setting(dtype, last, labels=labels)
        for dtype, last, labels in itertools.product(
            (torch.float32, torch.bfloat16, torch.float16), (False, True), (None, torch.int32, torch.int64)
        )
    ),
    Setting(torch.float32, precision="high"),
    Setting(torch.float32, channels_last=True, precision="high"),
)


def cases(operator: Operator, every: bool) -> Iterator[tuple[str, dict[str, Any], tuple[Setting, ...]]]:
    """Inputs on the CPU by name: crops of the published runs, then the samples, which have all modes, in
    float32 unless all is asked for."""
    for workload in operator.workloads():
        if every or not workload.ladder:
            yield workload.name, workload.make(), EVERY if every else USUAL
    for sample in operator.samples():
        yield sample.name, sample.inputs, EVERY if every else USUAL[:1]


def given(operator: Operator, inputs: dict[str, Any], setting: Setting) -> dict[str, Any]:
    """The inputs as a setting has them."""

    def change(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if name in operator.features:
            value = value.detach().to(setting.dtype)
            if setting.channels_last and value.dim() == 4:
                value = value.contiguous(memory_format=torch.channels_last)
            return value.requires_grad_(name in operator.differentiable)
        return value.to(setting.labels) if "labels" in name and setting.labels is not None else value

    return {name: change(name, value) for name, value in inputs.items()}


def call(operator: Operator, inputs: dict[str, Any], setting: Setting) -> None:
    """Forward alone, and with the gradients."""
    torch.set_float32_matmul_precision(setting.precision)
    changed = given(operator, inputs, setting)
    with torch.no_grad():
        operator.function(**changed, impl="triton")
    if operator.differentiable:
        result = operator.function(**changed, impl="triton")
        value = result[0] if isinstance(result, tuple) else result
        value.backward(torch.empty_like(value))


@contextmanager
def little_memory() -> Iterator[None]:
    """As if no two slots, or means, could be held at once: what comes later is added to what is there."""
    limits = ((cross_similarity_triton, "_WORKSPACE_BYTES"), (_cross_means_triton, "_TABLE_BYTES"))
    before = [getattr(module, name) for module, name in limits]
    for module, name in limits:
        setattr(module, name, 1)
    try:
        yield
    finally:
        for (module, name), value in zip(limits, before, strict=True):
            setattr(module, name, value)


def record(names: Sequence[str], chip: int, every: bool) -> Recorder:
    """All that the operators launch, forward alone and with their gradients."""
    recorder = Recorder(every=every)
    _triton.pretended = divmod(chip, 10)
    _triton.launcher = recorder
    _tiles.Tiles.run = recorder.tiles()  # type: ignore[method-assign]
    # Lets the operators take CPU tensors; Triton itself is not interpreted.
    _implementations.HERE = dataclasses.replace(_implementations.HERE, interpreted=True)
    for name in names:
        operator = OPERATORS[name]
        for case, inputs, settings in cases(operator, every):
            for setting in settings:
                dtype = str(setting.dtype).removeprefix("torch.")
                recorder.case = f"{name} {case} {dtype}{' channels-last' if setting.channels_last else ''}"
                call(operator, inputs, setting)
        with little_memory():
            for sample in operator.samples():
                recorder.case = f"{name} {sample.name}, little memory"
                call(operator, sample.inputs, USUAL[0])
    for (table, i), (case, launch) in recorder.larger.items():
        if not recorder.rows[table][i]:
            recorder.case = f"{case}, tile of a larger size"
            launch()
            recorder.rows[table][i] = True
    return recorder


@dataclass
class Code:
    """A compiled kernel, and what is wrong with it."""

    kernel: str
    case: str
    candidate: bool
    types: tuple[str, ...]
    constants: dict[str, Any]
    registers: int = 0
    shared: int = 0
    warps: int = 0
    units: tuple[str, ...] = ()
    """Instructions of the matrix units and of loads by descriptor that it has."""
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)


def _what_is_said(error: BaseException) -> str:
    """Of an error and its first cause, without the source that Triton shows."""
    while error.__cause__ is not None:
        error = error.__cause__
    said = [line.strip() for line in str(error).splitlines() if line.strip(" ^")]
    return f"{type(error).__name__}: {said[-1] if said else ''}"[:300]


def _tool(name: str, *words: str) -> str:
    return subprocess.run([str(TOOLS / name), *words], capture_output=True, text=True, check=True).stdout


def inspect(launch: Launch, chip: int) -> Code:
    """Compile a launch for the chip, and look at its machine code."""
    code = Code(launch.name, launch.case, launch.candidate, launch.types, dict(launch.constants))
    begin = time.monotonic()
    try:
        compiled = launch.kernel.warmup(*launch.arguments, grid=(1,), **launch.constants)
    except Exception as error:  # of many kinds, each a finding
        code.problems.append(f"does not compile: {_what_is_said(error)}")
        return code
    code.seconds = time.monotonic() - begin
    code.shared, code.warps = compiled.metadata.shared, compiled.metadata.num_warps
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        found = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
        # Disassembling takes half as long as compiling. What spills has a stack.
        looked_at = "mma" in compiled.asm["ptx"] or found["STACK"] or found["LOCAL"]
        text = _tool("nvdisasm", "-c", file.name) if looked_at else ""
    code.registers = found["REG"]
    mnemonics = set(re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*)", text, re.MULTILINE))
    code.units = tuple(sorted(mnemonics & {"HMMA", "HGMMA", "IMMA", "IGMMA", "UTMALDG", "LDGSTS"}))
    code.problems = problems(code, mnemonics, found, chip, launch.low_precision)
    return code


def problems(
    code: Code, mnemonics: set[str], found: dict[str, int], chip: int, low_precision: bool
) -> list[str]:
    """What a kernel must not have, or lacks."""
    wrong = [f"{name} in its code: registers spill" for name in ("LDL", "STL") if name in mnemonics]
    wrong += [
        f"{found[name]} bytes of {name.lower()} memory" for name in ("STACK", "LOCAL") if found.get(name)
    ]
    if code.shared > SHARED[chip]:
        wrong.append(f"{code.shared} bytes of shared memory, sm_{chip} has {SHARED[chip]}")
    if code.registers * code.warps * WARP > REGISTERS:
        wrong.append(f"{code.registers} registers for {code.warps} warps, there are {REGISTERS}")
    if MULTIPLIES in code.kernel:
        if not low_precision or "gradient" in code.kernel:
            wanted = set() if mnemonics & {"HMMA", "HGMMA"} else {"HMMA or HGMMA"}
        else:
            wanted = ({"HGMMA", "UTMALDG"} if chip >= 90 else {"HMMA"}) - mnemonics
        wrong += [f"no {name} in its code" for name in sorted(wanted)]
    return wrong


def table(chip: int, codes: Sequence[Code]) -> list[str]:
    """A line per kernel: how many kinds were compiled, and the most that one of them takes."""
    lines = [f"{'kernel':<44} chip   kinds registers shared warps   seconds  units"]
    for kernel, group in itertools.groupby(sorted(codes, key=lambda code: code.kernel), lambda c: c.kernel):
        ours = list(group)
        warps = "/".join(map(str, sorted({code.warps for code in ours})))
        units = " ".join(sorted({unit for code in ours for unit in code.units}))
        lines.append(
            f"{kernel:<44} sm_{chip} {len(ours):6} {max(code.registers for code in ours):9}"
            f" {max(code.shared for code in ours):6} {warps:<7}"
            f" {sum(code.seconds for code in ours):7.1f}  {units}"
        )
    return lines


def made_launches() -> list[Launch]:
    """Kernels that must be found wanting."""
    from made_kernels import double, spilling, sweep_without_products

    fused = {"enable_fp_fusion": True}
    square, row = torch.empty(128, 128), torch.empty(256, dtype=torch.bfloat16)
    return [
        Launch(double, (square, square, 16384), {"BLOCK": 1024, **fused}, "made", False),
        Launch(spilling, (square, square), {"SIDE": 128, "num_warps": 1, **fused}, "made", False),
        Launch(sweep_without_products, (row, row, 256), {"BLOCK": 256, **fused}, "made", False),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--chip", type=int, choices=sorted(SHARED), required=True)
    parser.add_argument("--op", nargs="+", choices=sorted(OPERATORS), default=sorted(OPERATORS))
    parser.add_argument("--all", action="store_true", help="every dtype, layout, size and tile")
    parser.add_argument("--list", action="store_true", help="only say how many are to be compiled")
    parser.add_argument("--made", action="store_true", help="kernels that must be found wanting instead")
    parser.add_argument("--json", type=Path, help="write the result")
    flags = parser.parse_args(arguments)
    if _triton.INTERPRETED:
        parser.error("TRITON_INTERPRET=1 has nothing compiled")
    begin = time.monotonic()
    driver.set_active(Mock(flags.chip))
    recorder = Recorder() if flags.made else record(flags.op, flags.chip, flags.all)
    launches = made_launches() if flags.made else list(recorder.launches.values())
    if flags.list:
        print(len(launches))
        return 0
    codes = [inspect(launch, flags.chip) for launch in launches]
    print("\n".join(table(flags.chip, codes)))
    print(
        f"{len(codes)} compiled in {time.monotonic() - begin:.0f} s{'' if flags.all else ', --all has more'}"
    )
    # A search passes over what does not fit.
    bad = [code for code in codes if code.problems and not code.candidate]
    for code in codes:
        if code.problems:
            head = "candidate" if code.candidate else "FAILED"
            constants = " ".join(f"{name}={value}" for name, value in code.constants.items())
            wrong = "; ".join(code.problems)
            print(f"{head}: {code.kernel} sm_{flags.chip} of {code.case} ({constants}): {wrong}")
    if flags.json is not None:
        kept = {"codes": [dataclasses.asdict(code) for code in codes], "rows": recorder.rows}
        flags.json.write_text(json.dumps(kept, indent=1, default=str) + "\n")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
