"""The operators: each module here without an underscore holds the function of its name.

from cisc_ext import ops

prototypes = ops.masked_average_pool(guide, guide_labels, classes)
similarity = ops.prototype_similarity(query, prototypes)
loss = ops.rectified_cross_entropy(logits, labels, similarity, classes)
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

__all__ = []

for _module in pkgutil.iter_modules(__path__):
    if not _module.name.startswith("_") and not _module.name.endswith("_triton"):
        _loaded = importlib.import_module(f"{__name__}.{_module.name}")
        if hasattr(_loaded, _module.name):
            globals()[_module.name] = getattr(_loaded, _module.name)
            __all__.append(_module.name)


def __getattr__(name: str) -> Any:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
