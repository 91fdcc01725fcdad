"""Settings: frozen dataclasses whose fields are the flags of the command line, and the presets."""

from __future__ import annotations

import argparse
import dataclasses
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cisc_ext.cli import OneLineParser
from cisc_ext.data.datasets import DATASETS
from cisc_ext.models import BACKBONES, MODELS

METHODS = ("cisc-r", "stpp", "sup")
SIMILARITIES = ("prototype", "max", "topk", "softmax")
SHARED_CLASSES = ("one", "all", "own")
PRECISIONS = ("auto", "float32", "bfloat16")
_CISC_R_ONLY = (
    "similarity",
    "shared_classes",
    "topk",
    "temperature",
    "consistency_weight",
    "guide_share",
    "ranking",
    "weak_view",
)


def _flag(default: Any, text: str, **metadata: Any) -> Any:
    return dataclasses.field(default=default, metadata={"help": text, **metadata})


@dataclass(frozen=True)
class DataConfig:
    """Which images, and how they are cropped."""

    data_root: str | None = _flag(None, "folder that the paths of the lists are relative to")
    split: str | None = _flag(None, "folder with labeled.txt and unlabeled.txt")
    val: str | None = _flag(
        None, "list of validation images; by default val.txt in --split or up to two above"
    )
    load_size: tuple[int, int] | None = _flag(
        None, "width and height in pixels to which images and labels are brought when they are read"
    )
    base_size: int = _flag(0, "long side in pixels around which training images are resized")
    crop_size: int = _flag(0, "side in pixels of the square training crops")
    class_area: float = _flag(
        0.03, "part of an image's or crop's pixels that a class must cover to count in it"
    )
    workers: int = _flag(2, "processes that read and augment; 0 does it in the main one")


@dataclass(frozen=True)
class ModelConfig:
    """Which network."""

    model: str = _flag("deeplabv3plus", "network", choices=MODELS)
    backbone: str = _flag("resnet101", "backbone", choices=BACKBONES)
    output_stride: int | None = _flag(
        None, "stride in pixels of the backbone's last map; by default the backbone's"
    )
    pretrained: str = _flag("imagenet", "initial weights: imagenet, a file, or none")


@dataclass(frozen=True)
class OptimConfig:
    """How a network is trained; the same in stages 1, 4 and 6."""

    batch_size: int = _flag(
        32, "images of a batch: pairs in stage 1, labeled and as many unlabeled in stages 4 and 6"
    )
    epochs: int = _flag(80, "passes over the stage's images")
    steps: int | None = _flag(None, "optimizer steps of each training instead of --epochs")
    lr: float = _flag(0.001, "initial learning rate of the backbone")
    head_lr_multiplier: float | None = _flag(
        None, "learning rate of the head over the backbone's; by default the model's"
    )
    momentum: float = _flag(0.9, "momentum of SGD")
    weight_decay: float = _flag(1e-4, "weight decay of SGD, per step")
    poly_power: float = _flag(0.9, "exponent of the polynomial decay of the learning rate")
    intervals: int | None = _flag(
        None,
        "equal parts of a training, each ended by a validation and a checkpoint; "
        "by default one per pass of --epochs, or 10 with --steps",
    )


@dataclass(frozen=True)
class MethodConfig:
    """The method; its defaults are the paper's."""

    method: str = _flag("cisc-r", "cisc-r, stpp (ST++) or sup (labeled images only)", choices=METHODS)
    similarity: str = _flag(
        "prototype", "CISC map of stages 4 and 6: against prototypes, or between pixels", choices=SIMILARITIES
    )
    shared_classes: str = _flag(
        "one",
        "classes compared: one at random, all that are shared, or each pixel's own",
        choices=SHARED_CLASSES,
    )
    topk: int = _flag(8, "guide pixels averaged by --similarity topk")
    temperature: float = _flag(0.07, "temperature of --similarity softmax, in cosines")
    consistency_weight: float = _flag(1.0, "weight of the consistency losses of stage 1")
    guide_share: float = _flag(0.5, "part of each class's labeled images kept as guides")
    reliable_share: float = _flag(0.5, "part of the unlabeled images that stage 4 uses")
    ranking: str = _flag(
        "sum", "over an image's classes, when unlabeled images are ranked", choices=("sum", "mean")
    )
    weak_view: bool = _flag(False, "the teacher sees the crop before colour augmentation")
    tta_scales: tuple[float, ...] = _flag(
        (0.5, 0.75, 1.0, 1.5, 2.0), "scales averaged, with their mirror images, for pseudo labels"
    )
    ohem_threshold: float | None = _flag(
        None, "keep only labeled pixels less sure than this probability (OHEM)"
    )
    ohem_min_kept: int = _flag(100000, "pixels that OHEM keeps at least, per batch")


@dataclass(frozen=True)
class RunConfig:
    """Where and on what."""

    out: str | None = _flag(None, "run folder; by default runs/PRESET")
    resume: bool = _flag(False, "go on with the run in --out after its last checkpoint")
    seed: int = _flag(0, "seed of weights, order and augmentation")
    device: str = _flag("auto", "auto, cpu, cuda or cuda:N")
    precision: str = _flag(
        "auto", "of the network; auto takes bfloat16 where the device has it", choices=PRECISIONS
    )
    threads: int | None = _flag(None, "threads of the CPU; by default torch's choice")


@dataclass(frozen=True)
class Config:
    """All settings of a run."""

    preset: str
    data: DataConfig
    model: ModelConfig
    optim: OptimConfig
    method: MethodConfig
    run: RunConfig

    def __post_init__(self) -> None:
        least = [
            ("base_size", self.data.base_size, 1),
            ("crop_size", self.data.crop_size, 1),
            ("workers", self.data.workers, 0),
            ("batch_size", self.optim.batch_size, 2),
            ("epochs", self.optim.epochs, 1),
            ("steps", self.optim.steps, 1),
            ("intervals", self.optim.intervals, 1),
            ("topk", self.method.topk, 1),
            ("ohem_min_kept", self.method.ohem_min_kept, 0),
            ("seed", self.run.seed, 0),
            ("threads", self.run.threads, 1),
        ]
        for name, value, smallest in least:
            if value is not None and value < smallest:
                raise ValueError(f"{_option(name)} must be at least {smallest}, got {value}")
        positive = [
            ("lr", self.optim.lr),
            ("head_lr_multiplier", self.optim.head_lr_multiplier),
            ("temperature", self.method.temperature),
            *(("tta_scales", scale) for scale in self.method.tta_scales),
            *(("load_size", side) for side in self.data.load_size or ()),
        ]
        for name, number in positive:
            if number is not None and not number > 0:
                raise ValueError(f"{_option(name)} must be above 0, got {number:g}")
        for name, share in (
            ("guide_share", self.method.guide_share),
            ("reliable_share", self.method.reliable_share),
            ("class_area", self.data.class_area),
        ):
            if not 0 < share <= 1:
                raise ValueError(f"{_option(name)} must be above 0 and at most 1, got {share:g}")
        for name, fraction in (
            ("momentum", self.optim.momentum),
            ("weight_decay", self.optim.weight_decay),
            ("poly_power", self.optim.poly_power),
            ("consistency_weight", self.method.consistency_weight),
            ("ohem_threshold", self.method.ohem_threshold),
        ):
            if fraction is not None and fraction < 0:
                raise ValueError(f"{_option(name)} must be at least 0, got {fraction:g}")
        if not self.method.tta_scales:
            raise ValueError("--tta-scales must name at least one scale")
        self._refuse_contradictions()

    def _refuse_contradictions(self) -> None:
        standard = MethodConfig()
        for name in _CISC_R_ONLY:
            if self.method.method != "cisc-r" and getattr(self.method, name) != getattr(standard, name):
                raise ValueError(
                    f"{_option(name)} belongs to --method cisc-r, got --method {self.method.method}"
                )
        if self.method.method == "sup" and self.method.reliable_share != standard.reliable_share:
            raise ValueError("--reliable-share belongs to --method cisc-r or stpp, got --method sup")
        for name, owner in (("topk", "topk"), ("temperature", "softmax")):
            changed = getattr(self.method, name) != getattr(standard, name)
            if changed and self.method.similarity != owner:
                got = self.method.similarity
                raise ValueError(f"{_option(name)} belongs to --similarity {owner}, got --similarity {got}")
        steps, intervals = self.optim.steps, self.optim.intervals
        if steps is not None and intervals is not None and intervals > steps:
            raise ValueError(f"--intervals must be at most --steps {steps}, got {intervals}")
        if self.preset == "demo" and (self.data.data_root is None) != (self.data.split is None):
            raise ValueError(
                "--data-root and --split belong together: give both, or neither for generated scenes"
            )
        if self.preset != "demo" and self.data.data_root is None:
            raise ValueError(f"--data-root is needed: the folder that holds the images of {self.preset}")
        if self.preset != "demo" and self.data.split is None:
            raise ValueError("--split is needed: the folder with labeled.txt and unlabeled.txt")

    @property
    def out(self) -> Path:
        """The run folder."""
        return Path(self.run.out) if self.run.out else Path("runs") / self.preset

    def as_dict(self) -> dict[str, Any]:
        """For config.json."""
        return dataclasses.asdict(self)


_GROUPS: dict[str, type] = {
    "data": DataConfig,
    "model": ModelConfig,
    "optim": OptimConfig,
    "method": MethodConfig,
    "run": RunConfig,
}

PRESETS: dict[str, dict[str, Any]] = {
    "demo": {
        "model": "deeplabv3plus",
        "backbone": "resnet18",
        "output_stride": 16,
        "pretrained": "none",
        "batch_size": 8,
        "steps": 240,
        "intervals": 4,
        "lr": 0.01,
        "head_lr_multiplier": 1.0,
        "workers": 0,
        "tta_scales": (0.75, 1.0, 1.5),
    },
    "camvid": {"backbone": "resnet50", "pretrained": "none", "batch_size": 16, "lr": 0.01, "epochs": 160},
    "pascal": {"lr": 0.001, "epochs": 80},
    "cityscapes": {"lr": 0.004, "epochs": 160},
    "coco": {"lr": 0.004, "epochs": 30},
}
"""What differs from the defaults; sizes are the data set's."""


def preset_defaults(preset: str) -> dict[str, Any]:
    """Default of every flag under a preset, by field name."""
    values = {f.name: f.default for group in _GROUPS.values() for f in dataclasses.fields(group)}
    spec = DATASETS[preset]
    values |= {"base_size": spec.base_size, "crop_size": spec.crop_size}
    return values | PRESETS[preset]


def build(preset: str, **flags: Any) -> Config:
    """The settings of a preset with some flags given, by field name; `ValueError` for what cannot be."""
    if preset not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    values = preset_defaults(preset)
    unknown = sorted(set(flags) - set(values))
    if unknown:
        raise ValueError(f"unknown setting {unknown[0]!r}")
    values |= flags
    groups = {
        name: group(**{f.name: values[f.name] for f in dataclasses.fields(group)})
        for name, group in _GROUPS.items()
    }
    return Config(preset=preset, **groups)


def parse(arguments: Sequence[str] | None = None) -> Config:
    """The settings of `train.py`'s command line; ends the program with one line where they cannot be."""
    parser = OneLineParser(prog="train.py", description="Train semantic segmentation from few labels.")
    parser.add_argument("preset", choices=tuple(PRESETS), metavar="PRESET", help=", ".join(PRESETS))
    for name, group in _GROUPS.items():
        section = parser.add_argument_group(name, group.__doc__)
        hints = typing.get_type_hints(group)
        for f in dataclasses.fields(group):
            _add_flag(section, f, hints[f.name])
    parsed = vars(parser.parse_args(arguments))
    preset = parsed.pop("preset")
    try:
        return build(
            preset,
            **{k: tuple(v) if isinstance(v, list) else v for k, v in parsed.items() if v is not _UNSET},
        )
    except ValueError as error:
        parser.error(str(error))


class _Unset:
    """Marks a flag that was not given, so that the preset decides."""

    def __repr__(self) -> str:
        return "the preset's"


_UNSET = _Unset()


def _add_flag(section: argparse._ArgumentGroup, f: dataclasses.Field[Any], hint: Any) -> None:
    metadata = f.metadata
    by_preset = sorted(p for p in PRESETS if preset_defaults(p)[f.name] != f.default)
    shown = "none" if f.default is None else _words(f.default)
    if by_preset:
        shown += "".join(f"; {p}: {_words(preset_defaults(p)[f.name])}" for p in by_preset)
    text = f"{metadata['help']} (default: {shown})".replace("%", "%%")
    keywords: dict[str, Any] = {"default": _UNSET, "help": text, "dest": f.name}
    kind = _plain(hint)
    if kind is bool:
        section.add_argument(_option(f.name), action=argparse.BooleanOptionalAction, **keywords)
        return
    if typing.get_origin(kind) is tuple:
        inner = typing.get_args(kind)
        keywords["type"] = inner[0]
        keywords["nargs"] = "+" if inner[-1] is Ellipsis else len(inner)
        keywords["metavar"] = inner[0].__name__.upper()
    else:
        keywords["type"] = kind
        if "choices" in metadata:
            keywords["choices"] = metadata["choices"]
        else:
            keywords["metavar"] = kind.__name__.upper()
    section.add_argument(_option(f.name), **keywords)


def _plain(hint: Any) -> Any:
    """The type without `None`."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return next(a for a in typing.get_args(hint) if a is not type(None))
    return hint


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _words(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return "on" if value is True else "off" if value is False else str(value)
