"""Builds csrc into cisc_ext/_ops.so (operators, LibTorch stable ABI) and cisc_ext/_build (pybind11).

Environment: CISC_CPP=0|1 (0: pure Python, nothing compiled; default: where a C++ compiler is found),
CISC_CUDA=0|1 (default: where nvcc is found; 1 needs C++), CISC_CUDA_ARCHS (such as "8.0;9.0a;9.0+PTX"),
CISC_DEBUG=1 (-O0 -g), CXX, CUDA_HOME.
CISC_SANITIZE=1 (AddressSanitizer and UBSan, for tests/fuzz.py) and CISC_SIMT=1 (the CUDA kernels as C++ that
runs on the CPU, for tests: CISC_OPS=FOLDER/cisc_ext/_ops.so) build into a folder of their own, never in
place: python setup.py build --build-lib FOLDER.
Objects are kept in build/objects under the hash of all that goes into them.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
SIMT = ROOT / "tests" / "simt"
OBJECTS = ROOT / "build" / "objects"

COMPILERS = ("g++", "c++", "clang++")
WITHOUT = "operators run as the slower reference on the CPU, and on a GPU in Triton"
TORCH_TARGET = "0x020a000000000000"  # the oldest torch that the operators load on: 2.10
CUDA_ARCHS = "7.5;8.0;8.9;9.0a;9.0+PTX"
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"]
AVX512 += ["-Wno-maybe-uninitialized"]  # the compiler's own headers start from undefined vectors
# Flags by the ending of a source's name; such a file's code runs only where the CPU has them.
INSTRUCTION_SETS = {
    "_avx2": ["-mavx2", "-mfma", "-mf16c"],
    "_avx512": AVX512,
    "_avx512_bf16": [*AVX512, "-mavx512bf16"],
}
# Any finding ends the process; float-cast-overflow (NaN to int) is the one such check not in "undefined".
SANITIZE = ["-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all"]
# GCC warns of what its own intrinsics leave undefined.
SANITIZE += ["-fno-omit-frame-pointer", "-O1", "-g", "-Wno-maybe-uninitialized"]


def stop(message: str) -> NoReturn:
    """End the build with one line."""
    sys.exit(f"cisc_ext: {message}")


def flag(env: Mapping[str, str], name: str) -> bool | None:
    """Value of a 0|1 variable, None where it is unset or empty."""
    value = env.get(name, "")
    if value not in ("", "0", "1"):
        stop(f"{name} must be 0 or 1, got {value!r}")
    return value == "1" if value else None


def parse_archs(text: str) -> list[str]:
    """Chip names of a list such as "8.0;9.0a;9.0+PTX".

    X.Y+PTX adds PTX of that chip, and its code unless X.Ya, which runs on the same chip, is listed too.
    """
    entries = [entry for entry in re.split(r"[;, ]+", text) if entry]
    if not entries:
        stop("CISC_CUDA_ARCHS must name at least one chip, got an empty list")
    parsed: list[tuple[int, str, bool]] = []
    for entry in entries:
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry)
        if match is None:
            stop(f"CISC_CUDA_ARCHS must be a list such as {CUDA_ARCHS!r}, got {entry!r}")
        number = int(match[1]) * 10 + int(match[2])
        if number < 75:
            stop(f"CISC_CUDA_ARCHS: the oldest chip that has kernels is 7.5, got {entry!r}")
        parsed.append((number, match[3], match[4] is not None))
    special = {number for number, suffix, _ in parsed if suffix}
    chips: list[str] = []
    for number, suffix, ptx in parsed:
        if suffix or not (ptx and number in special):
            chips.append(f"sm_{number}{suffix}")
        if ptx:
            chips.append(f"compute_{number}{suffix}")
    return list(dict.fromkeys(chips))


def run(command: list[str]) -> str:
    """Standard output and error of a command that must succeed."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        stop(f"{shlex.join(command)} failed: {(done.stdout.strip().splitlines() or ['no output'])[-1]}")
    return done.stdout


def find_cxx(env: Mapping[str, str]) -> list[str] | None:
    """Command of the C++ compiler: CXX, which must be there, else the first found of g++, c++, clang++."""
    asked = shlex.split(env.get("CXX", ""))
    for name in asked[:1] or COMPILERS:
        found = shutil.which(name, path=env.get("PATH", ""))
        if found:
            return [found, *asked[1:]]
    if asked:
        stop(f"no C++ compiler: CXX names {asked[0]}, which was not found (CISC_CPP=0 builds without)")
    return None


def find_nvcc(env: Mapping[str, str]) -> str | None:
    """Path of nvcc: under CUDA_HOME, else on PATH, else in the usual folder."""
    if env.get("CUDA_HOME"):
        return shutil.which("nvcc", path=str(Path(env["CUDA_HOME"]) / "bin"))
    return shutil.which("nvcc", path=env.get("PATH", "")) or shutil.which("nvcc", path="/usr/local/cuda/bin")


def chips_of(source: Path, chips: Sequence[str]) -> list[str]:
    """The chips that a CUDA source is for: all, but *_sm80.cu is for those with asynchronous copies, and
    *_sm90.cu for Hopper's own instructions."""
    if source.stem.endswith("_sm90"):
        return [chip for chip in chips if chip == "sm_90a"]
    if source.stem.endswith("_sm80"):
        return [chip for chip in chips if chip not in ("sm_75", "compute_75", "sm_90a")]
    return list(chips)


def gencode(source: Path, chips: Sequence[str]) -> list[str]:
    """nvcc's flags for them. Where there would be no PTX, it comes along: launch bounds are read from it."""
    listed = chips_of(source, chips)
    if source.stem.endswith("_sm90"):
        listed += ["compute_90a"]
    return [f"-gencode=arch={chip.replace('sm_', 'compute_')},code={chip}" for chip in listed]


@dataclass(frozen=True)
class Cuda:
    """What to do about CUDA: compile `sources` with `nvcc`, or nothing because of `left_out`."""

    nvcc: str = ""
    version: str = ""
    chips: tuple[str, ...] = ()
    sources: tuple[Path, ...] = ()
    left_out: str = ""


def decide_cuda(env: Mapping[str, str], csrc: Path = CSRC) -> Cuda:
    """Choose once, with the reason."""
    asked = flag(env, "CISC_CUDA")
    chips = parse_archs(env.get("CISC_CUDA_ARCHS") or CUDA_ARCHS)
    if asked is False:
        return Cuda(left_out="CISC_CUDA=0")
    nvcc = find_nvcc(env)
    if nvcc is None:
        if asked:
            stop("CISC_CUDA=1, but nvcc was found neither in CUDA_HOME/bin nor on PATH")
        return Cuda(left_out="nvcc not found")
    sources = tuple(sorted(csrc.glob("*.cu")))
    if not sources:
        if asked:
            stop("CISC_CUDA=1, but csrc has no CUDA sources yet")
        return Cuda(left_out="no CUDA sources")
    version = next(line for line in run([nvcc, "--version"]).splitlines() if "release" in line)
    return Cuda(nvcc, version, tuple(chips), tuple(source for source in sources if chips_of(source, chips)))


@cache
def torch_folder() -> tuple[Path, str]:
    """Folder and version of the torch to build against, without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        stop("torch is not installed here: install torch>=2.10, and build with --no-build-isolation")
    version = importlib.metadata.version("torch")
    if tuple(int(part) for part in version.split(".")[:2]) < (2, 10):
        stop(f"torch must be 2.10 or newer, got {version}")
    return Path(spec.origin).parent, version


@cache
def closure(source: Path) -> tuple[Path, ...]:
    """A source and the csrc headers that it includes, directly or not, in the order met."""
    found = {source: None}
    pending = [source]
    while pending:
        here = pending.pop()
        for name in re.findall(r'^\s*#\s*include\s+"([^"]+)"', here.read_text(), re.MULTILINE):
            header = here.parent / name
            if header.is_file() and header not in found:
                found[header] = None
                pending.append(header)
    return tuple(found)


@dataclass(frozen=True)
class Job:
    """One command that makes one file of build/objects; $in and $out stand for the files."""

    command: tuple[str, ...]
    inputs: tuple[Path, ...]
    suffix: str
    identity: str  # what else the result depends on: compiler and torch versions

    def output(self) -> Path:
        """Path under the hash of command, sources with their headers, and versions."""
        digest = hashlib.sha256(repr((self.command, self.identity)).encode())
        for path in self.inputs:
            if path.parent == OBJECTS:  # already named by its content
                digest.update(path.name.encode())
                continue
            for file in closure(path):
                digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
        return OBJECTS / f"{self.inputs[0].stem.split('.')[0]}.{digest.hexdigest()[:24]}{self.suffix}"

    def line(self) -> str:
        """Shell command; the file appears whole or not at all."""
        output = self.output()
        words = {"$in": shlex.join(str(path) for path in self.inputs), "$out": shlex.quote(f"{output}.part")}
        command = " ".join(words.get(word) or shlex.quote(word) for word in self.command)
        return f"{command} && mv {shlex.quote(f'{output}.part')} {shlex.quote(str(output))}"


class Builder:
    """Commands of both libraries on this machine."""

    def __init__(self, env: Mapping[str, str]) -> None:
        self.cuda = decide_cuda(env)
        self.debug = bool(flag(env, "CISC_DEBUG"))
        self.sanitize = SANITIZE if flag(env, "CISC_SANITIZE") else []
        self.simt = bool(flag(env, "CISC_SIMT"))
        self.env = env
        self.cxx = find_cxx(env) or stop(f"no C++ compiler: {', '.join(COMPILERS)} not found on PATH")
        # What is left without a launcher (ccache g++) and flags (g++ -m64).
        self.compiler_path = [word for word in self.cxx if not word.startswith("-")][-1]
        self.compiler = run([*self.cxx, "--version"]).splitlines()[0]
        self.torch, self.torch_version = torch_folder()
        self.optimize = self.sanitize or (["-O0", "-g"] if self.debug else ["-O3", "-DNDEBUG"])
        self.sources = sorted(path for path in CSRC.glob("*.cpp") if path.name != "module.cpp")
        x86 = os.uname().machine == "x86_64"
        if not x86:
            self.sources = [path for path in self.sources if not self.extra_flags(path)]
        self.compiled = 0
        self.reused = 0

    @staticmethod
    def extra_flags(source: Path) -> list[str]:
        return next((f for end, f in INSTRUCTION_SETS.items() if source.stem.endswith(end)), [])

    @property
    def flags(self) -> list[str]:
        # These change no value: no trap handler and no errno is ever looked at, so selections vectorise; a
        # product and a sum are fused only where the code says so, alike in every kernel.
        arithmetic = ["-fno-trapping-math", "-fno-math-errno", "-ffp-contract=off"]
        return ["-std=c++17", *self.optimize, *arithmetic, "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]

    def make(self, jobs: list[Job]) -> list[Path]:
        """Run the jobs whose outputs are not there yet, in parallel; one build at a time."""
        outputs = [job.output() for job in jobs]
        OBJECTS.mkdir(parents=True, exist_ok=True)
        with (OBJECTS / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            missing = {output: job for output, job in zip(outputs, jobs, strict=True) if not output.exists()}
            if missing:
                self.run_ninja(missing)
        self.compiled += len(missing)
        self.reused += len(set(outputs)) - len(missing)
        return outputs

    def run_ninja(self, missing: Mapping[Path, Job]) -> None:
        """Make these files, or end with what the compiler has said."""
        ninja = shutil.which("ninja", path=f"{Path(sys.executable).parent}:{self.env.get('PATH', '')}")
        if ninja is None:
            stop("ninja was not found: pip install ninja")
        text = ["rule run", "  command = $line", "  description = $out"]
        for output, job in missing.items():
            name = str(output).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")
            text += [f"build {name}: run", f"  line = {job.line().replace('$', '$$')}"]
        plan = OBJECTS / f"{os.getpid()}.ninja"
        plan.write_text("\n".join(text) + "\n")
        try:
            if subprocess.run([ninja, "-f", str(plan)], cwd=OBJECTS).returncode:
                stop("compiling failed: see the first error above")
        finally:
            plan.unlink()

    @property
    def identity(self) -> str:
        return f"{self.compiler} torch {self.torch_version}"

    @property
    def against_torch(self) -> list[str]:
        stable = ["-DTORCH_STABLE_ONLY", f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"]
        return [*stable, "-isystem", str(self.torch / "include")]

    def host_jobs(self) -> list[Job]:
        """The objects of the operator library that the C++ compiler makes."""
        jobs = []
        for source in self.sources:
            command = [*self.cxx, *self.flags, *self.extra_flags(source), *self.against_torch]
            jobs.append(Job((*command, "-c", "$in", "-o", "$out"), (source,), ".o", self.identity))
        return jobs

    def simt_jobs(self) -> list[Job]:
        """The objects of the CUDA sources as C++."""
        flags = [*self.flags, *self.against_torch, "-DCISC_SIMT", "-Wno-unknown-pragmas", "-Wno-psabi"]
        flags += ["-I", str(CSRC), "-I", str(SIMT)]
        # longjmp goes from one stack to another
        flags += ["-U_FORTIFY_SOURCE", "-mf16c"] if os.uname().machine == "x86_64" else ["-U_FORTIFY_SOURCE"]
        command = (*self.cxx, *flags, "-x", "c++", "-c", "$in", "-o", "$out")
        headers = " ".join(hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(SIMT.iterdir()))
        sources = [*sorted(CSRC.glob("*.cu")), *sorted(SIMT.glob("*.cpp"))]
        return [Job(command, (source,), ".o", f"{self.identity} {headers}") for source in sources]

    def ops(self) -> Path:
        """The operator library; needs no Python and runs on torch 2.10 and newer."""
        jobs = self.simt_jobs() if self.simt else self.host_jobs()
        link: list[str] = []
        if self.cuda.sources and not self.simt:
            nvcc = [self.cuda.nvcc, "-std=c++17", *(["-O0", "-g"] if self.debug else ["-O3", "-lineinfo"])]
            # As in C++, a product and a sum are fused only where the code says so.
            nvcc += ["-DUSE_CUDA", "-fmad=false", "--expt-relaxed-constexpr", "--threads", "0"]
            nvcc += ["-Xfatbin=-compress-all"]
            nvcc += ["-ccbin", self.compiler_path]
            nvcc += [f'-DCISC_CUDA_CHIPS="{" ".join(self.cuda.chips)}"']
            nvcc += ["-Xcompiler=-fPIC", "-Xcompiler=-fvisibility=hidden", *self.against_torch]
            # Whether there are sources for the tensor cores of these chips.
            for chip in ("sm80", "sm90"):
                if any(source.stem.endswith(f"_{chip}") for source in self.cuda.sources):
                    nvcc += [f"-DCISC_HAS_{chip.upper()}"]
            for source in self.cuda.sources:
                command = [*nvcc, *gencode(source, self.cuda.chips), "-c", "$in", "-o", "$out"]
                jobs.append(Job(tuple(command), (source,), ".o", f"{self.identity} {self.cuda.version}"))
            link = [f"-L{folder}" for folder in cuda_libraries(self.cuda.nvcc)]
            link += ["-lcudart_static", "-lrt", "-lpthread", "-ldl"]
        objects = self.make(jobs)
        command = [*self.cxx, *self.sanitize, "-shared", "$in", "-o", "$out", f"-L{self.torch / 'lib'}"]
        # libtorch registers the operators: without its NEEDED entry the library would not load.
        command += ["-Wl,-z,defs", "-Wl,--no-as-needed", "-ltorch", "-Wl,--as-needed", "-ltorch_cpu", *link]
        return self.make([Job(tuple(command), tuple(objects), ".so", self.identity)])[0]

    def module(self) -> Path:
        """The pybind11 module, which holds what was built."""
        python = sysconfig.get_path("include")
        if not (Path(python) / "Python.h").is_file():
            stop(
                f"Python.h not found in {python}: install the headers of this Python"
                " (CISC_CPP=0 builds without)"
            )
        pybind11 = importlib.util.find_spec("pybind11")
        if pybind11 is None or pybind11.origin is None:
            stop("pybind11 was not found: pip install pybind11")
        sets = ["portable"]
        sets += sorted({end[1:] for s in self.sources for end in INSTRUCTION_SETS if s.stem.endswith(end)})
        facts = {
            "COMPILER": self.compiler,
            "FLAGS": " ".join(self.flags),
            "INSTRUCTION_SETS": " ".join(sets),
            "TORCH": self.torch_version,
            "TORCH_TARGET": f"{int(TORCH_TARGET, 16) >> 56}.{int(TORCH_TARGET, 16) >> 48 & 255}",
            "CUDA_COMPILER": self.cuda.version,
            "CUDA_CHIPS": " ".join(self.cuda.chips),
            "LEFT_OUT": f"CUDA: {self.cuda.left_out}" if self.cuda.left_out else "",
        }
        defines = [f'-DCISC_{name}="{value}"' for name, value in facts.items()]
        include = ["-isystem", python, "-isystem", str(Path(pybind11.origin).parent / "include")]
        command = [*self.cxx, *self.flags, *defines, *include, "-c", "$in", "-o", "$out"]
        identity = f"{self.compiler} pybind11 {importlib.metadata.version('pybind11')}"
        objects = self.make([Job(tuple(command), (CSRC / "module.cpp",), ".o", identity)])
        link = [*self.cxx, *self.sanitize, "-shared", "$in", "-o", "$out"]
        return self.make([Job(tuple(link), tuple(objects), ".so", identity)])[0]


def cuda_libraries(nvcc: str) -> list[str]:
    """Folders of the CUDA runtime, as nvcc itself links it."""
    listed = re.search(r"^#\$ LIBRARIES=(.*)$", run([nvcc, "--dryrun", "-x", "cu", os.devnull]), re.MULTILINE)
    folders = [word[2:] for word in shlex.split(listed[1]) if word.startswith("-L")] if listed else []
    if not any((Path(folder) / "libcudart_static.a").is_file() for folder in folders):
        stop(f"libcudart_static.a was not found in the folders that {nvcc} names")
    return folders


class Build(build):
    """Starts without what an earlier build left: it would end in the wheel."""

    def run(self) -> None:
        """Empty the build's own folder, then build; a folder given by name is left alone."""
        if Path(self.build_base).resolve() in Path(self.build_lib).resolve().parents:
            shutil.rmtree(Path(self.build_lib) / "cisc_ext", ignore_errors=True)
        super().run()


class BuildPy(build_py):
    """Without C++ in place, an earlier build's libraries go: they would be loaded."""

    def run(self) -> None:
        """Copy or link the Python files."""
        super().run()
        if self.editable_mode and not self.distribution.ext_modules:
            for library in (ROOT / "cisc_ext").glob("*.so"):
                library.unlink()


class BuildExt(build_ext):
    """Builds by ninja instead of setuptools' own compiler classes."""

    builder: Builder

    def get_ext_filename(self, fullname: str) -> str:
        """Name the operator library without a Python tag: it is of no Python."""
        filename = super().get_ext_filename(fullname)
        return str(Path(filename).with_name("_ops.so")) if fullname.split(".")[-1] == "_ops" else filename

    def run(self) -> None:
        """Refuse to leave in place what Python alone cannot load, then build."""
        for name in ("CISC_SANITIZE", "CISC_SIMT"):
            if flag(os.environ, name) and (self.inplace or self.editable_mode):
                stop(f"{name}=1 builds into a folder of its own: python setup.py build --build-lib FOLDER")
        super().run()

    def build_extensions(self) -> None:
        """Build both libraries, and say what is in and what was left out."""
        self.builder = Builder(os.environ)
        super().build_extensions()
        cuda = self.builder.cuda
        print(f"cisc_ext: {self.builder.compiled} compiled or linked, {self.builder.reused} reused")
        if cuda.left_out:
            print(f"cisc_ext: CUDA left out: {cuda.left_out}")
        else:
            print(f"cisc_ext: CUDA for {' '.join(cuda.chips)} by {cuda.version}")

    def build_extension(self, ext: Extension) -> None:
        """Copy the library to where setuptools expects it."""
        made = self.builder.ops() if ext.name.endswith("._ops") else self.builder.module()
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        self.copy_file(made, target)

    def copy_file(self, infile: Any, outfile: Any, *args: object, **options: object) -> tuple[str, bool]:
        """Replace the old file at once: setuptools would delete it first, under a build that runs beside."""
        beside = f"{outfile}.{os.getpid()}.part"
        shutil.copy2(infile, beside)
        os.replace(beside, outfile)
        return str(outfile), True


def extensions(env: Mapping[str, str]) -> list[Extension]:
    """Both libraries, or none for CISC_CPP=0 or where there is no compiler; CISC_CPP=1 and CISC_CUDA=1
    insist on them."""
    asked = flag(env, "CISC_CPP")
    if asked is False:
        print("cisc_ext: C++ left out: CISC_CPP=0")
        return []
    if find_cxx(env) is None:
        missing = f"no C++ compiler: {', '.join(COMPILERS)} not found on PATH (CXX names another)"
        for name in ("CISC_CPP", "CISC_CUDA", "CISC_SANITIZE", "CISC_SIMT"):
            if flag(env, name):
                stop(f"{name}=1, but {missing}")
        print(f"cisc_ext: C++ left out: {missing}; {WITHOUT}")
        return []
    names = sorted(path.relative_to(ROOT).as_posix() for path in CSRC.iterdir())
    sources = [name for name in names if name.endswith((".cpp", ".cu")) and name != "csrc/module.cpp"]
    headers = [name for name in names if name.endswith((".h", ".cuh"))]
    return [
        Extension("cisc_ext._ops", sources, depends=headers),
        Extension("cisc_ext._build", ["csrc/module.cpp"], depends=headers),
    ]


if __name__ == "__main__":
    setup(
        ext_modules=extensions(os.environ),
        cmdclass={"build": Build, "build_ext": BuildExt, "build_py": BuildPy},
    )
