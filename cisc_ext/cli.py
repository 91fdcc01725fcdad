"""What the command lines share: errors in one line."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from typing import NoReturn


class OneLineParser(argparse.ArgumentParser):
    """An `ArgumentParser` that ends with one line instead of the usage."""

    def error(self, message: str) -> NoReturn:
        """End the program with the message alone."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def reporting(program: str, work: Callable[[], int | None]) -> int:
    """Do `work` and give its exit status; bad input and failing files end with one line and status 1.

    Anything else is a fault of the program, and keeps its traceback.
    """
    try:
        status = work() or 0
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # Whoever read the output has enough (`| head`); nothing may be flushed there on leaving.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, FloatingPointError) as error:
        # A worker process of the loader sends its traceback along; the last line says what was wrong.
        lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        text = lines[-1].removeprefix(f"{type(error).__name__}: ") if len(lines) > 1 else lines[0]
        print(f"{program}: error: {text}", file=sys.stderr)
        return 1
