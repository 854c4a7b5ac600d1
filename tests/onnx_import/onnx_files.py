"""Small ONNX files: exports of both of torch's exporters, and graphs by hand."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


class Residual(nn.Module):
    """Convolutions with batch norm, a residual addition, a pool and a classifier; numbers as after a training."""

    def __init__(self, channels: int = 8, classes: int = 4) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, channels, 3, 2, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU())
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.head = nn.Linear(channels, classes)
        with torch.no_grad():
            self.stem[1].weight.uniform_(0.5, 1.5)
            self.stem[1].running_var.uniform_(0.5, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.relu(x + self.conv(x))
        return self.head(x.mean((2, 3)))


class Attention(nn.Module):
    """Tokens of patches with a class token, attention with shapes that hang on the batch, layer norm and GELU."""

    def __init__(self, width: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.patch = nn.Conv2d(3, width, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.place = nn.Parameter(torch.randn(1, 5, width))
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.place
        n, t, c = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(n, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + ((q @ k.transpose(-2, -1) * 0.35).softmax(-1) @ v).transpose(1, 2).reshape(n, t, c)
        return self.head(nn.functional.gelu(x[:, 0]))


def exported(model: nn.Module, example: Tensor, path: Path, how: str, version: int | None = None) -> Path:
    """Writes a model by "dynamo" or "torchscript", or by either with "-fixed" for a batch of one."""
    exporter, _, fixed = how.partition("-")
    model.eval()
    more = {} if version is None else {"opset_version": version}
    example = example[:1] if fixed or exporter == "torchscript" else example
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if exporter == "dynamo":
            shapes: Any = None if fixed else ({0: torch.export.Dim.DYNAMIC},)
            torch.onnx.export(model, (example,), path, dynamo=True, dynamic_shapes=shapes, verbose=False)
        else:
            axes = {} if fixed else {"x": {0: "N"}}
            torch.onnx.export(model, (example,), path, dynamo=False, input_names=["x"], dynamic_axes=axes, **more)
    return path


def unoptimized(model: nn.Module, example: Tensor, path: Path) -> Path:
    """Writes a model by torch's current exporter as it comes: batch norms stay."""
    shapes: Any = ({0: torch.export.Dim.DYNAMIC},)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model.eval(), (example,), path, dynamo=True, optimize=False, verbose=False, dynamic_shapes=shapes
        )
    return path


def written(
    path: Path,
    nodes: Sequence[Any],
    inputs: dict[str, Sequence[Any]],
    outputs: Sequence[str],
    constants: dict[str, np.ndarray] | None = None,
    version: int = 17,
    dtype: int = 1,
    **more: Any,
) -> Path:
    """Writes a graph of onnx.helper's nodes."""
    from onnx import helper, numpy_helper, save

    graph = helper.make_graph(
        list(nodes),
        "graph",
        [helper.make_tensor_value_info(name, dtype, list(shape)) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, dtype, None) for name in outputs],
        [numpy_helper.from_array(array, name) for name, array in (constants or {}).items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", version)], ir_version=8)
    save(model, str(path), **more)
    return path


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
