"""The commands on a foreign ONNX file: compress, plan, pack and export."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from onnx_files import exported

from command import tersenet
from tersenet import models
from tersenet.models.weights import load_weights

ort = pytest.importorskip("onnxruntime")
SCALE = ("--mean", "0.3053", "--std", "0.376")
RECIPE = """\
schema: 1
steps:
- prune_channels: {sparsity: 0.5}
- fold_batch_norm: {}
- quantize: {}
"""


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory, digits_weights: Path) -> Path:
    """Trained digits as somebody else's file: a batch of one, batch norms folded, no word on its preparation."""
    model = models.build("digits")
    load_weights(model, digits_weights)
    path = tmp_path_factory.mktemp("foreign") / "digits.onnx"
    return exported(model, torch.randn(2, 1, 8, 8), path, "torchscript-fixed")


@pytest.mark.minutes
@pytest.mark.parametrize("steps", ["int8", "half"])
def test_compress(steps: str, foreign: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    lines = RECIPE.splitlines()
    recipe.write_text("\n".join(lines if steps == "half" else lines[:2] + lines[4:]), encoding="utf-8")
    ended = tersenet(
        "compress", foreign, "--data", "digits", *SCALE, "--recipe", recipe, "--runtime", "onnxruntime,openvino",
        "--out", tmp_path / "run", "--json",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    rows = ended.json["rows"]
    assert rows[0]["score"] > 0.95
    assert rows[-1]["macs"] < 0.6 * rows[0]["macs"] if steps == "half" else rows[-1]["score"] > rows[0]["score"] - 0.02
    assert "assumed" not in ended.err
    files = ended.json["files"]
    assert files["model.onnx"]["bytes"] < 0.5 * foreign.stat().st_size
    x = np.random.default_rng(0).standard_normal((3, 1, 8, 8), dtype=np.float32)
    session = ort.InferenceSession(str(tmp_path / "run" / "model.onnx"), providers=["CPUExecutionProvider"])
    assert session.run(None, {"input": x})[0].shape == (3, 10)


@pytest.mark.minutes
def test_plan_pack_and_export(foreign: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE, encoding="utf-8")
    ended = tersenet("plan", foreign, "--data", "digits", *SCALE, "--recipe", recipe, "--json")
    assert ended.code == 0, ended.err

    ended = tersenet("pack", foreign, "-o", tmp_path / "digits.terse", "--json")
    assert ended.code == 0, ended.err
    assert ended.json["bytes"] < ended.json["float32_bytes"]

    ended = tersenet("export", foreign, "--to", "openvino,torch", "--out", tmp_path, "--json")
    assert ended.code == 0, ended.err
    assert {Path(name).name for name in ended.json} == {"digits.xml", "digits.pt2"}

    ended = tersenet("export", foreign, "--to", "onnx")
    assert ended.code == 2
    assert "over the file that it is made from; name a folder with --out" in ended.err
