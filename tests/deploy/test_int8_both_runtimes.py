"""Int8 files in ONNX Runtime and OpenVINO against the simulation, form by form."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from int8_forms import BUNDLES, X, lively_bundle
from torch import nn

from tersenet.bricks.settle import settle
from tersenet.deploy.merged_additions import as_openvino_adds
from tersenet.deploy.onnx import export_onnx
from tersenet.deploy.runtimes import open_file
from tersenet.quantization.quantize import Quantize
from tersenet.task import Task

# Padded windows of OpenVINO are rounded once more, on the grid of what they average.
ROUNDED_TWICE = {
    ("openvino", name)
    for name in ("padded", "ceil_padded", "ceil_padded_relu", "ceil_wide", "ceil_wide_relu", "divisor_padded")
}
TASK = Task(example=X[:2], calibrate=[(X,)], quiet=True)


@cache
def exported(name: str, folder: Path) -> tuple[Path, dict[str, slice], dict[str, np.ndarray]]:
    """The file, where each form's outputs stand, and what is to come out: float, simulated, and as OpenVINO adds."""
    model = lively_bundle(name)
    columns = model.columns()
    quantized: nn.Module = settle(Quantize().run(model, TASK)[0].eval())
    with torch.no_grad():
        outputs = {
            "float": model(X).numpy(),
            "onnxruntime": quantized(X).numpy(),
            "openvino": as_openvino_adds(quantized, X[:2])(X).numpy(),
        }
    return export_onnx(quantized, X[:2], folder / f"{name}.onnx"), columns, outputs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("int8")


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.minutes)
        if name not in ("mean", "pools", "transformers", "layer_scale", "additions")
        else name
        for name in BUNDLES
    ],
)
def test_int8_is_what_was_simulated(name: str, runtime: str, folder: Path) -> None:
    """Rounding may fall the other way now and then; a wrong operator is off by far more than int8 costs."""
    pytest.importorskip(runtime)
    path, columns, outputs = exported(name, folder)
    got = open_file(path, runtime, threads=1).run(X.numpy())
    simulated, plain = outputs[runtime], outputs["float"]
    wrong = {}
    for form, place in columns.items():
        cost = np.sqrt(np.square(outputs["onnxruntime"][:, place] - plain[:, place]).mean())
        error = np.sqrt(np.square(got[:, place] - simulated[:, place]).mean())
        share = 2.0 if (runtime, form) in ROUNDED_TWICE else 0.25
        if not error <= share * cost + 1e-6 * np.abs(plain[:, place]).max():
            wrong[form] = f"off by {error:.3g}, int8 costs {cost:.3g}"
    assert wrong == {}
