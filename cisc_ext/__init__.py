"""Semi-supervised semantic segmentation with cross-image semantic consistency (CISC-R)."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

__all__ = ["__version__"]

try:
    __version__ = version("cisc_ext")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0+source"
