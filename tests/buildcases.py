"""setup.py as a module, and what a library that it builds asks for."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]


def load_setup() -> ModuleType:
    """setup.py as a module."""
    spec = importlib.util.spec_from_file_location("cisc_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def foreign_symbols(library: Path) -> list[str]:
    """What it asks of torch's C++ or of Python, which other versions of these may lack."""
    names = subprocess.run(["nm", "-D", "-C", "--undefined-only", library], capture_output=True, text=True)
    assert names.returncode == 0
    symbols = [line.split(maxsplit=1)[1] for line in names.stdout.splitlines() if line.split()[0] == "U"]
    assert any(symbol.startswith("aoti_torch_") for symbol in symbols)
    return [symbol for symbol in symbols if re.search(r"\b(c10|at|torch)::|\bPy[A-Z_]|^_?Py", symbol)]


def needed_libraries(library: Path) -> list[str]:
    """What the loader looks for."""
    done = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True)
    return re.findall(r"\(NEEDED\).*\[(.*)\]", done.stdout)
