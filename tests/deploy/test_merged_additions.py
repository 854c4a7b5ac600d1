"""Roundings that a runtime leaves out where it adds inside of a convolution's kernel."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from nets import TASK, Mobile, Residual, X, lively
from torch import nn

from tersenet.bricks.quantizer import Quantizer
from tersenet.deploy.merged_additions import as_openvino_adds
from tersenet.deploy.onnx import export_onnx
from tersenet.deploy.runtimes import open_file
from tersenet.quantization.quantize import Quantize


def quantized(model: nn.Module) -> nn.Module:
    return Quantize().run(lively(model), TASK)[0].eval()


def test_only_what_goes_into_an_addition_is_clipped_in_place_of_rounded() -> None:
    model = quantized(Residual())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    graph = as_openvino_adds(model, X[:2])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    rounding = {path for path, module in model.named_modules() if isinstance(module, Quantizer)}
    left = {path for path, module in graph.named_modules() if isinstance(module, Quantizer)}
    assert rounding - left == {"quantizers.conv2_out"}
    clip, quantizer = graph.get_submodule("quantizers.conv2_out"), model.get_submodule("quantizers.conv2_out")
    assert isinstance(clip, nn.Hardtanh)
    wide = torch.tensor([-1e6, 1e6])
    torch.testing.assert_close(clip(wide), quantizer(wide))
    with torch.no_grad():
        step = float((graph(X) - model(X)).abs().max())
    assert 0 < step < 0.1 * float(model(X).detach().abs().max())


def test_without_such_an_addition_nothing_changes() -> None:
    model = quantized(Mobile())
    with torch.no_grad():
        assert torch.equal(as_openvino_adds(model, X[:2])(X), model(X))


def test_openvino_rounds_there_or_only_clips(tmp_path: Path) -> None:
    """Which of both is up to the processor."""
    pytest.importorskip("openvino")
    model = quantized(Residual())
    found = open_file(export_onnx(model, X[:1], tmp_path / "model.onnx"), "openvino", threads=1).run(X.numpy())
    with torch.no_grad():
        meant = [model(X).numpy(), as_openvino_adds(model, X[:2])(X).numpy()]
    assert min(float(np.abs(found - each).max()) for each in meant) < 1e-4
