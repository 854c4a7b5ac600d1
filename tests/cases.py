"""One table: a tiny model, a tiny task, and settings for every step. The laws run all of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from tersenet.bricks.shortcut import PadShortcut
from tersenet.distill.soft_targets import SoftTargets
from tersenet.pruning.drop_blocks import DropBlocks
from tersenet.pruning.prune_activations import PruneActivations
from tersenet.pruning.prune_channels import PruneChannels
from tersenet.pruning.prune_weights import PruneWeights
from tersenet.pruning.ramp import Ramp
from tersenet.pruning.rewind import Rewind
from tersenet.quantization.binarise import Binarise
from tersenet.quantization.quantize import Quantize
from tersenet.quantization.quantize_aware import QuantizeAware
from tersenet.quantization.ternarise import Ternarise
from tersenet.repeat import Repeat
from tersenet.resize import Resize
from tersenet.rewrite.fold_batch_norm import FoldBatchNorm
from tersenet.rewrite.settle import Settle
from tersenet.search.search import Search
from tersenet.size.keep_grids import KeepGrids
from tersenet.size.share_weights import ShareWeights
from tersenet.size.shrink_file import ShrinkFile
from tersenet.step import Chain, Step
from tersenet.task import Preparation, Task
from tersenet.train import Train


class Block(nn.Module):
    """A residual block that keeps the shape, so that it can be dropped: (N, C, H, W) -> (N, C, H, W)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.bn(self.conv(x)))


class Tiny(nn.Module):
    """A residual net with what image nets are made of: norms, a padded shortcut, a depthwise convolution, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.block = Block(8)
        self.conv2 = nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(16)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False)
        self.bn3 = nn.BatchNorm2d(16)
        self.pointwise = nn.Conv2d(16, 16, 1, bias=False)
        self.bn4 = nn.BatchNorm2d(16)
        self.shortcut = PadShortcut(stride=2, before=4, after=4)
        self.dropout = nn.Dropout(0.1)
        self.linear = nn.Linear(16, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(torch.relu(self.bn1(self.conv1(x))))
        y = torch.relu(self.bn2(self.conv2(x)))
        y = torch.relu(self.bn3(self.depthwise(y)))
        y = torch.relu(self.bn4(self.pointwise(y)) + self.shortcut(x))
        return self.linear(self.dropout(y.mean(dim=(2, 3))))


def tiny(seed: int = 0) -> nn.Module:
    """A net with settled norm statistics, as a trained one has."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Tiny()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, 0.0, 0.2)
                nn.init.normal_(module.running_mean, 0.0, 0.2)
                nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.eval()


def batches(count: int = 4, size: int = 16, seed: int = 1) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(size, 3, 12, 12, generator=generator), torch.randint(6, (size,), generator=generator))
        for _ in range(count)
    ]


def task_for(model: nn.Module) -> Task:
    data = batches()
    return Task(
        example=data[0][0][:2],
        train=data,
        calibrate=data,
        test=batches(2, seed=2),
        original=model,
        preparation=Preparation(size=(12, 12), labels=tuple("abcdef")),
        quiet=True,
    )


@dataclass(frozen=True)
class Case:
    """Args:
    step: with settings that change something.
    zero: the same step at zero strength; None where the step has none, as quantize.
    tolerance: how far outputs may be away at zero strength, as a share of the largest output.
    model: builds the model that the step starts from, by seed.
    family: one step per family stands in every pair of `make test`.
    """

    step: Step
    zero: Step | None = None
    tolerance: float = 1e-5
    model: Callable[[int], nn.Module] = field(default=tiny)


def quantized(seed: int) -> nn.Module:
    model = tiny(seed)
    return Quantize().run(model, task_for(model))[0]


def on_grids(seed: int) -> nn.Module:
    model = tiny(seed)
    return ShrinkFile(price=1e-8).run(model, task_for(model))[0]


CASES = {
    "drop_blocks": Case(DropBlocks(count=1), zero=DropBlocks()),
    "fold_batch_norm": Case(FoldBatchNorm(), zero=FoldBatchNorm()),
    "prune_channels": Case(PruneChannels(sparsity=0.5), zero=PruneChannels(sparsity=0.0)),
    "prune_activations": Case(PruneActivations(sparsity=0.7), zero=PruneActivations(sparsity=0.0)),
    "prune_weights": Case(PruneWeights(sparsity=0.5), zero=PruneWeights(sparsity=0.0)),
    "prune_weights_in_blocks": Case(
        PruneWeights(sparsity=0.5, pattern="4x1", refit=True), zero=PruneWeights(sparsity=0.0, pattern="4x1")
    ),
    "prune_while_training": Case(
        Chain(steps=(PruneWeights(sparsity=0.0), Train(epochs=1, companions=(Ramp(sparsity=0.5, updates=2),))))
    ),
    "quantize": Case(Quantize(), zero=Quantize(), tolerance=0.05),
    "quantize_weights_only": Case(Quantize(activations=None), zero=Quantize(activations=None), tolerance=0.03),
    **{
        f"quantize_{step.weights}": Case(step)
        for step in (
            Quantize(weights="int3", activations=None, granularity=4, symmetric=False),
            Quantize(weights="fp8_e4m3", activations=None),
            Quantize(weights="bf16", activations=None),
            Quantize(weights="pot4", activations=None),
            Quantize(weights="kmeans4", activations=None, rounding="repaired", correct_bias=True),
            Quantize(weights="pq", activations=None, piece=3),
            Quantize(weights="binary2", activations=None),
            Quantize(weights="ternary", rounding="repaired"),
            Quantize(weights="int4", rounding="repaired", correct_bias=True, formats={"linear": "int8"}),
        )
    },
    "quantize_aware": Case(
        QuantizeAware(weights="int4", activations="int6"),
        zero=QuantizeAware(weights="int8", activations="int8"),
        tolerance=0.05,
    ),
    "quantize_aware_trained": Case(
        Chain(steps=(QuantizeAware(weights="int3", activations="int5"), Train(epochs=1), FoldBatchNorm(), Settle()))
    ),
    "quantize_aware_weights_only": Case(QuantizeAware(weights="int3", activations=None, method="dorefa")),
    "binarise": Case(Binarise()),
    "binarise_in_two_stages": Case(
        Chain(
            steps=(
                Binarise(method="xnor", stage="activations"),
                Train(epochs=1),
                Binarise(method="xnor", stage="weights"),
            )
        )
    ),
    "ternarise": Case(Ternarise(method="ttq")),
    "train": Case(
        Train(epochs=1, learning_rate=0.01, companions=(SoftTargets(),)),
        zero=Train(epochs=0, companions=(SoftTargets(),)),
    ),
    "search": Case(
        Search(steps=(DropBlocks(), PruneChannels(), FoldBatchNorm()), macs="0.7x", images=16),
        zero=Search(steps=(DropBlocks(), PruneChannels(), FoldBatchNorm()), macs="1x", images=16),
    ),
    "repeat": Case(
        Repeat(steps=(PruneChannels(sparsity=0.25),), until_drop=None, at_most=2),
        zero=Repeat(steps=(PruneChannels(sparsity=0.0),), until_drop=None, at_most=2),
    ),
    "resize": Case(Resize(sizes=("8x10",)), zero=Resize(sizes=("12",))),
    "rewind": Case(Rewind(only=("linear",)), zero=Rewind(only=("linear",))),
    "settle": Case(Settle(), zero=Settle(), model=quantized),
    "share_weights": Case(ShareWeights(bits=3), zero=ShareWeights(bits=8), tolerance=0.05),
    "shrink_file": Case(ShrinkFile(price=1e-8), zero=ShrinkFile(price=1e-14), tolerance=0.05),
    "keep_grids": Case(KeepGrids(), zero=KeepGrids(), model=on_grids),
    "keep_grids_in_training": Case(
        Chain(
            steps=(ShrinkFile(price=1e-8), KeepGrids(), Train(epochs=1, optimizer="adam", learning_rate=0.02)),
        ),
        zero=Chain(steps=(ShrinkFile(price=1e-14), KeepGrids())),
        tolerance=0.05,
    ),
    "chain": Case(
        Chain(steps=(PruneChannels(sparsity=0.25), FoldBatchNorm())),
        zero=Chain(steps=(FoldBatchNorm(), Train(epochs=0))),
    ),
}
# One per family: these pair with each other in `make test`; all of CASES pair in `make test-all`.
FAMILIES = ("fold_batch_norm", "prune_channels", "prune_weights", "quantize", "train", "settle", "shrink_file")
