"""The build: what it makes, what it leaves out and says so, and the compiled operator against plain torch."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from buildcases import ROOT, foreign_symbols, load_setup, needed_libraries
from setuptools import Distribution
from torch import Tensor
from torch.nn import functional

from cisc_ext.data import synthetic
from cisc_ext.ops import _library
from cisc_ext.ops.registry import OPERATORS

EPS = 5e-4

compiled = pytest.mark.skipif(not _library.LOADED, reason=f"no compiled operators: {_library.REASON}")


def test_what_was_built_loads() -> None:
    """Without this, the tests of a library that does not load would all be skipped, and be green."""
    if not _library.PATH.is_file():
        pytest.skip("built without C++ (CISC_CPP=0)")
    assert _library.LOADED, _library.REASON


def test_tests_of_a_library_that_is_not_there_do_not_run(tmp_path: Path) -> None:
    """That of CISC_OPS; they would all be skipped, and be green."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "tests/test_ops_memory.py"],
        cwd=ROOT,
        env={**os.environ, "CISC_OPS": str(tmp_path / "_ops.so")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == pytest.ExitCode.USAGE_ERROR, done.stdout
    assert "ERROR: CISC_OPS: _ops.so was not built" in done.stderr


def test_why_a_library_does_not_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "_ops.so"
    broken.write_bytes(b"")
    monkeypatch.setattr(_library, "PATH", broken)
    monkeypatch.setattr(_library, "LOADED", False)
    monkeypatch.setattr(_library, "REASON", "")
    _library.load()
    assert not _library.LOADED and re.match(r"_ops.so cannot be loaded: .*file too short", _library.REASON)


@pytest.fixture(scope="module")
def setup_py() -> ModuleType:
    return load_setup()


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what setup.py reads, with an empty object cache."""
    folder = tmp_path_factory.mktemp("tree")
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    (folder / "README.md").write_text("readme\n")
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    (folder / "cisc_ext").mkdir()
    shutil.copy(ROOT / "cisc_ext" / "__init__.py", folder / "cisc_ext")
    return folder


def build(folder: Path, **env: str) -> subprocess.CompletedProcess[str]:
    settings = {key: value for key, value in os.environ.items() if not key.startswith("CISC_")}
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    return subprocess.run(
        command, cwd=folder, env=settings | env, capture_output=True, text=True, timeout=300
    )


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_objects_are_reused_by_content(setup_py: ModuleType, tree: Path) -> None:
    env = {"CISC_CUDA": "0", "CISC_DEBUG": "1"}
    first = build(tree, **env)
    assert first.returncode == 0, first.stdout + first.stderr
    assert re.search(r"cisc_ext: \d+ compiled or linked, 0 reused", first.stdout)
    assert "cisc_ext: CUDA left out: CISC_CUDA=0" in first.stdout
    assert (tree / "cisc_ext" / "_ops.so").is_file()
    assert len(list((tree / "cisc_ext").glob("_build.*.so"))) == 1

    for path in (tree / "csrc").iterdir():
        os.utime(path)
    assert "cisc_ext: 0 compiled or linked" in build(tree, **env).stdout

    header = tree / "csrc" / "pixel_loss.h"
    header.write_text(header.read_text() + "// changed\n")
    third = build(tree, **env).stdout
    users = [path for path in (tree / "csrc").glob("*.cpp") if header in setup_py.closure(path)]
    assert 0 < len(users) < len(list((tree / "csrc").glob("*.cpp")))
    assert f"cisc_ext: {len(users) + 1} compiled or linked" in third, third
    assert "module." not in third


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_two_builds_at_once(tree: Path) -> None:
    """Both end well and leave whole libraries, whether in two processes or in two threads of one."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("CISC_")}
    env |= {"CISC_CUDA": "0", "CISC_DEBUG": "1"}
    shutil.rmtree(tree / "build", ignore_errors=True)
    command = [sys.executable, "setup.py", "build_ext", "--inplace", "-j", "2"]
    started = [
        subprocess.Popen(
            command, cwd=tree, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], outputs
    made = [path for path in (tree / "cisc_ext").iterdir() if path.suffix == ".so"]
    assert len(made) == 2 and all(path.read_bytes()[:4] == b"\x7fELF" for path in made)
    assert not list((tree / "cisc_ext").glob("*.part"))

    sizes = {path: path.stat().st_size for path in made}
    for path in made:
        os.utime(path, (0, 0))  # older than what is built, so replaced
    with subprocess.Popen(command, cwd=tree, env=env, stdout=subprocess.DEVNULL) as again:
        while again.poll() is None:
            assert {path: path.stat().st_size for path in made} == sizes  # never missing, never a part
    assert again.returncode == 0 and all(path.stat().st_mtime > 0 for path in made)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_pip(tree: Path, tmp_path: Path) -> None:
    """README's installation in place, and a wheel, which holds what was built and no more."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("CISC_")}
    env |= {"CISC_CUDA": "0", "CISC_DEBUG": "1"}
    elsewhere = ["--no-deps", "--ignore-installed", "--prefix", str(tmp_path / "prefix")]  # not in this one
    for words in (
        ["install", "--no-build-isolation", "-e", ".", *elsewhere],
        ["wheel", "--no-build-isolation", "--no-deps", "-w", str(tmp_path), "."],
    ):
        command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *words]
        done = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.startswith("cisc_ext/")]
    assert "cisc_ext/_ops.so" in names and len([name for name in names if name.endswith(".so")]) == 2
    assert {name for name in names if not name.endswith(".so")} == {"cisc_ext/__init__.py"}
    assert (tree / "cisc_ext" / "_ops.so").is_file()


def test_a_folder_given_by_name_keeps_its_files(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    done = subprocess.run(
        [sys.executable, "setup.py", "build", "--build-lib", str(tmp_path)],
        cwd=tree,
        env={**os.environ, "CISC_CPP": "0"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "mine").read_text() == "mine" and (tmp_path / "cisc_ext").is_dir()


def test_without_cpp_old_libraries_go(
    setup_py: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cisc_ext").mkdir()
    for name in ("_ops.so", "__init__.py"):
        (tmp_path / "cisc_ext" / name).touch()
    monkeypatch.setattr(setup_py, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    for modules, left in ((["one"], {"_ops.so", "__init__.py"}), ([], {"__init__.py"})):
        command = setup_py.BuildPy(Distribution({"packages": [], "ext_modules": modules}))
        command.editable_mode = True
        command.ensure_finalized()
        command.run()
        assert {path.name for path in (tmp_path / "cisc_ext").iterdir()} == left


@pytest.mark.parametrize(
    ("env", "message"),
    [
        (
            {"CISC_CUDA": "1", "CUDA_HOME": "/nowhere"},
            "CISC_CUDA=1, but nvcc was found neither in CUDA_HOME/bin",
        ),
        ({"CISC_CUDA": "yes"}, "CISC_CUDA must be 0 or 1, got 'yes'"),
        ({"CISC_SANITIZE": "1"}, "CISC_SANITIZE=1 builds into a folder of its own"),
        ({"CISC_CUDA_ARCHS": "8.0;sm90"}, "CISC_CUDA_ARCHS must be a list such as .*, got 'sm90'"),
        ({"CISC_CUDA_ARCHS": "7.0"}, "the oldest chip that has kernels is 7.5, got '7.0'"),
        (
            {"CXX": "/nowhere/g++ -m64"},
            "no C\\+\\+ compiler: CXX names /nowhere/g\\+\\+, which was",
        ),
        ({"PATH": "/nowhere", "CISC_CPP": "1"}, "CISC_CPP=1, but no C\\+\\+ compiler"),
        ({"PATH": "/nowhere", "CISC_CUDA": "1"}, "CISC_CUDA=1, but no C\\+\\+ compiler"),
        ({"PATH": "/nowhere", "CISC_SANITIZE": "1"}, "CISC_SANITIZE=1, but no C\\+\\+ compiler"),
    ],
)
def test_refusals_are_one_line(tree: Path, env: dict[str, str], message: str) -> None:
    done = build(tree, **env)
    assert done.returncode != 0
    assert len(done.stderr.strip().splitlines()) == 1
    assert re.search(rf"^cisc_ext: .*{message}", done.stderr)


def test_pure_python(tree: Path) -> None:
    done = build(tree, CISC_CPP="0", PATH="/nowhere")
    assert done.returncode == 0, done.stderr
    assert "C++ left out: CISC_CPP=0" in done.stdout


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository, built where there is no compiler."""
    folder = tmp_path_factory.mktemp("bare")
    for name in ("setup.py", "pyproject.toml", "LICENSE", "README.md", "train.py", "eval.py"):
        shutil.copy(ROOT / name, folder)
    without = shutil.ignore_patterns("*.so", "__pycache__", "results")
    for name in ("cisc_ext", "csrc", "benchmarks", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=without)
    done = build(folder, PATH="/nowhere")
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("cisc_ext:")]
    assert lines == [
        "cisc_ext: C++ left out: no C++ compiler: g++, c++, clang++ not found on PATH (CXX names another);"
        " operators run as the slower reference on the CPU, and on a GPU in Triton"
    ]
    assert not list((folder / "cisc_ext").glob("*.so"))
    return folder


def run_bare(folder: Path, *words: str) -> str:
    """What a command prints there, as on a machine without compilers and interpreter."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(("CISC_", "TRITON_"))}
    done = subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env={**env, "PYTHONPATH": str(folder), "PATH": "/nowhere"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def test_without_a_compiler_info_says_what_is_lost(bare: Path) -> None:
    lines = run_bare(bare, "-m", "cisc_ext", "info").splitlines()
    assert "compiled operators: none (_ops.so was not built, for want of a C++ compiler" in lines[1]
    taken = {line.split(": ")[0].strip(): line.split(": ")[1] for line in lines if "(not cpp:" in line}
    assert set(taken) == set(OPERATORS)
    assert all(choice.startswith("reference (not cpp") for choice in taken.values())


def test_without_a_compiler_training_and_evaluation_run(bare: Path) -> None:
    short = ["--steps", "2", "--intervals", "1", "--batch-size", "2", "--crop-size", "33", "--workers", "0"]
    synthetic.generate(bare / "small", labeled=4, unlabeled=4, val=2, size=(48, 48))
    data = ["--data-root", "small", "--split", "small/splits"]
    assert "operator predict: reference" in run_bare(bare, "train.py", "demo", "--out", "run", *data, *short)
    checkpoint = "run/checkpoints/retrain_all.pt"
    run_bare(bare, "eval.py", checkpoint, "--data-root", "small", "--json", "scores.json")
    assert (bare / "scores.json").is_file()


def test_without_a_compiler_benchmarks_run(bare: Path) -> None:
    step = ["--crop", "33", "--repeats", "1", "--json", "step.json"]
    run_bare(bare, "-m", "benchmarks.step", *step)
    kernels = ["--quick", "--op", "predict", "--workload", "pascal", "--json", "kernels.json"]
    run_bare(bare, "-m", "benchmarks.kernels", *kernels)
    result = json.loads((bare / "kernels.json").read_text())
    assert {row["impl"] for row in result["rows"]} == {"reference"}
    reasons = {one["impl"]: one["reason"] for one in result["left_out"]}
    assert "was not built" in reasons["cpp"] and "interpreter only" in reasons["triton"]


def test_chip_list(setup_py: ModuleType) -> None:
    chips = setup_py.parse_archs(setup_py.CUDA_ARCHS)
    assert chips == ["sm_75", "sm_80", "sm_89", "sm_90a", "compute_90"]
    assert setup_py.parse_archs("8.6+PTX, 12.0") == ["sm_86", "compute_86", "sm_120"]
    flags = setup_py.gencode(Path("op_cuda.cu"), chips)
    assert flags[0] == "-gencode=arch=compute_75,code=sm_75"
    assert flags[-2:] == ["-gencode=arch=compute_90a,code=sm_90a", "-gencode=arch=compute_90,code=compute_90"]
    assert setup_py.chips_of(Path("op_sm80.cu"), chips) == ["sm_80", "sm_89", "compute_90"]
    assert setup_py.chips_of(Path("op_sm90.cu"), chips) == ["sm_90a"]
    assert setup_py.chips_of(Path("op_sm90.cu"), ["sm_80", "sm_90", "compute_90"]) == []


def test_cuda_choice_says_why(setup_py: ModuleType, tmp_path: Path) -> None:
    assert setup_py.decide_cuda({"CISC_CUDA": "0"}).left_out == "CISC_CUDA=0"
    assert setup_py.decide_cuda({"CUDA_HOME": "/nowhere"}).left_out == "nvcc not found"
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 13.0, V13.0.88'\n")
    nvcc.chmod(0o755)
    assert setup_py.decide_cuda({"CUDA_HOME": str(tmp_path)}, tmp_path).left_out == "no CUDA sources"
    with pytest.raises(SystemExit, match=r"^cisc_ext: CISC_CUDA=1, but csrc has no CUDA sources yet$"):
        setup_py.decide_cuda({"CUDA_HOME": str(tmp_path), "CISC_CUDA": "1"}, tmp_path)
    (tmp_path / "new_cuda.cu").touch()
    cuda = setup_py.decide_cuda({"CUDA_HOME": str(tmp_path)}, tmp_path)
    assert (cuda.left_out, [path.name for path in cuda.sources]) == ("", ["new_cuda.cu"])
    (tmp_path / "new_sm90.cu").touch()
    for archs, names in (("8.0", ["new_cuda.cu"]), ("8.0;9.0a", ["new_cuda.cu", "new_sm90.cu"])):
        cuda = setup_py.decide_cuda({"CUDA_HOME": str(tmp_path), "CISC_CUDA_ARCHS": archs}, tmp_path)
        assert [path.name for path in cuda.sources] == names


@compiled
@pytest.mark.skipif(shutil.which("nm") is None, reason="no binutils")
def test_only_the_stable_abi() -> None:
    """Of torch only C functions are used; the library asks for libtorch, or it would not load."""
    assert foreign_symbols(_library.PATH) == []
    needed = " ".join(needed_libraries(_library.PATH))
    assert "libtorch.so" in needed
    assert "libpython" not in needed and "libtorch_python" not in needed


DEVICE_CODE = """
__device__ float select(bool m, float a, float b) { return m ? a : b; }
__device__ bool less(float a, float b) { return a < b; }
__device__ bool at_most(float a, float b) { return a <= b; }
__device__ float quotient(float a, float b) { return a / b; }
#include "pixel_loss.h"
#include "upsample.h"

__global__ void kernel(float* out, int n) {
  const cisc::Tap tap = cisc::bilinear_tap(threadIdx.x, 9, n, false);
  float slope;
  out[0] = cisc::binary_cross_entropy(n > 3, tap.weight_high<float>(), 0.0f, 1.0f, &slope);
  out[1] = slope + cisc::consistency_gap(n > 3, tap.weight_low<float>(), 1.0f);
  out[2] = cisc::cross_entropy_slope(n > 3, out[3], out[4], out[5], 0.0f);
  out[6] = static_cast<float>(cisc::first_output(threadIdx.x, 9, n, true));
}
"""


def test_shared_headers_compile_for_the_device(setup_py: ModuleType, tmp_path: Path) -> None:
    """Positions, weights and losses of a pixel are the same source on the CPU and on a GPU."""
    nvcc = setup_py.find_nvcc(os.environ)
    if nvcc is None:
        pytest.skip("no nvcc")
    source = tmp_path / "shared.cu"
    source.write_text(DEVICE_CODE)
    command = [nvcc, "-std=c++17", "-arch=sm_80", "-I", str(ROOT / "csrc"), "-ptx", str(source)]
    done = subprocess.run([*command, "-o", str(tmp_path / "o.ptx")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "kernel" in (tmp_path / "o.ptx").read_text()


@compiled
def test_built_info() -> None:
    from cisc_ext import _build

    info = _build.info()
    assert info["torch_target"] == "2.10"
    assert "portable" in info["instruction_sets"]
    assert bool(info["cuda_chips"]) != bool(info["left_out"])
    shapes = {"features": (1, 4, 7, 7), "labels": (1, 8, 8), "classes": (1, 65537)}
    with pytest.raises(ValueError, match="at most 65536 classes"):
        _build.plan("masked_average_pool", shapes)


def plain(features: Tensor, labels: Tensor, classes: Tensor) -> Tensor:
    """Upsample, mask, average: features [B,C,h,w], labels [B,H,W], classes [B,S] -> [B,S,C]."""
    upsampled = functional.interpolate(features, labels.shape[-2:], mode="bilinear", align_corners=False)
    mask = (labels[:, None] == classes[:, :, None, None]) & (classes >= 0)[:, :, None, None]
    sums = torch.einsum("bchw,bshw->bsc", upsampled, mask.to(features))
    return sums / (mask.sum((2, 3))[..., None] + EPS)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "channels-last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "every-second": lambda x: torch.stack([x, torch.full_like(x, torch.nan)], -1).flatten(-2)[..., ::2],
}

SHAPES = [  # B, C, h, w, H, W, S, number of classes
    (2, 5, 7, 9, 28, 30, 3, 4),
    (1, 70, 13, 17, 5, 6, 2, 2),
    (2, 3, 33, 33, 129, 129, 4, 21),
    (1, 130, 1, 1, 9, 9, 2, 2),
    (3, 4, 10, 33, 41, 1100, 5, 600),
]


@compiled
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> None:
    b, c, h, w, height, width, s, k = shape
    features = LAYOUTS[layout](torch.randn(b, c, h, w).to(dtype))
    label_dtype = torch.uint8 if k <= 256 else torch.int32
    labels = torch.randint(0, k, (b, width, height)).to(label_dtype).transpose(1, 2)
    classes = torch.randint(-1, min(k, 300), (b, s))
    exact = features.double().requires_grad_()
    expected = plain(exact, labels, classes)
    grad = torch.randn(b, s, c)
    expected.backward(grad.double())
    assert exact.grad is not None

    result = torch.ops.cisc_ext.masked_average_pool(features, labels, classes, EPS)
    assert result.dtype == torch.float32
    lost = (plain(features.float(), labels, classes) - expected).abs().max().item()
    band = 4 * torch.finfo(torch.float32).eps * plain(exact.abs(), labels, classes).max().item()
    assert (result - expected).abs().max().item() <= 2 * lost + band

    gradient = torch.ops.cisc_ext.masked_average_pool_backward(grad, labels, classes, h, w, EPS, dtype)
    assert gradient.dtype == dtype and gradient.is_contiguous()
    rounding = (
        torch.finfo(dtype).eps * exact.grad.abs() + torch.finfo(torch.float32).eps * exact.grad.abs().max()
    )
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    assert ((gradient.double() - exact.grad).abs() <= rounding + tiny).all()


@compiled
@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm")
@pytest.mark.parametrize("debug", ["0", "1"])
def test_no_instruction_set_leaks_into_another(setup_py: ModuleType, debug: str) -> None:
    """A function that the linker may share must not come from a file compiled for a larger set; nor where
    nothing is inlined."""
    builder = setup_py.Builder({**os.environ, "CISC_DEBUG": debug})
    larger = [job for job in builder.host_jobs() if builder.extra_flags(job.inputs[0])]
    if debug == "1":
        larger = [job for job in larger if job.inputs[0].stem.endswith("_avx2")]
    if not larger:
        pytest.skip("no larger instruction sets on this machine")
    for path in builder.make(larger):
        symbols = subprocess.run(["nm", "-C", str(path)], capture_output=True, text=True, check=True).stdout
        shared = re.findall(r"^[0-9a-f]+ [WVu] (.*)$", symbols, re.MULTILINE)
        # How exceptions find their way: a pointer, no code.
        assert set(shared) <= {"DW.ref.__gxx_personality_v0"}, f"{path.name}: {shared}"


@compiled
def test_pieces_of_a_large_grid() -> None:
    """A grid whose weights do not fit the workspace at once is summed piece by piece."""
    classes = torch.arange(4096)[None]
    labels = torch.randint(0, 4096, (1, 90, 130))
    features = torch.randn(1, 3, 45, 65)
    exact = features.double().requires_grad_()
    expected = torch.stack([plain(exact, labels, part)[0] for part in classes.split(512, 1)], 0).reshape(
        1, -1, 3
    )
    result = torch.ops.cisc_ext.masked_average_pool(features, labels, classes, EPS)
    torch.testing.assert_close(result.double(), expected.detach(), rtol=1e-5, atol=1e-6)
    grad = torch.randn(1, 4096, 3)
    expected.backward(grad.double())
    gradient = torch.ops.cisc_ext.masked_average_pool_backward(
        grad, labels, classes, 45, 65, EPS, torch.float32
    )
    torch.testing.assert_close(gradient.double(), exact.grad, rtol=1e-5, atol=1e-6)


@compiled
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
def test_values_that_are_not_finite_stay_in_their_class(layout: str) -> None:
    """Left half class 0, right half class 1; a feature far to the right reaches class 1 alone."""
    features = LAYOUTS[layout](torch.ones(1, 3, 8, 8))
    features[0, 1, 4, 6] = torch.nan
    features[0, 2, 4, 7] = -torch.inf
    labels = torch.zeros(1, 32, 32, dtype=torch.int64)
    labels[:, :, 16:] = 1
    result = torch.ops.cisc_ext.masked_average_pool(features, labels, torch.tensor([[0, 1, -1]]), EPS)[0]
    torch.testing.assert_close(result[0], torch.full((3,), 512 / (512 + EPS)))
    assert result[1, 0].isfinite() and result[1, 1].isnan() and result[1, 2] == -torch.inf
    assert (result[2] == 0).all()

    grad = torch.zeros(1, 3, 1)
    grad[0, 1] = torch.nan
    labels_grad = torch.ops.cisc_ext.masked_average_pool_backward(
        grad, labels, torch.tensor([[0, 1, -1]]), 8, 8, EPS, torch.float32
    )
    assert (labels_grad[..., :3] == 0).all() and labels_grad[..., 5:].isnan().all()


@compiled
def test_same_bits_for_any_number_of_threads() -> None:
    features = torch.randn(2, 37, 40, 41)
    labels = torch.randint(0, 5, (2, 157, 161), dtype=torch.uint8)
    classes = torch.tensor([[0, 3, 4], [1, 1, -1]])
    grad = torch.randn(2, 3, 37)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            forward = torch.ops.cisc_ext.masked_average_pool(features, labels, classes, EPS)
            backward = torch.ops.cisc_ext.masked_average_pool_backward(
                grad, labels, classes, 40, 41, EPS, torch.float32
            )
            results.append((forward, backward))
    finally:
        torch.set_num_threads(threads)
    for forward, backward in results[1:]:
        assert torch.equal(forward, results[0][0]) and torch.equal(backward, results[0][1])
    assert torch.equal(results[0][0][1, 0], results[0][0][1, 1])


@compiled
def test_empty() -> None:
    op, backward = torch.ops.cisc_ext.masked_average_pool, torch.ops.cisc_ext.masked_average_pool_backward
    for b, c, s in [(0, 3, 2), (2, 0, 2), (2, 3, 0)]:
        labels = torch.zeros(b, 8, 8, dtype=torch.int64)
        classes = torch.zeros(b, s, dtype=torch.int64)
        assert op(torch.ones(b, c, 4, 4), labels, classes, EPS).shape == (b, s, c)
        gradient = backward(torch.ones(b, s, c), labels, classes, 4, 4, EPS, torch.float32)
        assert gradient.shape == (b, c, 4, 4) and (gradient == 0).all()
    none = torch.zeros(1, 0, 8, dtype=torch.int64)
    assert (op(torch.ones(1, 3, 4, 4), none, torch.zeros(1, 2, dtype=torch.int64), EPS) == 0).all()


F = torch.ones(2, 3, 4, 4)
L = torch.zeros(2, 8, 8, dtype=torch.int64)
K = torch.zeros(2, 1, dtype=torch.int64)


@compiled
@pytest.mark.parametrize(
    ("features", "labels", "classes", "message"),
    [
        (F[0], L, K, r"features must be \[B,C,h,w\], got rank 3"),
        (F.double(), L, K, "features must be float32, bfloat16 or float16, got Double"),
        (F, L[0], K, r"labels must be \[B,H,W\], got rank 2"),
        (F, L.float(), K, "labels must be uint8, int32 or int64, got Float"),
        (F, L[:1], K, r"labels must be \[B,H,W\] with size 2 in dimension 0, got 1"),
        (F, L, K[0], r"classes must be \[B,S\], got rank 1"),
        (F, L, K.byte(), "classes must be int32 or int64, got Byte"),
        (F, L, K - 2, r"classes must be -1 or a class, got -2 at \[0,0\]"),
        (F[..., :0], L, K, "features must have at least one pixel, got 4 x 0"),
    ],
)
def test_bad_arguments(features: Tensor, labels: Tensor, classes: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=f"^masked_average_pool: {message}$"):
        torch.ops.cisc_ext.masked_average_pool(features, labels, classes, EPS)
