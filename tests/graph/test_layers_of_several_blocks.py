"""A layer that several blocks hold, such as the position encodings of CoaT: one layer, called several times."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tersenet.bricks.settle import settle
from tersenet.deploy.checked import checked
from tersenet.deploy.onnx import export_onnx
from tersenet.deploy.reference import Reference
from tersenet.graph.trace import trace
from tersenet.pruning.prune_channels import PruneChannels
from tersenet.quantization.quantize import Quantize
from tersenet.step import Step
from tersenet.task import Task

X = torch.randn(16, 3, 10, 10, generator=torch.Generator().manual_seed(0))
TASK = Task(example=X[:2], calibrate=[X], quiet=True)


class Positions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj, self.norm = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x))


class Block(nn.Module):
    def __init__(self, positions: nn.Module) -> None:
        super().__init__()
        self.positions, self.first, self.second = positions, nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.first(x + self.positions(x)).relu())


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.positions = nn.Conv2d(3, 8, 3), Positions()
        self.blocks = nn.Sequential(*(Block(self.positions) for _ in range(3)))
        self.head = nn.Conv2d(8, 4, 1)
        self.positions.norm.running_mean.normal_()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x))).mean((2, 3))


def test_it_has_one_name() -> None:
    graph = trace(Net().eval(), X[:2])
    called = [str(node.target) for node in graph.graph.nodes if node.op == "call_module"]
    assert [name for name in called if "positions" in name] == 3 * ["positions.proj", "positions.norm"]


@pytest.mark.parametrize(
    "step",
    [PruneChannels(sparsity=0.5, residual=True), Quantize(), Quantize(weights="int4", activations=None)],
    ids=["cut", "int8", "int4 weights"],
)
def test_it_is_changed_as_one(step: Step, tmp_path: Path) -> None:
    model = Net().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        changed, plan = step.run(copy.deepcopy(model), TASK)
    changed = settle(changed)
    named = plan.get("kept") or plan["layers"]
    assert "positions.proj" in named
    assert not [name for name in named if name.startswith("blocks") and "positions" in name]
    path = export_onnx(changed, X[:2], tmp_path / "m.onnx")
    found = checked(path, ["onnxruntime", "openvino"], Reference(changed, X[:2], [X]))
    assert all(each.agrees for each in found.values())
