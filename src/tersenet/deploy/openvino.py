"""A model in OpenVINO's own format: an ONNX file for OpenVINO alone, read and saved by OpenVINO.

It differs from the file that serves ONNX Runtime, too, in one thing: values around 0 are int8 even where several
operators read them, as the sums of a pre-activation network are (`signed_quantizers`).
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection
from pathlib import Path

from torch import nn

from tersenet.deploy.onnx import export_onnx
from tersenet.errors import require
from tersenet.graph.capture import Example
from tersenet.task import Preparation


def export_openvino(
    model: nn.Module,
    example: Example,
    path: str | Path,
    preparation: Preparation | None = None,
    floats: Collection[str] = (),
) -> Path:
    """Writes an .xml file with its .bin beside it. Arguments and errors are those of `export_onnx`.

    Raises:
        MissingExtra: also when openvino is not installed.
    """
    openvino = require("openvino", "openvino", "write OpenVINO files")
    path = Path(path)
    with tempfile.TemporaryDirectory() as scratch:
        onnx = export_onnx(model, example, Path(scratch) / "model.onnx", preparation, floats=floats, shared_int8=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        openvino.save_model(openvino.convert_model(str(onnx)), str(path), compress_to_fp16=False)
    return path
