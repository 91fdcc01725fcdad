"""Weights from files: ImageNet backbones, published ST++/CISC-R models, checkpoints of our own.

Files are read with `weights_only=True`: a checkpoint cannot run code.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from cisc_ext.models.heads import SegmentationModel

# Every name ends in the first digits of the file's SHA-256.
IMAGENET_URLS = {
    "resnet18": "https://download.pytorch.org/models/resnet18-f37072fd.pth",
    "resnet34": "https://download.pytorch.org/models/resnet34-b627a593.pth",
    "resnet50": "https://download.pytorch.org/models/resnet50-0676ba61.pth",
    "resnet101": "https://download.pytorch.org/models/resnet101-63fe2227.pth",
    "xception65": "https://github.com/rwightman/pytorch-image-models/releases/download/v0.1-weights/"
    "tf_xception_65-c9ae96e8.pth",
}
WRAPPER_PREFIXES = ("module.", "_orig_mod.")  # put in front by DataParallel, DDP and torch.compile
NAMED_KEYS = 3
# What torch.load raises for a file that is empty, cut short, of another format, or holds more than weights.
UNREADABLE = (
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    ValueError,
    LookupError,
    AttributeError,
    TypeError,
)


def load_pretrained(model: SegmentationModel, backbone_name: str, source: str) -> str:
    """Fill `model` from `source` and say in one line what was done.

    source  "none": the fresh weights stay; "imagenet": the backbone's ImageNet weights, downloaded once into
            torch's cache and hash checked; otherwise a file, as for `load_weights`

    Raises `ConnectionError` naming address and destination if a download fails, and as `load_weights` does.
    """
    if source == "none":
        return "fresh weights"
    if source == "imagenet":
        path = imagenet_file(backbone_name)
        load_weights(model, path)
        return f"ImageNet weights of {backbone_name} from {path}"
    part = load_weights(model, source)
    return f"weights of the {part} from {source}"


def load_weights(model: SegmentationModel, path: Path | str) -> str:
    """Load a whole model or a backbone alone from `path` into `model`; return which, "model" or "backbone".

    A file with keys under `backbone.` holds a whole model. Otherwise it holds a backbone, whose ImageNet
    classifier (`fc.*` of a ResNet, `head.*` of Xception-65) is left out. Batch norms' counters may be absent.

    Raises `FileNotFoundError`; `ValueError` naming the file and the keys that are missing, unexpected or of
    another shape, and then nothing has been loaded.
    """
    state = state_dict_from(path)
    if any(key.startswith("backbone.") for key in state):
        part, target = "model", cast(nn.Module, model)
    else:
        prefix = model.backbone.classifier_prefix
        state = {key: value for key, value in state.items() if not key.startswith(prefix)}
        part, target = "backbone", model.backbone
    expected = target.state_dict()
    problem = mismatch(expected, state)
    if problem:
        raise ValueError(f"{path}: does not fit the {part}: {problem}")
    target.load_state_dict({**expected, **state})
    return part


def read_checkpoint(path: Path | str) -> object:
    """What `torch.save` wrote to a file, on the CPU.

    Raises `FileNotFoundError`, or `ValueError` naming a file that is no checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: expected a checkpoint file, found {'a folder' if path.is_dir() else 'nothing'}"
        )
    try:
        content: object = torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        raise ValueError(
            f"{path}: not a checkpoint: expected tensors and plain values as torch.save writes them, got a "
            f"file that is damaged, of another format or holds other objects ({type(error).__name__})"
        ) from error
    return content


def state_dict_from(path: Path | str) -> dict[str, Tensor]:
    """The weights in a checkpoint, on the CPU: its own dictionary, or the one under "model" or "state_dict".

    Prefixes that wrappers put in front of every key ("module.", "_orig_mod.") are taken off.

    Raises `FileNotFoundError`, or `ValueError` naming a file that is no checkpoint or holds no weights.
    """
    content = read_checkpoint(path)
    for name in ("model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"{path}: expected a dictionary of weights, got {describe(content)}")
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise ValueError(
                f"{path}: expected a tensor under every name, got {describe(value)} under {key!r}"
            )
    state: dict[str, Tensor] = dict(content)
    while prefix := next((p for p in WRAPPER_PREFIXES if all(key.startswith(p) for key in state)), ""):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def describe(value: object) -> str:
    """A value's type in an error message."""
    return "an empty dictionary" if isinstance(value, Mapping) and not value else type(value).__name__


def mismatch(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str:
    """One line on what keeps weights `found` from being loaded in place of `expected`; empty if they fit."""
    missing = [key for key in expected if key not in found and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in found if key not in expected]
    shapes = [
        f"{key} {list(found[key].shape)} instead of {list(expected[key].shape)}"
        for key in expected
        if key in found and found[key].shape != expected[key].shape
    ]
    kinds = (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
    return "; ".join(f"{len(keys)} {kind}: {first_few(keys)}" for kind, keys in kinds if keys)


def first_few(keys: list[str]) -> str:
    """The first keys, and a sign that there are more."""
    return ", ".join(keys[:NAMED_KEYS]) + (", ..." if len(keys) > NAMED_KEYS else "")


def imagenet_file(backbone_name: str) -> Path:
    """The backbone's ImageNet checkpoint in torch's cache, downloaded if absent; its hash is always checked.

    Raises `ConnectionError` if it cannot be downloaded, `ValueError` if the file is damaged or the name
    unknown.
    """
    if backbone_name not in IMAGENET_URLS:
        raise ValueError(f"backbone: expected one of {', '.join(IMAGENET_URLS)}, got {backbone_name!r}")
    url = IMAGENET_URLS[backbone_name]
    name = url.rsplit("/", 1)[-1]
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    digits = re.search(r"-([0-9a-f]{8,})\.", name)
    if digits is None:
        raise ValueError(f"{url}: expected an address whose file name ends in the file's hash")
    if not path.is_file():
        os.makedirs(path.parent, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), digits[1], progress=sys.stderr.isatty())
        except (OSError, RuntimeError) as error:
            raise ConnectionError(f"{url}: download failed ({error}); put that file at {path}") from error
    digest = sha256(path)
    if not digest.startswith(digits[1]):
        raise ValueError(
            f"{path}: damaged, expected a SHA-256 that begins with {digits[1]}, got {digest[:8]}: delete it"
        )
    return path


def sha256(path: Path) -> str:
    """The file's SHA-256 in hexadecimal, read 1 MiB at a time."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
