"""The CUDA sources, compiled for all chips and looked at without a GPU: what is in the library, that it loads
on a torch without CUDA, and what each kernel takes."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from buildcases import ROOT, foreign_symbols, load_setup, needed_libraries
from cuda_probe import Kernel, cuobjdump, kernels_of, parts, problems, table
from programs import needs_gcc

from cisc_ext.ops.registry import OPERATORS

SOURCES = sorted((ROOT / "csrc").glob("*.cu"))
CHIPS = ("sm_75", "sm_80", "sm_89", "sm_90a", "compute_90")

pytestmark = needs_gcc
tools = pytest.mark.skipif(cuobjdump() is None, reason="no cuobjdump: neither Triton's nor on PATH")


@pytest.fixture(scope="module")
def setup_py() -> ModuleType:
    module = load_setup()
    if module.find_nvcc(os.environ) is None:
        pytest.skip("no nvcc")
    return module


@pytest.fixture(scope="module")
def package(setup_py: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package with both libraries, built with CUDA for the usual chips; objects are kept in
    build/objects, so that only a change compiles anew."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("CISC_")}
    builder = setup_py.Builder({**env, "CISC_CUDA": "1"})
    folder = tmp_path_factory.mktemp("cuda")
    without = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "cisc_ext", folder / "cisc_ext", ignore=without)
    shutil.copy(builder.ops(), folder / "cisc_ext" / "_ops.so")
    shutil.copy(builder.module(), folder / "cisc_ext" / "_build.so")
    return folder


@pytest.fixture(scope="module")
def kernels(package: Path) -> list[Kernel]:
    return kernels_of(package / "cisc_ext" / "_ops.so")


def run(folder: Path, *words: str) -> str:
    """What Python prints with that package, on a torch without CUDA or with it."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(("CISC_", "TRITON_"))}
    paths = os.pathsep.join(map(str, (folder, ROOT, ROOT / "tests")))
    done = subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env={**env, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


LOADED = """
import torch
from cisc_ext.ops import _implementations, _library
from cisc_ext.ops.registry import OPERATORS
from opcases import cast
from oprule import assert_meets_rule

assert _library.LOADED, _library.REASON
for operator in OPERATORS.values():
    inputs = cast(operator, next(operator.samples()), (torch.float32,) * len(operator.features))
    assert_meets_rule(operator, "cpp", inputs)
print(_library.PATH)
print(*sorted(_implementations.HERE.cuda_kernels))
"""


def test_it_loads_and_computes_without_a_gpu(package: Path) -> None:
    path, kernels = run(package, "-c", LOADED).splitlines()
    assert Path(path) == package / "cisc_ext" / "_ops.so"
    registered = set(kernels.split())
    assert registered >= set(OPERATORS)
    declared = {name for source in SOURCES for name in re.findall(r'm\.impl\(\s*"(\w+)"', source.read_text())}
    assert registered == declared


def test_info_names_the_chips(package: Path) -> None:
    lines = [line.strip() for line in run(package, "-m", "cisc_ext", "info").splitlines()]
    assert "cuda chips: sm_75 sm_80 sm_89 sm_90a compute_90" in lines
    assert any(re.match(r"cuda compiler: .*release", line) for line in lines)


@tools
def test_all_chips_are_in_it(setup_py: ModuleType, package: Path) -> None:
    flags = {source.stem: setup_py.gencode(source, CHIPS) for source in SOURCES}
    wanted = {
        f"{name}.{code.replace('compute', 'sm')}.{'ptx' if code.startswith('compute') else 'cubin'}"
        for name, of_source in flags.items()
        for code in (flag.rpartition("code=")[2] for flag in of_source)
    }
    assert {f"{source.stem}.sm_90a.cubin" for source in SOURCES if not source.stem.endswith("_sm80")} < wanted
    assert parts(package / "cisc_ext" / "_ops.so") == wanted


@pytest.mark.skipif(shutil.which("nm") is None, reason="no binutils")
def test_only_the_stable_abi(package: Path) -> None:
    """The CUDA runtime is inside, and the driver is not asked for by name."""
    library = package / "cisc_ext" / "_ops.so"
    assert foreign_symbols(library) == []
    needed = needed_libraries(library)
    assert "libtorch.so" in needed
    assert not [name for name in needed if re.match(r"libcuda|libcudart|libtorch_cuda|libc10_cuda", name)]


@tools
def test_every_source_has_kernels_for_every_chip(kernels: list[Kernel]) -> None:
    print("\n".join(table(kernels)))
    chips = {kernel.chip for kernel in kernels}
    assert chips == {"sm_75", "sm_80", "sm_89", "sm_90a"}
    for source in SOURCES:
        if source.stem.endswith("_cuda"):
            names = (f"{source.stem}_cu", source.stem.removesuffix("_cuda"))
            of_source = [kernel for kernel in kernels if any(name in kernel.name for name in names)]
            assert {kernel.chip for kernel in of_source} == chips, source.name


@tools
@pytest.mark.parametrize(
    ("namespace", "chips", "products", "copies"),
    [
        ("sm90", {"sm_90a"}, {"HGMMA", "IGMMA"}, "UTMALDG"),
        ("sm80", {"sm_80", "sm_89"}, {"HMMA"}, "LDGSTS"),
    ],
)
def test_products_are_made_by_tensor_cores(
    kernels: list[Kernel], namespace: str, chips: set[str], products: set[str], copies: str
) -> None:
    """In every kernel that is there for them, fed by the chip's asynchronous copies."""
    made = [
        kernel for kernel in kernels if re.search(rf"\d{namespace}\d+\w*(sweep|backward)_kernel", kernel.name)
    ]
    assert len(made) >= 8
    for kernel in made:
        assert kernel.chip in chips, kernel.name
        assert kernel.instructions & products, kernel.name
        assert copies in kernel.instructions, kernel.name


@tools
def test_no_kernel_spills_or_asks_for_too_much(kernels: list[Kernel]) -> None:
    wrong = [line for kernel in kernels for line in _lines(kernel)]
    assert not wrong, "\n".join(wrong)
    assert all(kernel.registers for kernel in kernels)


def _lines(kernel: Kernel) -> list[str]:
    (head,) = table([kernel])
    return [f"{head}: {problem}" for problem in problems(kernel)]


MADE = """
extern "C" __global__ void __launch_bounds__(128) indexed(const int* from, float* to, int n) {
  float values[64] = {};
  for (int i = 0; i < n; ++i) values[from[i] & 63] += to[i];
  to[threadIdx.x] = values[threadIdx.x & 63];
}
extern "C" __global__ void unbounded(float* to) { to[threadIdx.x] *= 2.0f; }
extern "C" __global__ void __launch_bounds__(128) plain(float* to) { to[threadIdx.x] *= 2.0f; }
"""


@tools
def test_what_is_wrong_is_found(setup_py: ModuleType, tmp_path: Path) -> None:
    """An array with an index made at run time, and a kernel without launch bounds."""
    source = tmp_path / "made.cu"
    source.write_text(MADE)
    nvcc = setup_py.find_nvcc(os.environ)
    chips = setup_py.gencode(source, setup_py.parse_archs("7.5;9.0a;9.0+PTX"))
    command = [nvcc, "-O3", *chips, "-c", str(source), "-o", str(tmp_path / "made.o")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = kernels_of(tmp_path / "made.o")
    assert {(kernel.name, kernel.chip) for kernel in found} == {
        (name, chip) for name in ("indexed", "unbounded", "plain") for chip in ("sm_75", "sm_90a")
    }
    for kernel in found:
        wrong = problems(kernel)
        if kernel.name == "indexed":
            assert kernel.threads == 128
            assert {"LDL in its code", "STL in its code"} <= set(wrong)
            assert any(re.fullmatch(r"\d+ bytes of local memory", one) for one in wrong)
        else:
            assert wrong == (["no launch bounds"] if kernel.name == "unbounded" else [])


def test_limits() -> None:
    good = Kernel("name", "sm_90a", registers=64, shared_bytes=48 << 10, threads=1024)
    assert problems(good) == []
    for change, problem in (
        ({"registers": 65}, "65 registers for 1024 threads, there are 65536"),
        ({"shared_bytes": (48 << 10) + 1}, "49153 bytes of static shared memory"),
        ({"local_bytes": 8}, "8 bytes of local memory"),
        ({"threads": 0}, "no launch bounds"),
        ({"instructions": {"STL"}}, "STL in its code"),
    ):
        kernel = Kernel(**{**vars(good), **change})
        assert problems(kernel) == [problem]
