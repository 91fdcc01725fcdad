"""The six stages: what each reads from the run folder and leaves there, so that any can be gone on with.

    1 supervised        checkpoints/supervised.pt                        from labeled pairs
    2 pseudo_label      pseudo_labels/                                   by the model of stage 1
    3 select            selection.json: guide pools, reliable images     by the model of stage 1
    4 retrain_reliable  checkpoints/retrain_reliable.pt                  labeled + reliable; teacher: stage 1
    5 relabel           pseudo_labels/ of the other images               by the model of stage 4
    6 retrain_all       checkpoints/retrain_all.pt                       labeled + all; teacher: stage 4

`--method stpp` walks through the same stages without guides and teachers, `--method sup` has the first alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from cisc_ext import checkpoint, method, ops
from cisc_ext.config import Config, OptimConfig
from cisc_ext.data.datasets import DATASETS, DatasetSpec, Item, Split, load_split, pseudo_path, read_label
from cisc_ext.data.pairs import (
    Batch,
    EvalSet,
    GuidedUnlabeled,
    LabeledPairs,
    LabeledSet,
    PairBatch,
    PseudoLabeled,
    TrainingSet,
    eval_loader,
    loader,
)
from cisc_ext.data.query import ClassIndex, build_class_index
from cisc_ext.data.transforms import Augment, Strong
from cisc_ext.engine import (
    Losses,
    Runtime,
    Views,
    build_optimizer,
    evaluate,
    features_of,
    predictions,
    train_steps,
)
from cisc_ext.memory import PeakMemory
from cisc_ext.models import SegmentationModel, SegOutput
from cisc_ext.models.pretrained import load_pretrained
from cisc_ext.runs import RunFolder

STAGES = {
    "sup": ("supervised",),
    "stpp": ("supervised", "pseudo_label", "select", "retrain_reliable", "relabel", "retrain_all"),
    "cisc-r": ("supervised", "pseudo_label", "select", "retrain_reliable", "relabel", "retrain_all"),
}
DEFAULT_INTERVALS = 10
"""Parts of a training of --steps."""
EARLY_CHECKPOINTS = 3
"""Checkpoints of ST++'s first stage, at thirds of the training, whose predictions are compared."""


@dataclass(frozen=True)
class Setup:
    """What all stages share."""

    config: Config
    spec: DatasetSpec
    split: Split
    index: ClassIndex
    runtime: Runtime
    run: RunFolder

    @property
    def network_spec(self) -> checkpoint.NetworkSpec:
        """What is needed to build the network again."""
        model, data = self.config.model, self.config.data
        return checkpoint.NetworkSpec(
            model.model,
            model.backbone,
            self.spec.num_classes,
            model.output_stride,
            self.spec.name,
            data.load_size,
            data.crop_size,
        )

    def initial_network(self) -> SegmentationModel:
        """The network with its initial weights, the same each time."""
        torch.manual_seed(self.config.run.seed)
        network = self.network_spec.build()
        load_pretrained(network, self.config.model.backbone, self.config.model.pretrained)
        return self.runtime.move(network)

    def trained_network(self, stage: str) -> SegmentationModel:
        """The best network of a stage."""
        return self.runtime.move(checkpoint.load_network(self.run.weights(stage), self.network_spec))

    def samples(self, items: Sequence[Item], *, labels: bool) -> Iterator[Any]:
        """Whole images for evaluation, without reading their labels unless they are wanted."""
        wanted = items if labels else [Item(i.image, None, i.name) for i in items]
        data = EvalSet(self.spec, wanted, load_size=self.config.data.load_size, cache_mib=0)
        return eval_loader(data, workers=self.config.data.workers)


@dataclass(frozen=True)
class Outcome:
    """What a stage says of itself in metrics.json."""

    miou: float | None = None
    steps: int = 0
    earlier_seconds: float = 0.0  # that parts of the run before this one took


def prepare(config: Config, runtime: Runtime, run: RunFolder) -> Setup:
    """Read lists, check every file they name, and index the labeled images by class."""
    spec = DATASETS[config.preset]
    assert config.data.data_root is not None and config.data.split is not None
    split = load_split(spec, config.data.data_root, config.data.split, config.data.val)
    index = build_class_index(spec, split.labeled, threshold=config.data.class_area)
    build_class_index(
        spec, split.val
    )  # reads every validation label, so that a wrong one is found before training
    if config.method.method == "cisc-r" and len(split.labeled) < 2:
        raise ValueError("--method cisc-r needs at least two labeled images, got 1")
    steps = _length(config.optim, len(split.labeled))[0]
    if config.method.method == "stpp" and steps < EARLY_CHECKPOINTS:
        raise ValueError(
            f"--method stpp needs at least {EARLY_CHECKPOINTS} steps of its first stage, got {steps}"
        )
    setup = Setup(config, spec, split, index, runtime, run)
    setup.initial_network()  # finds weights that are missing or do not fit
    return setup


def run_stage(setup: Setup, stage: str) -> Outcome:
    """Run one stage; its time and peak memory go to metrics.json when it is finished."""
    began, memory = time.perf_counter(), PeakMemory(setup.runtime.device)
    outcome = _RUN[stage](setup, stage)
    seconds = time.perf_counter() - began + outcome.earlier_seconds
    setup.run.finish(stage, outcome.miou, outcome.steps, seconds, memory.mib())
    return outcome


def _supervised(setup: Setup, stage: str) -> Outcome:
    """Stage 1: pairs of labeled images with consistency between them; single labeled images for the other
    methods."""
    config = setup.config
    images = setup.split.labeled
    if config.method.method != "cisc-r":
        marks = EARLY_CHECKPOINTS if config.method.method == "stpp" else 0
        data = _labeled_set(setup, stage)
        return _train(setup, stage, len(images), [data], _labeled_objective(setup), marks=marks)
    shared = "all" if config.method.shared_classes == "own" else config.method.shared_classes
    pairs = LabeledPairs(
        setup.spec,
        images,
        setup.index,
        _augment(setup),
        seed=config.run.seed,
        shared_classes=shared,  # type: ignore[arg-type]  # a choice of the command line
        stream=stage,
        load_size=config.data.load_size,
    )

    def objective(network: SegmentationModel, batches: tuple[PairBatch]) -> Losses:
        (batch,) = _to_device(setup, batches)
        assert batch.classes is not None
        first, second = _forward_together(setup, network, batch.image, batch.guide_image)
        return method.pair_losses(
            first, batch.labels, second, batch.guide_labels, batch.classes, config.method
        )

    return _train(setup, stage, len(images), [pairs], objective)


def _pseudo_label(setup: Setup, stage: str) -> Outcome:
    """Stage 2: label every unlabeled image with the model of stage 1."""
    _label(setup, stage, setup.split.unlabeled, "supervised")
    return Outcome()


def _relabel(setup: Setup, stage: str) -> Outcome:
    """Stage 5: label the images that were not reliable anew with the model of stage 4."""
    reliable = set(setup.run.read_selection()["reliable"])
    _label(setup, stage, [i for i in setup.split.unlabeled if i.name not in reliable], "retrain_reliable")
    return Outcome()


def _label(setup: Setup, stage: str, items: Sequence[Item], teacher: str) -> None:
    if items:
        evaluate(
            setup.trained_network(teacher),
            setup.samples(items, labels=False),
            len(items),
            setup.runtime,
            setup.spec,
            Views(setup.config.method.tta_scales, flip=True),
            save_masks=setup.run.pseudo_labels,
            title=stage,
        )


def _select(setup: Setup, stage: str) -> Outcome:
    """Stage 3: guide pools from the labeled images, and the better part of the unlabeled ones."""
    items, settings = setup.split.unlabeled, setup.config.method
    if settings.method == "stpp":
        pools: dict[int, list[int]] = {}
        scores = {i: -value for i, value in enumerate(_stabilities(setup, stage))}
    else:
        network = setup.trained_network("supervised")
        anchors = _class_anchors(setup, network, stage)
        pools = method.guide_pools(_labeled_losses(setup, network, anchors, stage), settings.guide_share)
        scores = _unlabeled_scores(setup, network, anchors, stage)
    reliable = method.lowest(scores, max(1, math.ceil(settings.reliable_share * len(items))))
    setup.run.write_selection(
        {
            "guides": {
                setup.spec.classes[c]: [setup.split.labeled[i].name for i in pool]
                for c, pool in pools.items()
            },
            "reliable": [items[i].name for i in reliable],
            "scores": {
                items[i].name: scores[i] if math.isfinite(scores[i]) else None for i in sorted(scores)
            },
        }
    )
    return Outcome()


def _class_anchors(setup: Setup, network: SegmentationModel, stage: str) -> dict[int, Tensor]:
    """Mean prototype of each class over the labeled images that show it, whole and each alike."""
    found: dict[int, list[Tensor]] = {}
    samples = tqdm(
        setup.samples(setup.split.labeled, labels=True), total=len(setup.split.labeled), desc=stage
    )
    for i, sample in enumerate(samples):
        classes = setup.index.classes_of(i)
        if classes:
            features = features_of(network, sample.image, setup.runtime).features
            labels = sample.labels[None].to(setup.runtime.device)
            for c, prototype in zip(classes, method.image_prototypes(features, labels, classes), strict=True):
                found.setdefault(c, []).append(prototype)
    return {c: torch.stack(found[c]).mean(0) for c in sorted(found)}


def _labeled_losses(
    setup: Setup, network: SegmentationModel, anchors: dict[int, Tensor], stage: str
) -> dict[int, dict[int, float]]:
    """Consistency loss of each labeled image against the anchor of each class it shows: class -> image ->
    loss."""
    losses: dict[int, dict[int, float]] = {c: {} for c in anchors}
    samples = tqdm(
        setup.samples(setup.split.labeled, labels=True), total=len(setup.split.labeled), desc=stage
    )
    for i, sample in enumerate(samples):
        shown = {c: anchors[c] for c in setup.index.classes_of(i)}
        if shown:
            features = features_of(network, sample.image, setup.runtime).features
            labels = sample.labels[None].to(setup.runtime.device)
            for c, loss in method.class_losses(features, labels, shown).items():
                losses[c][i] = loss
    return losses


def _unlabeled_scores(
    setup: Setup, network: SegmentationModel, anchors: dict[int, Tensor], stage: str
) -> dict[int, float]:
    """Score of each unlabeled image from the losses of all classes of its pseudo label; lower is more
    reliable."""
    items, scores = setup.split.unlabeled, {}
    samples = tqdm(setup.samples(items, labels=False), total=len(items), desc=stage)
    for i, sample in enumerate(samples):
        labels = torch.from_numpy(read_label(setup.spec, pseudo_path(setup.run.pseudo_labels, items[i].name)))
        shown = {c: anchors[c] for c in labels.unique().tolist() if c in anchors}
        losses: dict[int, float] = {}
        if shown:
            features = features_of(network, sample.image, setup.runtime).features
            losses = method.class_losses(features, labels[None].to(setup.runtime.device), shown)
        scores[i] = method.image_score(losses.values(), setup.config.method.ranking)
    return scores


def _stabilities(setup: Setup, stage: str) -> Iterator[float]:
    """ST++: agreement of the early checkpoints' predictions with the last one's, for each unlabeled image."""
    networks = [
        setup.runtime.move(checkpoint.load_network(setup.run.early_weights(mark), setup.network_spec)).eval()
        for mark in range(1, EARLY_CHECKPOINTS + 1)
    ]
    samples = setup.samples(setup.split.unlabeled, labels=False)
    with tqdm(total=len(setup.split.unlabeled), desc=stage, unit="image") as progress:
        for group, last, _ in predictions(
            networks[-1], samples, setup.runtime, Views(), setup.spec.ignore_index
        ):
            images = setup.runtime.images(torch.stack([s.image for s in group]))
            scores = [Views()(network, images, setup.runtime) for network in networks[:-1]]
            for i in range(len(group)):
                confusions = [ops.predict(s[i : i + 1], images.shape[2:], last[i : i + 1])[1] for s in scores]
                yield method.stability(confusions)
            progress.update(len(group))


def _retrain_reliable(setup: Setup, stage: str) -> Outcome:
    """Stage 4: from the initial weights, on labeled and reliable images."""
    reliable = set(setup.run.read_selection()["reliable"])
    return _retrain(setup, stage, [i for i in setup.split.unlabeled if i.name in reliable], "supervised")


def _retrain_all(setup: Setup, stage: str) -> Outcome:
    """Stage 6: from the initial weights again, on labeled and all unlabeled images."""
    return _retrain(setup, stage, setup.split.unlabeled, "retrain_reliable")


def _retrain(setup: Setup, stage: str, items: Sequence[Item], teacher_stage: str) -> Outcome:
    config, spec = setup.config, setup.spec
    seed, load_size = config.run.seed, config.data.load_size
    labeled = _labeled_set(setup, f"{stage} labeled")
    if config.method.method == "stpp":
        plain = PseudoLabeled(
            spec,
            items,
            setup.run.pseudo_labels,
            _augment(setup),
            Strong(cutout=True),
            seed=seed,
            stream=stage,
            load_size=load_size,
        )

        def plain_objective(network: SegmentationModel, batches: tuple[Batch, Batch]) -> Losses:
            known, pseudo = _to_device(setup, batches)
            first, second = _forward_together(setup, network, known.image, pseudo.image)
            return {
                "labeled": method.labeled_loss(first, known.labels, config.method),
                "unlabeled": method.pseudo_labeled_loss(second, pseudo.labels),
            }

        return _train(setup, stage, len(items), [labeled, plain], plain_objective)

    guided = GuidedUnlabeled(
        spec,
        items,
        setup.run.pseudo_labels,
        setup.split.labeled,
        _pools(setup),
        _augment(setup),
        Strong(),
        seed=seed,
        shared_classes=config.method.shared_classes,  # type: ignore[arg-type]  # a choice of the command line
        weak_view=config.method.weak_view,
        threshold=config.data.class_area,
        stream=stage,
        load_size=load_size,
    )
    teacher = setup.trained_network(teacher_stage).eval()

    def objective(network: SegmentationModel, batches: tuple[Batch, PairBatch]) -> Losses:
        known, pair = _to_device(setup, batches)
        with torch.no_grad():
            seen = pair.image if pair.weak_image is None else pair.weak_image
            query, guide = _forward_together(setup, teacher, seen, pair.guide_image)
            similarity = method.cisc_map(
                query.features,
                pair.labels,
                guide.features,
                pair.guide_labels,
                pair.classes,
                spec.num_classes,
                config.method,
            )
        first, second = _forward_together(setup, network, known.image, pair.image)
        return {
            "labeled": method.labeled_loss(first, known.labels, config.method),
            "rectified": method.rectified_loss(second, pair.labels, similarity, pair.classes),
        }

    return _train(setup, stage, len(items), [labeled, guided], objective)


def _pools(setup: Setup) -> dict[int, list[int]]:
    """Guide pools of stage 3: class -> positions among the labeled images."""
    position = {item.name: i for i, item in enumerate(setup.split.labeled)}
    guides = setup.run.read_selection()["guides"]
    return {setup.spec.classes.index(c): [position[name] for name in names] for c, names in guides.items()}


def _augment(setup: Setup) -> Augment:
    data = setup.config.data
    return Augment(data.base_size, data.crop_size, ignore_index=setup.spec.ignore_index)


def _labeled_set(setup: Setup, stream: str) -> LabeledSet:
    return LabeledSet(
        setup.spec,
        setup.split.labeled,
        _augment(setup),
        seed=setup.config.run.seed,
        stream=stream,
        load_size=setup.config.data.load_size,
    )


def _labeled_objective(setup: Setup) -> Callable[[SegmentationModel, tuple[Batch]], Losses]:
    def objective(network: SegmentationModel, batches: tuple[Batch]) -> Losses:
        (batch,) = _to_device(setup, batches)
        with setup.runtime.cast():
            output = network(batch.image)
        return {"cross_entropy": method.labeled_loss(output, batch.labels, setup.config.method)}

    return objective


def _to_device(setup: Setup, batches: tuple[Any, ...]) -> tuple[Any, ...]:
    device = setup.runtime.device
    return tuple(b.to(device, memory_format=torch.channels_last, non_blocking=True) for b in batches)


def _forward_together(
    setup: Setup, network: SegmentationModel, first: Tensor, second: Tensor
) -> tuple[SegOutput, SegOutput]:
    """One forward pass over two batches of images of one size."""
    with setup.runtime.cast():
        logits, features = network(torch.cat([first, second]))
    count = len(first)
    return SegOutput(logits[:count], features[:count]), SegOutput(logits[count:], features[count:])


def _train(
    setup: Setup,
    stage: str,
    images: int,
    sets: Sequence[TrainingSet[Any]],
    objective: Callable[[SegmentationModel, Any], Losses],
    marks: int = 0,
) -> Outcome:
    """Train from the initial weights; keep the network with the best validation mIoU.

    The training is cut into intervals, each ended by a validation and a checkpoint that `--resume` goes on
    from. Random draws depend on the seed and the step, so that a training that was interrupted ends as one
    that was not.
    """
    config, run = setup.config, setup.run
    optim = config.optim
    steps, intervals = _length(optim, images)
    ends = {math.ceil(steps * (i + 1) / intervals) for i in range(intervals)}
    early = {math.ceil(steps * (i + 1) / marks): i + 1 for i in range(marks)}
    network = setup.initial_network()
    optimizer = build_optimizer(network, config.model.model, optim)
    first, best, earlier = 0, -1.0, 0.0
    state = run.training_state(stage)
    if state is not None:
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        first, best, earlier = state["step"], state["best"], state["seconds"]
        if state["is_best"]:  # the files of the best network may be from before or after this state
            _keep_best(setup, stage, network, state["confusion"])
    run.cut_losses(stage, first)
    began = time.perf_counter()
    streams = [
        loader(
            data,
            optim.batch_size,
            steps,
            seed=config.run.seed + i,
            first_step=first,
            workers=config.data.workers,
            pin_memory=setup.runtime.device.type == "cuda",
        )
        for i, data in enumerate(sets)
    ]
    batches = zip(*streams, strict=True)
    with tqdm(total=steps, initial=first, desc=stage, unit="step") as progress:
        for end in sorted(ends | set(early)):
            if end <= first:
                continue
            torch.manual_seed(config.run.seed * 1_000_003 + first)
            train_steps(
                network,
                optimizer,
                batches,
                objective,
                first=first,
                last=end,
                steps=steps,
                power=optim.poly_power,
                progress=progress,
                log=lambda records: run.log_losses(stage, records),
            )
            first = end
            if end in early:
                checkpoint.save_network(run.early_weights(early[end]), network, setup.network_spec)
            if end not in ends:
                continue
            samples = setup.samples(setup.split.val, labels=True)
            confusion = evaluate(
                network, samples, len(setup.split.val), setup.runtime, setup.spec, title="validation"
            )
            miou = method.mean_iou(confusion)
            run.log_scalar(f"{stage}/miou", miou, end)
            is_best, best = miou > best, max(miou, best)
            run.save_training_state(
                stage,
                {
                    "network": network.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "step": end,
                    "best": best,
                    "is_best": is_best,
                    "confusion": confusion,
                    "seconds": earlier + time.perf_counter() - began,
                },
            )
            if is_best:
                _keep_best(setup, stage, network, confusion)
            tqdm.write(f"{stage}: step {end} of {steps}, validation mIoU {miou:.4f}, best {best:.4f}")
    return Outcome(best, steps, earlier)


def _length(optim: OptimConfig, images: int) -> tuple[int, int]:
    """Steps of a training on so many images, and the intervals that it is cut into."""
    if optim.steps is None:
        steps = optim.epochs * max(1, images // optim.batch_size)
        intervals = optim.epochs
    else:
        steps, intervals = optim.steps, DEFAULT_INTERVALS
    return steps, min(steps, optim.intervals or intervals)


def _keep_best(setup: Setup, stage: str, network: SegmentationModel, confusion: Tensor) -> None:
    checkpoint.save_network(setup.run.weights(stage), network, setup.network_spec)
    setup.run.write_scores(stage, confusion)


_RUN: dict[str, Callable[[Setup, str], Outcome]] = {
    "supervised": _supervised,
    "pseudo_label": _pseudo_label,
    "select": _select,
    "retrain_reliable": _retrain_reliable,
    "relabel": _relabel,
    "retrain_all": _retrain_all,
}
