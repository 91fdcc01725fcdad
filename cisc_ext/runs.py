"""The run folder: config.json, metrics.json, losses.jsonl, selection.json, checkpoints/, pseudo_labels/,
log/."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from cisc_ext import checkpoint
from cisc_ext.config import Config
from cisc_ext.files import atomic_write, write_json
from cisc_ext.method import class_iou, mean_iou

_FREE = {"run": ("out", "resume", "device", "threads"), "data": ("workers",)}
"""Settings that may differ between the parts of a run."""


class RunFolder:
    """Reads and writes the files of a run; every write is atomic but for the lines added to losses.jsonl."""

    def __init__(self, path: Path, config: Config, class_names: Sequence[str]) -> None:
        self.path = path
        self.class_names = class_names
        self.pseudo_labels = path / "pseudo_labels"
        self.metrics: dict[str, Any] = {"stages": [], "final": None}
        self._settings = json.loads(json.dumps(config.as_dict()))
        self._before: dict[str, Any] = {}
        if config.run.resume:
            self._check_same(self._settings)
            if (path / "metrics.json").is_file():
                self.metrics = read_json(path / "metrics.json")
        elif (path / "config.json").exists():
            raise ValueError(
                f"{path} holds a run already: add --resume to go on with it, or choose another --out"
            )

    def open(self, decided: Mapping[str, str]) -> None:
        """Begin to write: config.json and the log. `decided` must be the same when a run is gone on with."""
        for name, value in decided.items():
            was = self._before.get("decided", {}).get(name, value)
            if was != value:
                raise ValueError(
                    f"{self.path}: {name} has changed since the run began: it was {was}, is {value}"
                )
        write_json(self.path / "config.json", {**self._settings, "decided": dict(decided)})
        self._log = SummaryWriter(str(self.path / "log"))

    def _check_same(self, settings: dict[str, Any]) -> None:
        file = self.path / "config.json"
        if not file.is_file():
            raise ValueError(f"{self.path}: no run to resume (config.json is missing)")
        self._before = before = read_json(file)
        for group, values in settings.items():
            if not isinstance(values, dict):
                if before.get(group) != values:
                    raise ValueError(f"{file}: this is a run of preset {before.get(group)}, got {values}")
                continue
            for name, value in values.items():
                if name not in _FREE.get(group, ()) and before.get(group, {}).get(name) != value:
                    was = before.get(group, {}).get(name)
                    raise ValueError(
                        f"--{name.replace('_', '-')} cannot change in a run: it was {was}, got {value}"
                    )

    def weights(self, stage: str) -> Path:
        """Best network of a stage."""
        return self.path / "checkpoints" / f"{stage}.pt"

    def early_weights(self, mark: int) -> Path:
        """ST++: network at the `mark`-th third of stage 1."""
        return self.path / "checkpoints" / f"supervised_{mark}.pt"

    def _state_path(self, stage: str) -> Path:
        return self.path / "checkpoints" / f"{stage}.state.pt"

    def training_state(self, stage: str) -> dict[str, Any] | None:
        """What the last interval of an unfinished training left; None at its beginning."""
        path = self._state_path(stage)
        return checkpoint.load(path) if path.is_file() else None

    def save_training_state(self, stage: str, state: dict[str, Any]) -> None:
        """Keep what is needed to go on with a training."""
        checkpoint.save(state, self._state_path(stage))

    def finished(self, stage: str) -> bool:
        """Whether metrics.json has the stage."""
        return any(entry["name"] == stage for entry in self.metrics["stages"])

    def finish(self, stage: str, miou: float | None, steps: int, seconds: float, peak_mib: float) -> None:
        """Enter a finished stage into metrics.json and drop its training state."""
        entry = {"name": stage, "miou": miou, "steps": steps, "seconds": seconds, "peak_mib": peak_mib}
        self.metrics["stages"].append(entry)
        write_json(self.path / "metrics.json", self.metrics)
        self._state_path(stage).unlink(missing_ok=True)

    def write_scores(self, stage: str, confusion: Tensor) -> None:
        """Scores of a stage's best network: mIoU and IoU per class, null for a class that is nowhere."""
        per_class = dict(zip(self.class_names, class_iou(confusion), strict=True))
        scores = {"miou": mean_iou(confusion), "per_class_iou": per_class}
        write_json(self.path / "checkpoints" / f"{stage}.json", scores)

    def write_final(self, stage: str) -> None:
        """Make the scores of the last training those of the run."""
        self.metrics["final"] = read_json(self.path / "checkpoints" / f"{stage}.json")
        write_json(self.path / "metrics.json", self.metrics)

    def read_selection(self) -> dict[str, Any]:
        """What stage 3 left."""
        selection: dict[str, Any] = read_json(self.path / "selection.json")
        return selection

    def write_selection(self, selection: dict[str, Any]) -> None:
        """Guide pools, reliable images and scores."""
        write_json(self.path / "selection.json", selection)

    def cut_losses(self, stage: str, step: int) -> None:
        """Drop the lines of a stage's steps from `step` on, which are about to be taken again."""
        path = self.path / "losses.jsonl"
        if not path.is_file():
            return
        kept, lines = [], path.read_text().splitlines(keepends=True)
        for number, line in enumerate(lines, start=1):
            try:
                entry = json.loads(line)
            except ValueError:
                if number < len(lines):
                    raise ValueError(f"{path}, line {number}: not JSON") from None
                continue  # the program was stopped while it wrote this line
            if entry["stage"] != stage or entry["step"] < step:
                kept.append(line)
        atomic_write(path, lambda stream: stream.writelines(line.encode() for line in kept))

    def log_losses(self, stage: str, records: Sequence[dict[str, float]]) -> None:
        """One line per optimizer step, and TensorBoard's curves."""
        with (self.path / "losses.jsonl").open("a") as stream:
            for record in records:
                stream.write(json.dumps({"stage": stage, **record}) + "\n")
                for name, value in record.items():
                    if name != "step":
                        self._log.add_scalar(f"{stage}/{name}", value, int(record["step"]))
        self._log.flush()

    def log_scalar(self, name: str, value: float, step: int) -> None:
        """A point of a TensorBoard curve."""
        self._log.add_scalar(name, value, step)

    def close(self) -> None:
        """End the TensorBoard log."""
        self._log.close()


def read_json(path: Path) -> Any:
    """A JSON file; `ValueError` names one that cannot be read."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from None
