"""Wrong files are refused, whatever made them so: corruptions of ONNX files, wrong tensors, an exporter that lies."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tersenet.ship
from planted_faults import FAULTS, INT8_FAULTS, plant
from tersenet.bricks.settle import settle
from tersenet.deploy.artifact import save_terse
from tersenet.deploy.checked import checked
from tersenet.deploy.onnx import export_onnx
from tersenet.deploy.pt2 import export_pt2
from tersenet.deploy.reference import Reference
from tersenet.errors import ExportError
from tersenet.quantization.quantize import Quantize
from tersenet.task import Task

X = torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(2))
TASK = Task(example=X[:2], calibrate=[X], forward=lambda model, batch: model(batch)[0], quiet=True)
RUNTIMES = ("onnxruntime", "openvino")


class Net(nn.Module):
    """What the faults are planted in: an addition, a concatenation, two pools, a flatten, two outputs of one shape."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.third, self.fourth = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(16, 8, 1)
        self.linear, self.other = nn.Linear(32, 5), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = F.relu(self.first(x))
        x = F.relu(self.second(x)) + self.third(x)
        x = F.relu(self.fourth(torch.cat([x, F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)], 1)))
        x = F.max_pool2d(x, 4)
        x = x.flatten(1)
        return self.linear(x), self.other(x)


@pytest.fixture(scope="module")
def references() -> dict[str, Reference]:
    model = Net().eval()
    int8, _ = Quantize().run(Net().eval(), TASK)
    return {"float": Reference(model, X[:2], [X]), "int8": Reference(settle(int8), X[:2], [X])}


@pytest.fixture(scope="module")
def files(references: dict[str, Reference], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("right")
    found = {}
    for kind, reference in references.items():
        path = export_onnx(reference.model, X[:2], folder / f"{kind}.onnx", pack=False)
        checked(path, RUNTIMES, reference)  # the right file is taken in every runtime
        found[kind] = path.read_bytes()
    return found


KINDS = [("float", name) for name in FAULTS] + [("int8", name) for name in (*FAULTS, *INT8_FAULTS)]
# An int8 file has no operator of its own for these: a quantizer takes the place of the ReLU.
# Every fault in each runtime is in benchmarks/planted_faults.py; here each is in one, those of int8 in both.
CASES = [(*case, RUNTIMES[i % 2]) for i, case in enumerate(KINDS)]
ONCE = {"quantizer dropped"}  # seconds: the model is exported anew, to see what the exporter merges
BOTH = [("int8", name, runtime) for name in INT8_FAULTS if name not in ONCE for runtime in RUNTIMES]
CASES += [case for case in BOTH if case not in CASES]
ABSENT = {("int8", "relu dropped")}


@pytest.mark.parametrize(("kind", "name", "runtime"), CASES)
def test_a_planted_fault_is_refused(kind, name, runtime, references, files, tmp_path):
    pytest.importorskip(runtime)
    data = plant(files[kind], {**FAULTS, **INT8_FAULTS}[name])
    assert (data is None) == ((kind, name) in ABSENT), "the network has nothing for this fault"
    if data is None:
        return
    path = tmp_path / "model.onnx"
    path.write_bytes(data)
    try:
        checked(path, [runtime], references[kind])
    except ExportError:
        assert not path.exists()  # nobody can take it for a right one
    else:
        pytest.fail(f"{name} in an {kind} file is not seen in {runtime}")


@pytest.mark.parametrize("kind", ["float", "int8"])
@pytest.mark.parametrize("suffix", [".terse", ".pt2"])
def test_a_wrong_tensor_in_a_file_for_pytorch_is_refused(kind, suffix, references, tmp_path):
    reference = references[kind]
    write = save_terse if suffix == ".terse" else export_pt2
    path = write(reference.model, X[:2], tmp_path / f"model{suffix}")
    assert checked(path, ["pytorch"], reference)["pytorch"].max_abs_error < 1e-5
    last = {".terse": ("second.weight", "linear.bias"), ".pt2": ("other.weight",)}[suffix]
    values = reference.model.state_dict()
    scales = [name for name in values if name.endswith("relu_default_1_out.scale")]  # of an int8 model
    for name, value in ((name, values[name]) for name in (*last, *scales)):
        before = value.clone()
        with torch.no_grad():
            place = value.reshape(-1)[value.abs().argmax()]
            place.copy_(-place if not name.endswith("scale") else place * 1.01)
        write(reference.model, X[:2], path)
        value.copy_(before)
        with pytest.raises(ExportError, match="does not agree with the model"):
            checked(path, ["pytorch"], reference)


def test_an_exporter_that_lies_is_not_believed(monkeypatch, tmp_path):
    """It writes another model of the same shapes."""

    def lies(model, example, path, *args, **kwargs) -> Path:
        torch.manual_seed(1)
        other = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 5)).eval()
        return export_onnx(other, example, path, *args, **kwargs)

    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 5)).eval()
    monkeypatch.setattr(tersenet.ship, "export_onnx", lies)
    with pytest.raises(ExportError, match=r"onnx in onnxruntime does not agree with the model"):
        tersenet.ship.ship(model, Task(example=X[:2], calibrate=[X]), tmp_path, "00-original", ["onnxruntime"])
    assert not list(tmp_path.glob("*.onnx"))
