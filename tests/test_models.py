"""Networks: names, golden numbers, shapes, output stride, precision, compilation, weights from files."""

from __future__ import annotations

import hashlib
import json
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cisc_ext.models import (
    BACKBONES,
    MODELS,
    SegmentationModel,
    SegOutput,
    build_model,
    head_lr_multiplier,
    pretrained,
)
from cisc_ext.models.backbones import build_backbone
from cisc_ext.models.pretrained import load_pretrained, load_weights, state_dict_from

GOLDEN = Path(__file__).parent / "golden"
REFERENCE = json.loads((GOLDEN / "reference_models.json").read_text())
Golden = Callable[[str], dict[str, Tensor]]


def shapes(module: nn.Module) -> dict[str, list[int]]:
    return {key: list(value.shape) for key, value in module.state_dict().items()}


def on_meta(model: str, backbone: str, num_classes: int, **options: int) -> SegmentationModel:
    with torch.device("meta"):
        return build_model(model, backbone, num_classes, **options)


def fill(module: nn.Module, salt: int, rename: Callable[[str], str] = str) -> None:
    """The weights of golden/README.md, drawn by name."""
    for key, tensor in module.state_dict().items():
        if key.endswith("num_batches_tracked"):
            continue
        random = np.random.RandomState((zlib.crc32(rename(key).encode()) + salt) % 2**32)
        draw = random.standard_normal(tuple(tensor.shape))
        if key.endswith("running_var"):
            draw = 1 + 0.1 * np.clip(draw, -3, 3)
        elif key.endswith("running_mean"):
            draw = 0.1 * draw
        elif draw.ndim == 1:
            draw = 0.1 * draw + key.endswith("weight")
        else:
            draw = draw * np.sqrt(2 / draw[0].size)
        tensor.copy_(torch.from_numpy(draw))


def golden_input(arrays: dict[str, Tensor]) -> Tensor:
    random = np.random.RandomState(1234 + int(arrays["salt"]))
    draw = random.standard_normal(arrays["input_shape"].tolist())
    return torch.from_numpy(np.cumsum(np.cumsum(draw, 2), 3) / 40)


def assert_golden(got: Tensor, expected: Tensor) -> None:
    assert got.shape == expected.shape
    error = (got - expected).abs().max() / expected.abs().max()
    assert error < 1e-8, f"relative error {error:.3e}"


def small_input(batch: int = 2, height: int = 33, width: int = 49) -> Tensor:
    return torch.randn(batch, 3, height, width)


def small(model: str = "deeplabv3plus", num_classes: int = 3) -> SegmentationModel:
    return build_model(model, "resnet18", num_classes)


@pytest.mark.parametrize(
    ("name", "num_classes"),
    [
        ("deeplabv3plus_resnet50", 21),
        ("deeplabv3plus_resnet101", 19),
        ("pspnet_resnet50", 21),
        ("deeplabv2_resnet101", 21),
    ],
)
def test_names_shapes_and_counts(name: str, num_classes: int) -> None:
    model, backbone = name.split("_")
    network = on_meta(model, backbone, num_classes)
    assert shapes(network) == REFERENCE[name]["state_dict"]
    assert sum(p.numel() for p in network.parameters()) == REFERENCE[name]["params"]


def test_xception_names_and_shapes() -> None:
    with torch.device("meta"):
        backbone = build_backbone("xception65")
    assert shapes(backbone) == json.loads((GOLDEN / "xception65_timm_state_dict.json").read_text())


@pytest.mark.parametrize("name", ["deeplabv3plus", "pspnet"])
@torch.no_grad()
def test_golden_networks(name: str, golden: Golden) -> None:
    arrays = golden(f"{name}_resnet50")
    model = build_model(name, "resnet50", 21).double().eval()
    fill(model, int(arrays["salt"]))
    images = golden_input(arrays)
    output = model(images)
    full = F.interpolate(output.logits, size=images.shape[2:], mode="bilinear", align_corners=True)
    assert_golden(full[:, :, ::4, ::4], arrays["logits"])
    if "feat" in arrays:
        assert_golden(output.features[:, ::16], arrays["feat"])


@torch.no_grad()
def test_golden_xception(golden: Golden) -> None:
    arrays = golden("xception65_timm_features")
    backbone = build_backbone("xception65").double().eval()
    # The numbers were drawn under the names of a flattened module: stem_0.conv.weight.
    fill(backbone, int(arrays["salt"]), lambda key: re.sub(r"^(stem|blocks)\.(\d+)", r"\1_\2", key))
    c1, c4 = backbone(golden_input(arrays))
    assert_golden(c1[:, ::8], arrays["c1"])
    assert_golden(c4[:, ::32], arrays["c4"])


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("name", MODELS)
def test_every_combination(name: str, backbone: str) -> None:
    model = on_meta(name, backbone, 5)
    output = model(torch.empty(2, 3, 65, 97, device="meta"))
    low, high = model.backbone.channels
    assert (low, high) == {"resnet18": (64, 512), "resnet34": (64, 512)}.get(backbone, (256, 2048))
    size = {4: (17, 25), 8: (9, 13), 16: (5, 7)}[
        4 if name == "deeplabv3plus" else 16 if backbone == "xception65" else 8
    ]
    channels = {"deeplabv3plus": 256, "deeplabv2": high, "pspnet": high // 4}[name]
    assert isinstance(output, SegOutput)
    assert output.logits.shape == (2, 5, *size)
    assert output.features.shape == (2, channels, *size)


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_the_classifier_of_features(name: str) -> None:
    """Also in training: what the losses call features is what the classifier saw, after dropout."""
    model = small(name).train()
    output = model(small_input())
    last = {"deeplabv3plus": ["classifier"], "pspnet": ["head.conv5.5"]}
    layers = last.get(name, [f"classifier.{i}" for i in range(4)])
    expected = torch.stack([model.get_submodule(layer)(output.features) for layer in layers]).sum(0)
    torch.testing.assert_close(output.logits, expected)
    output.logits.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "dilated", "plain"), [("resnet18", 8, 32), ("resnet50", 8, 32), ("xception65", 16, 32)]
)
@torch.no_grad()
def test_dilation_only_adds_pixels(name: str, dilated: int, plain: int) -> None:
    """At every n-th pixel the dilated network's map is the undilated one's: the same neighbours count."""
    fine, coarse = (build_backbone(name, stride).double().eval() for stride in (dilated, plain))
    fill(fine, 0)
    coarse.load_state_dict(fine.state_dict())
    images = small_input(1, 65, 97).double()
    step = plain // dilated
    expected = coarse(images)[1]
    assert expected.shape[2:] == (3, 4)
    torch.testing.assert_close(fine(images)[1][:, :, ::step, ::step], expected)


@pytest.mark.parametrize(
    ("name", "stride", "rates"),
    [
        ("deeplabv3plus", 8, [12, 24, 36]),
        ("deeplabv3plus", 16, [6, 12, 18]),
        ("deeplabv2", 8, [6, 12, 18, 24]),
        ("deeplabv2", 16, [3, 6, 9, 12]),
    ],
)
def test_rates_follow_the_output_stride(name: str, stride: int, rates: list[int]) -> None:
    model = on_meta(name, "resnet18", 2, output_stride=stride)
    heads = [
        m for key, m in model.named_modules() if isinstance(m, nn.Conv2d) and not key.startswith("backbone.")
    ]
    assert [m.dilation[0] for m in heads if m.dilation[0] > 1] == rates


def test_fresh_weights() -> None:
    torch.manual_seed(3)
    model = small()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all()
            assert (module.bias == 0).all()
    weight = model.get_parameter("backbone.layer4.1.conv2.weight")
    assert weight.std().item() == pytest.approx((2 / (512 * 9)) ** 0.5, rel=0.01)
    depthwise = build_backbone("xception65").get_parameter("blocks.19.stack.conv3.conv_dw.weight")
    assert depthwise.std().item() == pytest.approx((2 / 9) ** 0.5, rel=0.03)
    torch.manual_seed(3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), small().parameters(), strict=True))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("training", [False, True])
def test_compiles_without_a_break(name: str, training: bool) -> None:
    model = small(name).train(training)
    for module in model.modules():
        if isinstance(module, nn.Dropout | nn.Dropout2d):
            module.p = 0.0
    images = small_input()
    torch._dynamo.reset()
    output = torch.compile(model, fullgraph=True, backend="eager")(images)
    assert isinstance(output, SegOutput)
    expected = model(images)
    torch.testing.assert_close(output.logits, expected.logits)
    torch.testing.assert_close(output.features, expected.features)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_channels_last_and_autocast(name: str) -> None:
    model = small(name).eval()
    images = small_input()
    expected = model(images)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # absent from torch's stubs
    other = model(images.to(memory_format=torch.channels_last))
    assert other.features.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(
        other.logits, expected.logits, rtol=1e-4, atol=1e-4 * expected.logits.abs().max().item()
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = model(images)
    assert half.logits.dtype == half.features.dtype == torch.bfloat16
    for got, want in zip(half, expected, strict=True):
        assert (got - want).norm() < 0.05 * want.norm()


@pytest.mark.parametrize("name", ["deeplabv3plus", "pspnet"])
def test_one_image_in_training(name: str) -> None:
    model = small(name).train()
    with pytest.raises(
        ValueError, match=r"^batch size: expected at least 2 images in training .*, got 1: use"
    ) as error:
        model(small_input(1))
    assert "\n" not in str(error.value)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    assert model(small_input(1)).logits.isfinite().all()


def test_one_image_in_training_is_enough_where_norms_share_statistics() -> None:
    """With one image a process, a norm that sums over processes must be let pass."""

    class Shared(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return x

    model = small().train()
    gap = cast(nn.Sequential, model.get_submodule("head.b4.gap"))
    gap[2] = Shared(64)
    assert model(small_input(1)).logits.isfinite().all()


def test_one_image_in_training_is_enough_without_global_pooling() -> None:
    assert small("deeplabv2").train()(small_input(1)).logits.isfinite().all()


def test_head_lr_multiplier() -> None:
    assert [head_lr_multiplier(name) for name in MODELS] == [10.0, 1.0, 10.0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: build_model("unet", "resnet18", 2),
            "model: expected one of deeplabv3plus, deeplabv2, pspnet, got 'unet'",
        ),
        (lambda: build_model("pspnet", "vgg", 2), "backbone: expected one of resnet18, .*, got 'vgg'"),
        (lambda: build_model("pspnet", "resnet18", 0), "num_classes: expected at least 1, got 0"),
        (
            lambda: build_model("pspnet", "resnet18", 2, output_stride=4),
            "output_stride: expected one of 8, 16, 32, got 4",
        ),
        (lambda: head_lr_multiplier("unet"), "model: expected one of"),
        (lambda: small()(torch.zeros(2, 1, 8, 8)), r"images: expected shape \[B,3,H,W\], got \[2, 1, 8, 8\]"),
        (lambda: small()(torch.zeros(3, 8, 8)), r"images: expected shape \[B,3,H,W\], got \[3, 8, 8\]"),
    ],
)
def test_bad_arguments(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def imagenet_state(backbone: str) -> dict[str, Tensor]:
    """What a public ImageNet checkpoint holds: the backbone, filled, and a classifier."""
    module = build_backbone(backbone)
    fill(module, 7)
    head = "head.fc" if backbone == "xception65" else "fc"
    return {**module.state_dict(), f"{head}.weight": torch.zeros(4, 2), f"{head}.bias": torch.zeros(4)}


def same(module: nn.Module, state: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, state[key]) for key, value in module.state_dict().items())


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of torch's."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert torch.hub.get_dir() == str(tmp_path / "hub")
    return tmp_path / "hub" / "checkpoints"


def publish(state: dict[str, Tensor], folder: Path, digits: str | None = None) -> Path:
    """Save a checkpoint under a name that ends in its hash."""
    folder.mkdir(parents=True, exist_ok=True)
    plain = folder / "plain.pth"
    torch.save(state, plain)
    return plain.rename(folder / f"net-{digits or hashlib.sha256(plain.read_bytes()).hexdigest()[:8]}.pth")


@pytest.mark.parametrize("backbone", ["resnet18", "xception65"])
def test_imagenet_weights(backbone: str, hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = imagenet_state(backbone)
    file = publish(state, tmp_path / "web")
    monkeypatch.setitem(pretrained.IMAGENET_URLS, backbone, file.as_uri())
    model = build_model("deeplabv2", backbone, 2)
    classifier = model.get_submodule("classifier")
    head = {key: value.clone() for key, value in classifier.state_dict().items()}
    done = load_pretrained(model, backbone, "imagenet")
    assert done == f"ImageNet weights of {backbone} from {hub / file.name}"
    assert same(model.backbone, state)
    assert same(classifier, head)
    file.unlink()
    again = build_model("deeplabv2", backbone, 2)
    load_pretrained(again, backbone, "imagenet")
    assert same(again.backbone, state), "the second time comes from the cache"


def test_imagenet_addresses_name_every_backbone() -> None:
    assert tuple(pretrained.IMAGENET_URLS) == BACKBONES
    assert all(
        re.fullmatch(r"https://\S+-[0-9a-f]{8}\.pth", url) for url in pretrained.IMAGENET_URLS.values()
    )


def test_imagenet_offline(hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = (tmp_path / "absent" / "net-01234567.pth").as_uri()
    monkeypatch.setitem(pretrained.IMAGENET_URLS, "resnet18", url)
    with pytest.raises(ConnectionError) as error:
        load_pretrained(small(), "resnet18", "imagenet")
    message = str(error.value)
    assert message.startswith(f"{url}: download failed")
    assert message.endswith(f"put that file at {hub / 'net-01234567.pth'}")
    assert "\n" not in message


def test_imagenet_hash(hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong download never reaches the cache, and a damaged file there is refused."""
    file = publish({"weight": torch.zeros(1)}, tmp_path / "web", digits="01234567")
    monkeypatch.setitem(pretrained.IMAGENET_URLS, "resnet18", file.as_uri())
    with pytest.raises(ConnectionError, match=r'download failed .*expected "01234567"'):
        load_pretrained(small(), "resnet18", "imagenet")
    assert not list(hub.iterdir())
    (hub / file.name).write_bytes(b"half a file")
    with pytest.raises(ValueError, match=r"net-01234567\.pth: damaged, .* begins with 01234567"):
        load_pretrained(small(), "resnet18", "imagenet")


def test_none_keeps_fresh_weights() -> None:
    model = small()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert load_pretrained(model, "resnet18", "none") == "fresh weights"
    assert same(model, before)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {f"module.{key}": value for key, value in state.items()},
        lambda state: {f"module._orig_mod.{key}": value for key, value in state.items()},
        lambda state: {"model": state, "epoch": 3, "config": {"name": "demo"}},
        lambda state: {"state_dict": {f"module.{key}": value for key, value in state.items()}},
        lambda state: {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")},
    ],
)
def test_whole_models(wrap: Callable[[dict[str, Tensor]], dict[str, object]], tmp_path: Path) -> None:
    source, target = small(), small()
    fill(source, 5)
    torch.save(wrap(source.state_dict()), tmp_path / "model.pth")
    assert load_pretrained(target, "resnet18", str(tmp_path / "model.pth")).startswith(
        "weights of the model from "
    )
    assert same(target, source.state_dict())


def test_backbone_alone(tmp_path: Path) -> None:
    state = imagenet_state("resnet18")
    torch.save(state, tmp_path / "backbone.pth")
    model = small()
    assert load_weights(model, tmp_path / "backbone.pth") == "backbone"
    assert same(model.backbone, state)


def test_mismatch_names_keys_and_loads_nothing(tmp_path: Path) -> None:
    path = tmp_path / "other.pth"
    model = small(num_classes=3)
    before = {key: value.clone() for key, value in model.state_dict().items()}

    torch.save(small(num_classes=2).state_dict(), path)
    with pytest.raises(ValueError, match="does not fit the model: 2 of another shape") as error:
        load_weights(model, path)
    assert str(error.value) == (
        f"{path}: does not fit the model: 2 of another shape: "
        "classifier.weight [2, 256, 1, 1] instead of [3, 256, 1, 1], classifier.bias [2] instead of [3]"
    )

    torch.save(small("deeplabv2").state_dict(), path)
    with pytest.raises(
        ValueError, match=r"missing: head\.b0\.0\.weight, .*, \.\.\.; 8 unexpected: classifier\.0\.weight"
    ):
        load_weights(model, path)

    torch.save(build_backbone("resnet34").state_dict(), path)
    with pytest.raises(
        ValueError, match=r"does not fit the backbone: \d+ unexpected: layer1\.2\.conv1\.weight"
    ):
        load_weights(model, path)
    assert same(model, before)


def test_files_that_are_no_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "notes.pth"
    with pytest.raises(FileNotFoundError, match=r"notes\.pth: expected a checkpoint file, found nothing"):
        state_dict_from(path)
    with pytest.raises(FileNotFoundError, match="found a folder"):
        state_dict_from(tmp_path)

    torch.save(small().state_dict(), path)
    whole = path.read_bytes()
    torch.save({"weights": Path("runs")}, tmp_path / "code.pth")
    for content in (
        b"",
        b"not weights at all\n",
        bytes(range(256)),
        whole[: len(whole) // 2],
        (tmp_path / "code.pth").read_bytes(),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"notes\.pth: not a checkpoint") as error:
            state_dict_from(path)
        assert "\n" not in str(error.value)

    for value, got in (
        ([1], "list"),
        ({}, "an empty dictionary"),
        ({"epoch": 3}, "int under 'epoch'"),
        (torch.ones(1), "Tensor"),
    ):
        torch.save(value, path)
        with pytest.raises(ValueError, match=f"notes\\.pth: expected .*, got {got}"):
            state_dict_from(path)
