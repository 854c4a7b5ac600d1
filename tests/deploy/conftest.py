"""One tiny network and its ONNX file for the tests of this folder; exported once, because an export takes seconds."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.export import Dim


def tiny_network(seed: int = 0) -> nn.Module:
    """(N, 3, 8, 8) -> (N, 6)."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16, 6),
    )
    model[1].running_mean.normal_()
    return model.eval()


@pytest.fixture(scope="session")
def tiny_model() -> nn.Module:
    return tiny_network()


@pytest.fixture(scope="session")
def tiny_onnx(tiny_model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with an open batch, and metadata {"labels": "a b"}."""
    onnx = pytest.importorskip("onnx")
    path = tmp_path_factory.mktemp("tiny") / "tiny.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter warns about its own insides
        program = torch.onnx.export(
            tiny_model, (torch.randn(2, 3, 8, 8),), dynamo=True, verbose=False, dynamic_shapes=({0: Dim.DYNAMIC},)
        )
    proto = program.model_proto
    proto.metadata_props.add(key="labels", value="a b")
    onnx.save(proto, path)
    return path


@pytest.fixture(scope="session")
def fixed_onnx(tiny_onnx: Path) -> Path:
    """The same with a fixed batch of 2."""
    import onnx

    proto = onnx.load(tiny_onnx)
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
    path = tiny_onnx.with_name("fixed.onnx")
    onnx.save(proto, path)
    return path
