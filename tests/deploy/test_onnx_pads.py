"""Padding that convolutions of a file do themselves."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tersenet import Quantize, Task
from tersenet.deploy.onnx import export_onnx
from tersenet.deploy.onnx_pads import fold_pads
from tersenet.deploy.runtimes import open_file


class Same(nn.Module):
    """Two convolutions of stride 2 that pad as TensorFlow does, more behind than in front."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, stride=2)
        self.second = nn.Conv2d(8, 8, 5, stride=2, groups=8)
        self.last = nn.Conv2d(8, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu6(self.first(F.pad(x, (0, 1, 0, 1))))
        x = F.relu6(self.second(F.pad(x, (1, 2, 1, 2))))
        return self.last(x).mean((2, 3))


@pytest.mark.parametrize("bits", ["int8", "int4"])
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_an_int8_file_pads_in_its_convolutions(tmp_path: Path, runtime: str, bits: str) -> None:
    torch.manual_seed(0)
    images = torch.randn(32, 3, 16, 16) + 0.5
    task = Task(example=images[:1], calibrate=[images], quiet=True)
    model, _ = Quantize(activations=bits).run(Same().eval(), task)
    path = export_onnx(model, images[:1], tmp_path / "model.onnx")
    nodes = onnx.load(path).graph.node
    assert Counter(node.op_type for node in nodes)["Pad"] == 0
    pads = [list(each.ints) for node in nodes for each in node.attribute if each.name == "pads"]
    assert [0, 0, 1, 1] in pads
    assert [1, 1, 2, 2] in pads
    with torch.inference_mode():
        wanted = model(images).numpy()
    assert np.abs(open_file(path, runtime, 1).run(images.numpy()) - wanted).max() < 0.02


def _file(
    value: float, axes: list[int], between: list[onnx.NodeProto], sizes: dict[str, np.ndarray]
) -> onnx.GraphProto:
    constants = {
        "sizes": np.array(axes), "value": np.array(value, np.float32), "weight": np.ones((2, 2, 3, 3), np.float32),
        **sizes,
    }  # fmt: skip
    helper = onnx.helper
    last = between[-1].output[0] if between else "padded"
    return helper.make_graph(
        [
            helper.make_node("Pad", ["x", "sizes", "value"], ["padded"]), *between,
            helper.make_node("Conv", [last, "weight"], ["y"]),
        ],
        "graph",
        [helper.make_tensor_value_info("x", 1, ["batch", 2, 8, 8])],
        [helper.make_tensor_value_info("y", 1, None)],
        [onnx.numpy_helper.from_array(each, name) for name, each in constants.items()],
    )  # fmt: skip


_LOW = {"low": np.array(1.0, np.float32)}


@pytest.mark.parametrize(
    ("value", "axes", "between", "constants"),
    [
        (1.0, [0, 0, 0, 0, 0, 0, 1, 1], [], {}),
        (0.0, [0, 0, -1, 0, 0, 0, 1, 1], [], {}),
        (0.0, [0, 1, 0, 0, 0, -1, 1, 1], [], {}),
        (0.0, [0, 0, 0, 0, 0, 0, 1, 1], [onnx.helper.make_node("Clip", ["padded", "low"], ["clipped"])], _LOW),
        (0.0, [0, 0, 0, 0, 0, 0, 1, 1], [onnx.helper.make_node("Relu", ["padded"], ["clipped"])], {}),
    ],
    ids=["another value", "cut off", "channels", "a clip that moves 0", "another operator"],
)  # fmt: skip
def test_other_padding_stays(
    value: float, axes: list[int], between: list[onnx.NodeProto], constants: dict[str, np.ndarray]
) -> None:
    graph = _file(value, axes, between, constants)
    before = graph.SerializeToString()
    fold_pads(onnx, graph)
    assert graph.SerializeToString() == before


def test_padding_is_added_to_that_of_the_convolution() -> None:
    graph = _file(0.0, [0, 0, 0, 0, 0, 0, 1, 1], [], {})
    graph.node[1].attribute.append(onnx.helper.make_attribute("pads", [1, 1, 1, 1]))
    fold_pads(onnx, graph)
    assert [node.op_type for node in graph.node] == ["Conv"]
    assert list(graph.node[0].input) == ["x", "weight"]
    assert list(graph.node[0].attribute[0].ints) == [1, 1, 2, 2]
    assert [tensor.name for tensor in graph.initializer] == ["weight"]
