"""The stages end to end on tiny generated scenes: what a run leaves, resuming, and refusals."""

from __future__ import annotations

import json
import shutil
import types
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numerics import assert_rounding
from PIL import Image

import eval as eval_script
import train
from benchmarks import naive
from cisc_ext import method, stages
from cisc_ext.config import build, parse
from cisc_ext.data import synthetic
from cisc_ext.data.datasets import DATASETS
from cisc_ext.data.pairs import EvalSample
from cisc_ext.engine import Runtime, Views, build_optimizer, decide_runtime, groups, set_learning_rate
from cisc_ext.engine import _window_starts as window_starts
from cisc_ext.models import SegOutput, build_model
from cisc_ext.ops import _library
from cisc_ext.ops.registry import OPERATORS, Call, decide
from cisc_ext.runs import RunFolder

STEPS = 4


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few scenes of 48 x 48 pixels."""
    root = tmp_path_factory.mktemp("scenes")
    synthetic.generate(root, labeled=4, unlabeled=6, val=3, size=(48, 48))
    return root


def flags(data: Path, out: Path, *more: str) -> list[str]:
    """A demo of seconds."""
    small = f"--crop-size 33 --base-size 48 --batch-size 2 --steps {STEPS} --intervals 2 --workers 0"
    precision = "--tta-scales 1 1.5 --precision float32 --device cpu --threads 1"
    where = ["--data-root", str(data), "--split", str(data / "splits"), "--out", str(out)]
    return ["demo", *small.split(), *precision.split(), *where, *more]


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of all six stages."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert train.main(flags(data, out)) == 0
    return out


def losses(out: Path) -> list[dict[str, Any]]:
    """The lines of losses.jsonl."""
    return [json.loads(line) for line in (out / "losses.jsonl").read_text().splitlines()]


def scores(out: Path) -> tuple[Any, ...]:
    """What must not differ between two runs: all but time and memory."""
    metrics = json.loads((out / "metrics.json").read_text())
    entries = [(e["name"], e["miou"], e["steps"]) for e in metrics["stages"]]
    return entries, metrics["final"], losses(out)


def test_a_run_leaves_what_is_promised(finished: Path, data: Path) -> None:
    metrics = json.loads((finished / "metrics.json").read_text())
    assert [e["name"] for e in metrics["stages"]] == list(stages.STAGES["cisc-r"])
    assert [e["steps"] for e in metrics["stages"]] == [STEPS, 0, 0, STEPS, 0, STEPS]
    assert all((e["miou"] is None) == (e["steps"] == 0) for e in metrics["stages"])
    assert all(e["seconds"] > 0 and e["peak_mib"] > 0 for e in metrics["stages"])
    assert set(metrics["final"]) == {"miou", "per_class_iou"}
    assert metrics["final"]["miou"] == metrics["stages"][-1]["miou"]
    assert [(e["stage"], e["step"]) for e in losses(finished)] == [
        (stage, step) for stage in ("supervised", "retrain_reliable", "retrain_all") for step in range(STEPS)
    ]
    assert all(
        e["loss"] == pytest.approx(e["cross_entropy"] + e["consistency"]) for e in losses(finished)[:STEPS]
    )
    unlabeled = (data / "splits" / "unlabeled.txt").read_text().split()
    for name in unlabeled:
        with Image.open((finished / "pseudo_labels" / name).with_suffix(".png")) as mask:
            assert mask.mode == "P" and mask.size == (48, 48)
            assert np.asarray(mask).max() < 6
    selection = json.loads((finished / "selection.json").read_text())
    assert len(selection["reliable"]) == 3 and set(selection["scores"]) == set(unlabeled)
    assert not list((finished / "checkpoints").glob("*.state.pt"))
    saved = json.loads((finished / "config.json").read_text())
    assert saved["optim"]["steps"] == STEPS and saved["decided"]["precision"] == "float32"
    assert list((finished / "log").iterdir())


def test_a_second_run_and_more_workers_give_the_same_figures(
    finished: Path, data: Path, tmp_path: Path
) -> None:
    assert train.main(flags(data, tmp_path / "again", "--workers", "1")) == 0
    assert scores(tmp_path / "again") == scores(finished)


@pytest.mark.parametrize("cut", ["supervised", "retrain_all"])
def test_an_interrupted_run_ends_as_one_that_was_not(
    finished: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: str
) -> None:
    """Cut at the validation of the second interval: its losses are written already, and must be cut again."""
    real = stages.evaluate
    validations: list[None] = []

    def failing(*args: Any, **keywords: Any) -> torch.Tensor:
        in_training = keywords["title"] == "validation" and losses(out)[-1]["stage"] == cut
        if in_training:
            validations.append(None)
        if len(validations) == 2:
            raise KeyboardInterrupt
        return real(*args, **keywords)

    out = tmp_path / "cut"
    with monkeypatch.context() as patch:
        patch.setattr(stages, "evaluate", failing)
        with pytest.raises(KeyboardInterrupt):
            train.main(flags(data, out))
    assert losses(out)[-1] == {**losses(out)[-1], "stage": cut, "step": STEPS - 1}
    with (out / "losses.jsonl").open("a") as stream:
        stream.write('{"stage": "')  # as a kill in the middle of a line leaves it
    (out / "checkpoints" / f"{cut}.pt").unlink()  # as a kill between the state and the best network leaves it
    assert train.main(flags(data, out, "--resume")) == 0
    assert scores(out) == scores(finished)


def _operators(convert: torch.dtype, functions: Mapping[str, Callable[..., Any]]) -> types.SimpleNamespace:
    """The operators that the method calls, each on features and logits of a dtype, the result in float32."""

    def by(function: Callable[..., Any]) -> Callable[..., torch.Tensor]:
        def call(*args: Any, **more: Any) -> torch.Tensor:
            result: torch.Tensor = function(*(_cast(a, convert) for a in args), **more)
            return result.float()

        return call

    return types.SimpleNamespace(**{name: by(function) for name, function in functions.items()})


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


@pytest.mark.skipif(not _library.LOADED, reason="no compiled operators")
def test_kernels_train_as_the_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo's first 50 steps: by the default operators, by naive ones, and by the reference in float64.

    The kernels' losses stray from those of float64 operators at most twice as far as plain torch's, but for
    rounding.
    """
    taken = {"masked_average_pool", "prototype_similarity", "map_consistency", "rectified_cross_entropy"}
    for name in taken:
        assert decide(name, None, Call("cpu", (torch.float32,)))[0].name == "cpp"
    exact = {name: partial(OPERATORS[name].function, impl="reference") for name in taken}
    plain = {name: naive.ORACLES[name] for name in taken}
    variants = {
        "default": method.ops,
        "naive": _operators(torch.float32, plain),
        "float64": _operators(torch.float64, exact),
    }
    lines: dict[str, torch.Tensor] = {}
    data = tmp_path / "data"
    lists = synthetic.generate(data)
    for name, functions in variants.items():
        monkeypatch.setattr(method, "ops", functions)
        out = tmp_path / name
        where = ["--data-root", str(data), "--split", str(lists), "--out", str(out)]
        config = parse(["demo", *where, "--steps", "50", "--intervals", "1", "--precision", "float32"])
        runtime = decide_runtime(config.run.device, config.run.precision)
        folder = RunFolder(config.out, config, DATASETS[config.preset].classes)
        setup = stages.prepare(config, runtime, folder)
        folder.open({})
        stages.run_stage(setup, "supervised")
        records = losses(out)
        keys = ("loss", "cross_entropy", "consistency")
        lines[name] = torch.tensor([[r[key] for key in keys] for r in records], dtype=torch.float64)
    assert lines["default"].shape == (50, 3)
    size = lines["float64"].abs()
    assert_rounding(lines["default"].float(), lines["float64"], lines["naive"], size, what="losses")


@pytest.mark.parametrize("name", ["sup", "stpp"])
def test_other_methods_share_the_stages(data: Path, tmp_path: Path, name: str) -> None:
    assert train.main(flags(data, tmp_path / name, "--method", name)) == 0
    metrics = json.loads((tmp_path / name / "metrics.json").read_text())
    assert [e["name"] for e in metrics["stages"]] == list(stages.STAGES[name])
    first = losses(tmp_path / name)[0]
    assert "cross_entropy" in first and "consistency" not in first
    if name == "stpp":
        assert "rectified" not in losses(tmp_path / name)[-1]


@pytest.mark.parametrize("more", [("max", "all"), ("topk", "own"), ("prototype", "own"), ("softmax", "one")])
def test_variants_run(data: Path, tmp_path: Path, more: tuple[str, str]) -> None:
    out = tmp_path / "variant"
    variant = (
        "--similarity",
        more[0],
        "--shared-classes",
        more[1],
        "--weak-view",
        "--steps",
        "1",
        "--intervals",
        "1",
    )
    assert train.main(flags(data, out, *variant)) == 0
    assert {"labeled", "rectified"} < set(losses(out)[-1])


def test_runs_refuse_what_would_lose_or_mix_them(
    finished: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (finished / "metrics.json").read_bytes()
    for arguments, words in (
        (flags(data, finished), "holds a run already"),
        (flags(data, finished, "--resume", "--lr", "0.5"), "--lr cannot change in a run"),
        (flags(data, tmp_path / "none", "--resume"), "no run to resume"),
        (flags(tmp_path / "nowhere", tmp_path / "x"), "no such folder"),
        (flags(data, tmp_path / "x", "--device", "cuda:99"), "CUDA devices are available"),
    ):
        assert train.main(arguments) == 1
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1
    assert (finished / "metrics.json").read_bytes() == before
    assert not (tmp_path / "x").exists()


def test_a_run_does_not_go_on_with_other_images(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lists = tmp_path / "lists"
    shutil.copytree(data / "splits", lists)
    arguments = [*flags(data, tmp_path / "run", "--method", "sup"), "--split", str(lists)]
    assert train.main(arguments) == 0
    rows = (lists / "unlabeled.txt").read_text().splitlines(keepends=True)
    (lists / "unlabeled.txt").write_text("".join(rows[1:]))
    assert train.main([*arguments, "--resume"]) == 1
    assert "images has changed since the run began" in capsys.readouterr().err


def test_a_start_that_fails_leaves_the_folder_free(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    for more, words in (
        (("--pretrained", str(tmp_path / "none.pth")), "none.pth"),
        (("--method", "stpp", "--steps", "2"), "at least 3 steps"),
    ):
        assert train.main(flags(data, out, *more)) == 1
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1
        assert not out.exists()
    (tmp_path / "file").write_text("")
    assert train.main(flags(data, tmp_path / "file" / "run")) == 1
    assert capsys.readouterr().err.startswith("train.py: error: ")


def test_losses_before_one_that_is_not_finite_are_kept(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main(flags(data, tmp_path / "run", "--method", "sup", "--lr", "1e30")) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("train.py: error: supervised: the loss is not finite")
    assert [e["step"] for e in losses(tmp_path / "run")] == list(range(len(losses(tmp_path / "run")))) != []


def test_an_error_in_a_worker_is_one_line(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreadable(*_: object, **__: object) -> None:
        raise ValueError("photo.png: not an image")

    monkeypatch.setattr("cisc_ext.data.pairs.read_image", unreadable)
    assert train.main(flags(data, tmp_path / "run", "--workers", "1", "--method", "sup")) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "train.py: error: photo.png: not an image"


def test_ohem_is_for_labels_not_for_pseudo_labels() -> None:
    output = SegOutput(torch.randn(1, 3, 5, 5), torch.zeros(1, 4, 5, 5))
    labels = torch.randint(0, 3, (1, 9, 9)).to(torch.uint8)
    config = build("demo", ohem_threshold=0.1, ohem_min_kept=5).method
    plain = torch.nn.functional.cross_entropy(
        torch.nn.functional.interpolate(output.logits, (9, 9), mode="bilinear", align_corners=True),
        labels.long(),
    )
    torch.testing.assert_close(method.pseudo_labeled_loss(output, labels), plain)
    assert method.labeled_loss(output, labels, config) > plain + 0.1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nothing"], "invalid choice"),
        (["pascal"], "--data-root is needed"),
        (["demo", "--wrong"], "unrecognized"),
        (["demo", "--steps", "0"], "--steps must be at least 1"),
        (["demo", "--steps", "2", "--intervals", "3"], "--intervals must be at most"),
        (["demo", "--method", "sup", "--similarity", "max"], "--similarity belongs to --method cisc-r"),
        (["demo", "--split", "x"], "--data-root and --split belong together"),
        (["demo", "--topk", "3"], "--topk belongs to --similarity topk"),
        (["demo", "--lr", "-1"], "--lr must be above 0"),
        (["demo", "--guide-share", "1.5"], "--guide-share must be above 0 and at most 1"),
    ],
)
def test_wrong_settings_end_with_one_line(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and words in error and error.count("\n") == 1


def test_help_names_every_flag_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--help"])
    shown = capsys.readouterr().out
    for name in ("--crop-size", "--no-resume", "--tta-scales", "--similarity", "cityscapes: 721"):
        assert name in shown
    assert shown.count("(default:") >= 35


def test_presets_are_the_published_settings() -> None:
    pascal = build("pascal", data_root="d", split="s")
    assert (pascal.data.crop_size, pascal.data.base_size, pascal.optim.lr, pascal.optim.epochs) == (
        321,
        400,
        0.001,
        80,
    )
    city = build("cityscapes", data_root="d", split="s")
    assert (city.data.crop_size, city.data.base_size, city.optim.lr, city.optim.epochs) == (
        721,
        2048,
        0.004,
        160,
    )
    assert pascal.optim.batch_size == city.optim.batch_size == 32


@pytest.mark.parametrize(
    "mode", [[], ["--mode", "slide", "--window", "32"], ["--tta", "--scales", "1", "1.5"]]
)
def test_eval_agrees_with_the_run(finished: Path, data: Path, tmp_path: Path, mode: list[str]) -> None:
    checkpoint = finished / "checkpoints" / "retrain_all.pt"
    where = [
        "--data-root",
        str(data),
        "--json",
        str(tmp_path / "s.json"),
        "--save-masks",
        str(tmp_path / "masks"),
    ]
    common = ["--precision", "float32", "--device", "cpu", "--workers", "0"]
    assert eval_script.main([str(checkpoint), *where, *common, *mode]) == 0
    result = json.loads((tmp_path / "s.json").read_text())
    assert result["images"] == 3 and 0 <= result["pixel_accuracy"] <= 1
    if not mode:
        assert result["miou"] == json.loads((finished / "metrics.json").read_text())["final"]["miou"]
    assert len(list((tmp_path / "masks").rglob("*.png"))) == 3


def test_eval_refuses_in_one_line(
    finished: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = str(finished / "checkpoints" / "retrain_all.pt")
    (tmp_path / "bad.pt").write_bytes(b"nothing")
    for arguments, words in (
        ([str(tmp_path / "bad.pt"), "--data-root", str(data)], "not a checkpoint"),
        ([str(tmp_path / "none.pt"), "--data-root", str(data)], "none.pt"),
        ([good, "--data-root", str(tmp_path)], "no val.txt"),
        ([good, "--data-root", str(data), "--backbone", "resnet50"], "contradicts"),
        ([good, "--data-root", str(data), "--window", "9"], "--window belongs to --mode slide"),
        (
            [good, "--data-root", str(data), "--mode", "slide", "--window", "-5"],
            "--window must be at least 1",
        ),
        ([good, "--data-root", str(data), "--tta", "--scales", "-1"], "--scales must be above 0"),
        ([good, "--data-root", str(data), "--dataset", "camvid"], "contradicts"),
        ([good, "--data-root", str(data), "--json", str(tmp_path)], "is a folder"),
        ([good, "--data-root", str(data), "--save-masks", str(data)], "would overwrite"),
    ):
        assert eval_script.main(arguments) == 1
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1


class Counting(torch.nn.Module):
    """Scores that depend on the pixel alone, and the number of forward passes."""

    calls = 0

    def forward(self, images: torch.Tensor) -> SegOutput:
        """Red against green."""
        self.calls += 1
        return SegOutput(images[:, :2] * 4, images)


@pytest.mark.parametrize(
    ("views", "calls"),
    [(Views(), 1), (Views((1.0,), True), 2), (Views((0.5, 1.0, 2.0), True), 6), (Views((1.0,), False, 8), 4)],
)
def test_one_forward_pass_per_view(views: Views, calls: int) -> None:
    network = Counting()
    images = torch.zeros(1, 3, 12, 12)
    images[:, 0, :, :6], images[:, 1, :, 6:] = 1.0, 1.0
    scores = views(network, images, Runtime(torch.device("cpu"), None, ()))  # type: ignore[arg-type]
    assert network.calls == calls
    up = torch.nn.functional.interpolate(scores, (12, 12), mode="bilinear", align_corners=True)
    assert torch.equal(up.argmax(1)[0, 0], (torch.arange(12) >= 6).long())


@pytest.mark.parametrize(("size", "window"), [(10, 20), (20, 20), (21, 20), (50, 20), (100, 7)])
def test_windows_cover_everything_and_stay_inside(size: int, window: int) -> None:
    starts = window_starts(size, window)
    covered = {p for start in starts for p in range(start, start + window)}
    assert set(range(size)) <= covered and starts[-1] + window <= max(size, window)


def test_groups_have_one_size() -> None:
    def samples() -> Iterator[EvalSample]:
        for i, size in enumerate([8, 8, 6, 8]):
            yield EvalSample(torch.zeros(3, size, size), None, str(i))

    assert [[s.name for s in group] for group in groups(samples())] == [["0", "1"], ["2"], ["3"]]


def test_the_head_learns_faster_and_rates_decay() -> None:
    network = build_model("deeplabv3plus", "resnet18", 3)
    optimizer = build_optimizer(network, "deeplabv3plus", build("pascal", data_root="d", split="s").optim)
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(network.parameters()))
    assert set_learning_rate(optimizer, 0, 10, 0.9) == 0.001
    assert [g["lr"] for g in optimizer.param_groups] == [0.001, 0.01]
    assert set_learning_rate(optimizer, 5, 10, 0.9) == pytest.approx(0.001 * 0.5**0.9)
