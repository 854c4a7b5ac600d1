"""The reference networks: counts from the papers and torchvision, names, shapes, capture, and one published score."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from torch import nn

from tersenet import models
from tersenet.errors import ModelError
from tersenet.models.cifar_resnet import CifarResNet
from tersenet.models.mobilenet_v2 import nearest_multiple
from tersenet.models.sources import open_model

DATA = Path(__file__).parents[2].parent / "shared" / "data"

# Parameters as published by torchvision (and, for the CIFAR ResNets, by Idelbayev's repository, table in its README:
# 0.27M, 0.46M, 0.66M, 0.85M, 1.7M); entries are those of torchvision's state dicts.
COUNTS = {
    "resnet20": (269_722, 116),
    "resnet32": (464_154, 188),
    "resnet44": (658_586, 260),
    "resnet56": (853_018, 332),
    "resnet110": (1_727_962, 656),
    "lenet_300_100": (266_610, 6),
    "lenet5": (431_080, 8),
    "resnet18": (11_689_512, 122),
    "resnet34": (21_797_672, 218),
    "resnet50": (25_557_032, 320),
    "resnet101": (44_549_160, 626),
    "resnet152": (60_192_808, 932),
    "mobilenet_v2": (3_504_872, 314),
    "vgg16": (138_357_544, 32),
    "vgg16_bn": (138_365_992, 97),
}


def macs(model: nn.Module, x: torch.Tensor) -> int:
    """Multiply-adds of convolutions and linear layers for one input, counted from what each layer returns."""
    total = 0

    def count(layer: nn.Module, _: object, output: torch.Tensor) -> None:
        nonlocal total
        total += output[0].numel() * layer.weight[0].numel()  # type: ignore[operator,index]

    hooks = [
        layer.register_forward_hook(count) for layer in model.modules() if isinstance(layer, nn.Conv2d | nn.Linear)
    ]
    model.eval()(x)
    for hook in hooks:
        hook.remove()
    return total


@pytest.mark.parametrize("name", COUNTS)
def test_parameters_and_entries(name: str) -> None:
    with torch.device("meta"):
        model = models.build(name)
    assert (sum(p.numel() for p in model.parameters()), len(model.state_dict())) == COUNTS[name]


def test_networks_for_small_images_keep_enough_pixels() -> None:
    """Half of the paper's widths; 4x4 pixels reach the last convolution of MobileNetV2, so that it has 16 times as many
    multiply-adds there as weights."""
    half, whole = models.build("mobilenet_v2_cifar_half").eval(), models.build("mobilenet_v2_cifar").eval()
    x = torch.zeros(1, 3, 32, 32)
    assert half.features(x).shape == whole.features(x).shape == (1, 1280, 4, 4)  # type: ignore[operator]
    assert (half.features[3].conv[2].out_channels, whole.features[3].conv[2].out_channels) == (16, 24)  # type: ignore
    vgg = models.build("vgg16_bn_cifar_half").eval()
    assert vgg.features(x).shape == (1, 256, 1, 1)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet20", 40_551_040),
        ("resnet56", 125_485_696),
        ("resnet18", 1_814_073_344),
        ("resnet50", 4_089_184_256),
        ("mobilenet_v2", 300_774_272),
        ("vgg16", 15_470_264_320),
    ],
)
def test_multiply_adds(name: str, expected: int) -> None:
    with torch.device("meta"):
        model, x = models.build(name), torch.empty(1, 3, *models.reference(name).preparation.size)
    assert macs(model, x) == expected


NAMES = {
    "resnet20": "conv1.weight bn1.running_mean layer2.0.conv1.weight layer3.2.bn2.bias linear.weight linear.bias",
    "resnet18": "conv1.weight layer1.0.conv2.weight layer2.0.downsample.0.weight layer4.1.bn2.bias fc.weight fc.bias",
    "resnet50": "layer1.0.downsample.1.running_var layer3.5.conv3.weight layer4.2.bn3.weight",
    "mobilenet_v2": "features.0.0.weight features.1.conv.0.0.weight features.1.conv.1.weight features.1.conv.2.bias "
    "features.2.conv.1.1.running_mean features.17.conv.3.weight features.18.1.bias classifier.1.weight",
    "vgg16": "features.0.weight features.28.bias classifier.0.weight classifier.3.bias classifier.6.bias",
    "vgg16_bn": "features.1.running_var features.40.weight features.41.bias classifier.6.weight",
}


@pytest.mark.parametrize("name", NAMES)
def test_names_are_those_of_published_weights(name: str) -> None:
    with torch.device("meta"):
        assert not set(NAMES[name].split()) - set(models.build(name).state_dict())


# Those that torchvision has too; the linear layers of its VGG-16 start from other numbers.
TORCHVISION = ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "mobilenet_v2", "vgg16", "vgg16_bn"]


@pytest.mark.parametrize("name", TORCHVISION)
def test_equals_torchvision(name: str) -> None:
    """Same names and shapes; with its numbers, the same outputs; from one seed, the same initial numbers, so the order
    of layers is the same too."""
    torch.manual_seed(0)
    theirs = open_model(f"torchvision:{name}")[0]
    torch.manual_seed(0)
    ours = models.build(name)
    found, expected = ours.state_dict(), theirs.state_dict()
    assert list(found) == list(expected)
    alike = [key for key in found if torch.equal(found[key], expected[key])]
    assert alike == [
        key
        for key in found
        if not (name.startswith("vgg") and key.startswith("classifier.") and key.endswith("weight"))
    ]
    ours.load_state_dict(expected)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(ours.eval()(x), theirs.eval()(x))


# Residual adds and activations, counted in the papers' tables.
OPERATORS = {
    "digits": (1, 3),
    "resnet20": (9, 1 + 2 * 9),
    "resnet18": (8, 1 + 2 * 8),
    "mobilenet_v2": (10, 1 + 16 * 2 + 1 + 1),
    "vgg16_bn_cifar": (0, 13 + 2),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_captured_with_an_open_batch(name: str) -> None:
    torch.manual_seed(0)
    model, preparation = models.build(name, num_classes=7).eval(), models.reference(name).preparation
    size = (64, 64) if preparation.size == (224, 224) else preparation.size
    x = torch.randn(3, preparation.channels, *size)
    program = torch.export.export(model, (x[:2],), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    called = [str(node.target).split(".")[1].rstrip("_") for node in program.graph.nodes if node.op == "call_function"]
    activations = sum(called.count(kind) for kind in ("relu", "relu6", "hardtanh"))
    assert (called.count("add"), activations) == OPERATORS[name]
    with torch.no_grad():
        expected = model(x)
        assert expected.shape == (3, 7)
        torch.testing.assert_close(program.module()(x), expected)
        torch.testing.assert_close(program.module()(x[:1]), expected[:1], rtol=1e-4, atol=1e-5)


def test_shortcut_of_a_new_stage_pads_both_sides() -> None:
    block = CifarResNet().layer2[0]
    x = torch.randn(1, 16, 4, 4)
    out = block.shortcut(x)  # type: ignore[operator,union-attr]
    assert out.shape == (1, 32, 2, 2)
    assert torch.equal(out[:, 8:24], x[:, :, ::2, ::2])
    assert not out[:, :8].any()
    assert not out[:, 24:].any()


def test_blocks_may_differ_by_stage() -> None:
    model = CifarResNet((1, 3, 8), num_classes=3).eval()
    assert [len(stage) for stage in (model.layer1, model.layer2, model.layer3)] == [1, 3, 8]
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 3)


def test_width_of_mobilenet_rounds_as_the_paper_does() -> None:
    assert [nearest_multiple(c) for c in (8, 12, 16, 17, 20, 24 * 0.75)] == [8, 16, 16, 16, 24, 24]
    with torch.device("meta"):
        # timm's mobilenetv2_050 and mobilenetv2_140 have these counts.
        assert sum(p.numel() for p in models.build("mobilenet_v2", width=0.5).parameters()) == 1_968_680
        assert sum(p.numel() for p in models.build("mobilenet_v2", width=1.4).parameters()) == 6_108_776


def test_width_of_the_cifar_vgg() -> None:
    convolutions = [64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
    with torch.device("meta"):
        for width in (1.0, 0.5):
            model = models.build("vgg16_bn_cifar", width=width)
            found = [layer.out_channels for layer in model.modules() if isinstance(layer, nn.Conv2d)]
            linear = [layer.out_features for layer in model.modules() if isinstance(layer, nn.Linear)]
            assert found == [int(width * c) for c in convolutions]
            assert linear == [int(width * 512), int(width * 512), 10]


def test_signals_reach_the_classes_of_the_cifar_vgg() -> None:
    """At the start the logits are as large as what the linear layers read, and no channel is dropped in training."""
    torch.manual_seed(0)
    model = models.build("vgg16_bn_cifar_half").train()
    read: list[torch.Tensor] = []
    model.classifier[0].register_forward_hook(lambda _, inputs, __: read.append(inputs[0]))  # type: ignore
    x = torch.randn(32, 3, 32, 32)
    first = model(x).detach()
    assert 0.3 < float(first.std() / read[0].detach().std()) < 10  # 0.004 with torchvision's deviation of 0.01
    assert torch.equal(model(x), first)


@pytest.mark.parametrize("name", ["mobilenet_v2", "vgg16_bn_cifar"])
@pytest.mark.parametrize("width", [0, -1.0, float("nan")])
def test_width_must_be_positive(name: str, width: float) -> None:
    with pytest.raises(ModelError, match=f"width must be positive, got {width}"):
        models.build(name, width=width)


def test_digits_keeps_its_budget() -> None:
    model = models.build("digits")
    assert sum(p.numel() for p in model.parameters()) == 74_730 < 100_000
    assert macs(model, torch.zeros(1, 1, 8, 8)) == 4_737_344 < 5_000_000


def test_digits_learns_the_digits() -> None:
    """Four short epochs, in 5 seconds, are enough for 95 %; the demonstration trains longer and gets 99 %."""
    images, labels = _digits()
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(images), generator=generator)
    train, held_out = order[360:], order[:360]
    torch.manual_seed(0)
    model = models.build("digits")
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for _ in range(4):
        for batch in train[torch.randperm(len(train), generator=generator)].split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    with torch.no_grad():
        hits = model.eval()(images[held_out]).argmax(1) == labels[held_out]
    assert hits.float().mean() >= 0.95


def _digits() -> tuple[torch.Tensor, torch.Tensor]:
    found = pytest.importorskip("sklearn.datasets").load_digits()
    pixels = torch.tensor(found.images / 16, dtype=torch.float32)[:, None]
    preparation = models.reference("digits").preparation
    assert float(pixels.mean()) == pytest.approx(preparation.mean[0], abs=1e-3)
    assert float(pixels.std()) == pytest.approx(preparation.std[0], abs=1e-3)
    return (pixels - preparation.mean[0]) / preparation.std[0], torch.tensor(found.target)


def test_published_resnet20_scores_what_it_should() -> None:
    """91.73 % on all 10,000 test images; its 95 % range on 500 of them starts at 89 %."""
    weights, images = DATA / "weights" / "cifar10_resnet20.safetensors", DATA / "cifar10" / "test.parquet"
    if not weights.exists() or not images.exists():
        pytest.skip("the reference weights or CIFAR-10 are not beside the project")
    parquet, image = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("PIL.Image")
    numpy = pytest.importorskip("numpy")
    rows = next(parquet.ParquetFile(images).iter_batches(500, columns=["img", "label"])).to_pylist()
    pixels = numpy.stack([numpy.array(image.open(io.BytesIO(row["img"]["bytes"])).convert("RGB")) for row in rows])
    model, preparation = open_model("resnet20", weights)
    x = torch.tensor(pixels).permute(0, 3, 1, 2) / 255
    x = (x - torch.tensor(preparation.mean)[:, None, None]) / torch.tensor(preparation.std)[:, None, None]
    with torch.no_grad():
        hits = model.eval()(x).argmax(1) == torch.tensor([row["label"] for row in rows])
    assert hits.float().mean() >= 0.88


def test_an_unknown_name_lists_near_ones() -> None:
    with pytest.raises(ModelError, match=r"no model named 'resnet57'; did you mean resnet56 or "):
        models.build("resnet57")
    with pytest.raises(ModelError, match="the known ones are digits, resnet20, "):
        models.build("xyzzy")


def test_an_unknown_argument_is_named() -> None:
    with pytest.raises(ModelError, match="resnet20 takes no depth; it takes num_classes"):
        models.build("resnet20", depth=20)


def test_every_reference_says_its_preparation() -> None:
    assert models.names() == list(models.REFERENCES)
    for name, entry in models.REFERENCES.items():
        assert len(entry.preparation.mean) == len(entry.preparation.std) in (1, 3)
        assert entry.summary, name
    assert models.reference("resnet56").preparation.labels[0] == "airplane"
    assert models.reference("resnet56").preparation.labels[9] == "truck"
    assert models.reference("digits").preparation.size == (8, 8)
