"""`python -m cisc_ext info` and `python -m cisc_ext split`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from cisc_ext import __version__
from cisc_ext.cli import OneLineParser, reporting
from cisc_ext.data import split
from cisc_ext.ops import _implementations, _library
from cisc_ext.ops.registry import choices


def info(_: argparse.Namespace) -> int:
    """What was built, for which chips, and which implementation each operator takes here and why not
    another."""
    print(f"cisc_ext {__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    for line in _library.description():
        print(line)
    print(_implementations.triton_description())
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    for device in devices:
        name = torch.cuda.get_device_name() if device == "cuda" else torch.backends.cpu.get_cpu_capability()
        print(f"{device} ({name}):")
        for line in choices(device):
            print(f"  {line}")
    plans = _library.plans(torch.get_num_threads())
    if plans:
        print("plans of the C++ kernels, with gradients:")
    for line in plans:
        print(f"  {line}")
    if "cuda" not in devices:
        print("cuda: no device here")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; one line and a non-zero status where that cannot be."""
    parser = OneLineParser(prog="python -m cisc_ext", description="Tools around cisc_ext.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=OneLineParser)
    shown = commands.add_parser("info", help=info.__doc__, description=info.__doc__)
    shown.set_defaults(run=info)
    text = "make labeled and unlabeled lists for a data set"
    made = commands.add_parser("split", help=text, description=text)
    split.add_arguments(made)
    made.set_defaults(run=split.main)
    flags = parser.parse_args(arguments)
    return reporting("python -m cisc_ext", lambda: flags.run(flags))


if __name__ == "__main__":
    sys.exit(main())
