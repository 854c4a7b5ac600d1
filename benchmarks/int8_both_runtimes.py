"""Int8 files of five kinds of networks, scored in ONNX Runtime and OpenVINO beside PyTorch's simulation.

    python benchmarks/int8_both_runtimes.py [--only vit,unet] [--log FILE]

Each is trained for seconds on the digits of scikit-learn, 1,200 images of 16 x 16 pixels, and scored on the other 597:
top-1, and for the U-Net the share of pixels whose foreground is told right from an image with noise. A network that is
in the log already is left out, so a run that stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from tersenet.bricks.settle import settle
from tersenet.deploy.onnx import export_onnx
from tersenet.deploy.runtimes import open_file
from tersenet.quantization.quantize import Quantize
from tersenet.task import Task

LARGEST_LOSS = 0.5  # points, of each file against the simulation
RUNTIMES = ("onnxruntime", "openvino")


class ViT(nn.Module):
    """Patches of 4 x 4, a class token, positions, two blocks; the class token and the mean of the others are read."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 4, 4)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.randn(1, 17, width) * 0.1)
        self.blocks = nn.ModuleList(_Block(width) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return self.head(torch.cat([x[:, 0], x[:, 1:].mean(1)], 1))


class _Block(nn.Module):
    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        heads = self.qkv(self.norm1(x)).reshape(n, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(heads[0], heads[1], heads[2])
        x = x + self.out(mixed.transpose(1, 2).reshape(n, length, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class ConvNeXt(nn.Module):
    """Depthwise 7 x 7, layer norm over channels, GELU, layer scale."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 2, 2)
        self.blocks = nn.Sequential(_ConvNeXtBlock(width), _ConvNeXtBlock(width))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.stem(x)).mean((2, 3))))


class _ConvNeXtBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise, self.norm = nn.Conv2d(width, width, 7, padding=3, groups=width), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.scale = nn.Parameter(torch.full((width,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        return x + (self.down(F.gelu(self.up(y))) * self.scale).permute(0, 3, 1, 2)


class UNet(nn.Module):
    """Down, up and across: (N, 1, 16, 16) -> (N, 2, 16, 16)."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.first, self.second = _double(1, width), _double(width, 2 * width)
        self.up, self.third = nn.ConvTranspose2d(2 * width, width, 2, 2), _double(2 * width, width)
        self.last = nn.Conv2d(width, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        deep = self.up(self.second(F.max_pool2d(x, 2)))
        return self.last(self.third(torch.cat([x, deep], 1)))


def _double(inputs: int, outputs: int) -> nn.Sequential:
    first, second = nn.Conv2d(inputs, outputs, 3, padding=1), nn.Conv2d(outputs, outputs, 3, padding=1)
    return nn.Sequential(first, nn.BatchNorm2d(outputs), nn.ReLU(), second, nn.BatchNorm2d(outputs), nn.ReLU())


class MobileNetV3(nn.Module):
    """Inverted residuals with squeeze and excitation and hard swish."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        stem = nn.Conv2d(1, width, 3, 2, 1, bias=False)
        self.stem = nn.Sequential(stem, nn.BatchNorm2d(width), nn.Hardswish())
        self.blocks = nn.Sequential(_Inverted(width), _Inverted(width))
        self.hidden, self.head = nn.Linear(width, 32), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.adaptive_avg_pool2d(self.blocks(self.stem(x)), 1).flatten(1)
        return self.head(F.hardswish(self.hidden(x)))


class _Inverted(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        wide = 2 * width
        self.up = nn.Sequential(nn.Conv2d(width, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.Hardswish())
        depthwise = nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False)
        self.depthwise = nn.Sequential(depthwise, nn.BatchNorm2d(wide), nn.Hardswish())
        self.squeeze, self.excite = nn.Conv2d(wide, 8, 1), nn.Conv2d(8, wide, 1)
        self.down = nn.Sequential(nn.Conv2d(wide, width, 1, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.depthwise(self.up(x))
        y = y * F.hardsigmoid(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(y, 1)))))
        return x + self.down(y)


class PreActivation(nn.Module):
    """Batch norm and ReLU before each convolution, so that no norm can be folded but those between two."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, 2, 1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(5))
        self.convolutions = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(4))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in range(2):
            y = self.convolutions[2 * block](F.relu(self.norms[2 * block](x)))
            x = x + self.convolutions[2 * block + 1](F.relu(self.norms[2 * block + 1](y)))
        return self.head(F.relu(self.norms[4](x)).mean((2, 3)))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "vit": ViT,
    "convnext": ConvNeXt,
    "unet": UNet,
    "mobilenet_v3": MobileNetV3,
    "preactivation_resnet": PreActivation,
}


def digits(name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images and targets to train on, then to score on."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32)[:, None] / 16
    images = F.interpolate(images, size=(16, 16), mode="bilinear")
    labels = torch.tensor(found.target)
    generator = torch.Generator().manual_seed(0)
    if name == "unet":
        labels = (images[:, 0] > 0.5).long()
        images = images + 0.3 * torch.randn(images.shape, generator=generator)
    order = torch.randperm(len(images), generator=generator)
    images, labels = (images[order] - 0.5) / 0.5, labels[order]
    return images[:1200], labels[:1200], images[1200:], labels[1200:]


def train(name: str, epochs: int) -> tuple[nn.Module, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """A network of that name, trained; and its data."""
    data = digits(name)
    torch.manual_seed(0)
    model = NETWORKS[name]()
    optimizer = torch.optim.AdamW(model.parameters(), 4e-3)
    steps = epochs * (len(data[0]) // 100)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for _ in range(epochs):
        for batch in torch.randperm(len(data[0])).split(100):
            optimizer.zero_grad()
            F.cross_entropy(model(data[0][batch]), data[1][batch]).backward()
            optimizer.step()
            schedule.step()
    return model.eval(), data


def measure(name: str, folder: Path, epochs: int = 8) -> dict[str, Any]:
    """Scores in percent: float, simulated, and of the int8 file in each runtime."""
    model, (images, _, test, targets) = train(name, epochs)
    task = Task(example=images[:2], calibrate=[(part,) for part in images[:512].split(128)], quiet=True)
    with torch.no_grad():
        reference = model(test).numpy()
    quantized, plan = Quantize().run(model, task)  # which folds the norms of the model itself
    quantized = settle(quantized.eval())
    path = export_onnx(quantized, images[:2], folder / f"{name}.onnx")

    def score(outputs: NDArray[Any]) -> float:
        return round(100 * float((outputs.argmax(1) == targets.numpy()).mean()), 3)

    with torch.no_grad():
        simulated = quantized(test).numpy()
    scores = {"float": score(reference), "simulated": score(simulated)}
    errors = {}
    for runtime in RUNTIMES:
        outputs = open_file(path, runtime, threads=1).run(test.numpy())
        scores[runtime] = score(outputs)
        errors[runtime] = float(np.abs(outputs - simulated).max() / np.abs(simulated).max())
    return {"scores": scores, "largest_error": errors, "float_layers": len(plan["float"]), "images": len(test)}


def within(scores: dict[str, float]) -> bool:
    """Whether each runtime scores as the simulation does, to LARGEST_LOSS points."""
    return all(abs(scores[runtime] - scores["simulated"]) <= LARGEST_LOSS for runtime in RUNTIMES)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(NETWORKS))
    parser.add_argument("--log", type=Path, default=Path(__file__).parent / "results" / "int8_both_runtimes.json")
    given = parser.parse_args()
    torch.set_num_threads(1)
    log: dict[str, Any] = json.loads(given.log.read_text()) if given.log.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        for name in given.only.split(","):
            if name not in log:
                log[name] = measure(name, Path(folder), epochs=30)
                given.log.write_text(json.dumps(log, indent=1) + "\n")
            print(f"{name:22s} {log[name]['scores']} {'ok' if within(log[name]['scores']) else 'OFF'}", flush=True)


if __name__ == "__main__":
    main()
