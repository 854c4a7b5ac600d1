"""`tersenet.quantize`, `prune` and `export`: any loader in, a new model out, and files that are right."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import tersenet
from tersenet import Preparation, Task
from tersenet.deploy.runtimes import open_file
from tersenet.errors import DataError, ExportError, InputWarning, SettingsError
from tersenet.graph.costs import totals

_GENERATOR = torch.Generator().manual_seed(0)
Y = torch.arange(96) % 3
X = torch.randn(96, 1, 8, 8, generator=_GENERATOR) * 0.3 + (
    Y[:, None, None, None] - 1.0
)  # bright, grey and dark images


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm = nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv2, self.head = nn.Conv2d(16, 32, 3, padding=1), nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.conv2(torch.relu(self.norm(self.conv1(x))))).mean((2, 3)))


@pytest.fixture(scope="module")
def net() -> Net:
    """Trained, and left in training mode, as a script leaves it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Net()
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        for _ in range(30):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(X), Y).backward()
            optimizer.step()
    model.eval()(X)
    return model.train()


class Samples(Dataset[Any]):
    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return X[index], int(Y[index])


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return zip(X, Y, strict=True)


LOADERS: dict[str, Callable[[], Any]] = {
    "DataLoader": lambda: DataLoader(TensorDataset(X, Y), 32, shuffle=True),
    "pairs": lambda: list(zip(X.split(32), Y.split(32), strict=True)),
    "inputs": lambda: list(X.split(32)),
    "inputs alone in tuples": lambda: [(x,) for x in X.split(32)],
    "dicts": lambda: [{"image": x, "label": y} for x, y in zip(X.split(32), Y.split(32), strict=True)],
    "Dataset": Samples,
    "IterableDataset": Stream,
    "tensor": lambda: X,
    "generator": lambda: iter(X.split(32)),
    "Task": lambda: Task(example=X[:2], calibrate=[X], quiet=True),
}


def accuracy(model: nn.Module) -> float:
    with torch.no_grad():
        return float((model(X).argmax(1) == Y).float().mean())


def state(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


@pytest.mark.parametrize("name", LOADERS)
def test_any_loader_serves(name: str, net: Net) -> None:
    before = state(net)
    small = tersenet.quantize(net, LOADERS[name](), quiet=True)
    assert {small.get_buffer(f"{path}.weight").dtype for path in ("conv1", "conv2", "head")} == {torch.int8}
    half = tersenet.prune(net, LOADERS[name](), macs="0.5x", quiet=True)
    assert isinstance(half, Net)
    assert 0.4 < totals(half, X[:2]).macs / totals(net, X[:2]).macs <= 0.5
    for model in (small, half):
        assert not any(module.training for module in model.modules())
        assert accuracy(model) > 0.95
    assert net.training
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


def test_what_is_said_and_what_quiet_leaves_out(net: Net, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = LOADERS["pairs"]()
    tersenet.prune(net, pairs, params=0.6, skip=["conv1"])
    said = capsys.readouterr().err
    assert "prune_channels: left alone: " in said
    assert "are left out by only or skip: conv1" in said
    assert " multiply-adds, " in said
    assert "prune: accuracy on these 96 samples 100.00 % -> " in said
    tersenet.quantize(net, pairs, skip=["head"])
    said = capsys.readouterr().err
    assert "quantize: left alone: " in said
    assert "quantize: accuracy on these 96 samples 100.00 % -> 100.00 %" in said
    tersenet.quantize(net, pairs, skip=["head"], quiet=True)
    assert capsys.readouterr().err == ""


def test_a_model_that_knows_nothing_of_its_inputs_is_warned_of(net: Net) -> None:
    wrong = DataLoader(TensorDataset(-X, Y), 32)  # dark for bright: a wrong preparation
    with pytest.warns(InputWarning, match="THE ORIGINAL SCORES NO BETTER THAN GUESSING"):
        tersenet.quantize(net, wrong, quiet=True)


def test_a_dataset_in_the_order_of_its_classes_gives_some_of_each(net: Net) -> None:
    order = Y.argsort()
    task = tersenet.loaders.task_of(net, TensorDataset(X[order], Y[order]), samples=12)
    assert torch.cat([y for _, y in task.train or []]).bincount().tolist() == [4, 4, 4]


def test_several_inputs(capsys: pytest.CaptureFixture[str]) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(6, 8)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return torch.relu(self.a(a)) + torch.relu(self.b(b))

    a, b = torch.randn(32, 4), torch.randn(32, 6)
    model = tersenet.quantize(Two().eval(), [((a, b), None)])
    assert model(a, b).shape == (32, 8)
    with pytest.raises(DataError, match=r"takes 2 inputs, a, b: give each batch as \(\(a, b\), target\)"):
        tersenet.quantize(Two().eval(), [(a, b)])
    assert "accuracy" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (lambda net: tersenet.quantize(net, X, wieghts="int8"), SettingsError, "no setting 'wieghts'; did you mean"),
        (lambda net: tersenet.quantize(net, X, weights="int9"), SettingsError, "weights must be a format, got 'int9'"),
        (lambda net: tersenet.quantize(net, X, samples="a"), SettingsError, r"quantize.samples is 'a' \(str\)"),
        (lambda net: tersenet.quantize(net, X, skip=["nose"]), SettingsError, "skip names 'nose', and no layer"),
        (lambda net: tersenet.prune(net, X, macs="2x"), SettingsError, r"must be in \(0, 1\], got 2x"),
        (lambda net: tersenet.prune(net, X, macs=0.5, params=0.5), SettingsError, "macs and params each say how much"),
        (lambda net: tersenet.prune(net, X, macs=0.001), SettingsError, "macs 0.001 cannot be reached"),
        (lambda net: tersenet.quantize(net, "digits"), DataError, "the loader is 'digits'; give a DataLoader"),
        (lambda net: tersenet.quantize(net, 3), DataError, "the loader is of type int; give a DataLoader"),
        (lambda net: tersenet.quantize(net, []), DataError, r"the loader is empty \(0 batches\)"),
        (lambda net: tersenet.quantize(net, [X.numpy()]), DataError, "batch 0 .* of type ndarray; give tensors"),
        (lambda net: tersenet.quantize(net, list(X)), DataError, r"does not take the loader's inputs, \(2, 8, 8\)"),
        (lambda net: tersenet.quantize(net, [(X[:0], Y[:0])]), DataError, "inputs of 0 samples"),
        (lambda net: tersenet.quantize(net, [{"pixels": X}]), DataError, r"its keys are \['pixels'\]"),
        (lambda net: tersenet.export(net, X, "net.bin"), SettingsError, r"net\.bin; its name must end in one of"),
        (lambda net: tersenet.export(net, X, "net.pt2", runtimes=["openvino"]), SettingsError, "runtimes is openvino"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_a_sentence(
    call: Callable[[Net], Any], kind: type[Exception], words: str, net: Net
) -> None:
    with pytest.raises(kind, match=words):
        call(net)


class Pictures(Dataset[Any]):
    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> object:
        return object()


def test_a_dataset_without_tensors_is_said(net: Net) -> None:
    with pytest.raises(DataError, match=r"samples of the Pictures make no batch .* transforms\.ToTensor\(\)"):
        tersenet.quantize(net, Pictures())


@pytest.mark.parametrize("name", ["net.onnx", "net.xml", "net.pt2", "net.terse"])
@pytest.mark.parametrize("kind", ["quantized", "pruned"])
def test_files_compute_what_the_model_does(name: str, kind: str, net: Net, tmp_path: Path) -> None:
    pairs = LOADERS["pairs"]()
    model = tersenet.quantize(net, pairs, quiet=True) if kind == "quantized" else tersenet.prune(net, pairs, quiet=True)
    before = state(model)
    found = tersenet.export(model, X[:16], tmp_path / name)
    if name.endswith((".onnx", ".xml")) and kind == "quantized":
        assert found["left_in_float"] == []
    assert found["bytes"] >= (tmp_path / name).stat().st_size
    if not name.endswith(".terse"):
        outputs = open_file(tmp_path / name).run(X[5:8].numpy())
        assert torch.allclose(torch.from_numpy(outputs), model(X[5:8]), atol=1e-4)
    else:
        assert torch.allclose(tersenet.load(tmp_path / name)(X[5:8]), model(X[5:8]), atol=1e-4)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_a_file_that_computes_something_else_is_removed(
    net: Net, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tersenet import exports

    other = copy.deepcopy(net).eval()
    with torch.no_grad():
        other.head.bias += 1
    write = exports.export_onnx
    monkeypatch.setattr(exports, "export_onnx", lambda model, *rest, **more: write(other, *rest, **more))
    with pytest.raises(ExportError, match="does not agree with the model: the largest error is 1 on"):
        tersenet.export(net, X[:4], tmp_path / "net.onnx", runtimes=["onnxruntime", "openvino"])
    assert not (tmp_path / "net.onnx").exists()


def test_a_file_says_what_is_known_of_its_inputs(net: Net, tmp_path: Path) -> None:
    for name, known in (("a.onnx", None), ("b.onnx", Preparation((8, 8), (0.2,), (0.3,)))):
        tersenet.export(net, X[:1], tmp_path / name, preparation=known, runtimes=["onnxruntime", "openvino"])
        found = open_file(tmp_path / name).metadata
        assert Preparation.of_metadata(found) == (known or Preparation((8, 8), (0.5,), (0.5,)))
        assert found.get("tersenet.assumed") == (None if known else '["mean", "std"]')
        assert found["tersenet.checked"] == "onnxruntime,openvino"
        assert open_file(tmp_path / name).input_shape[0] is None


def test_what_a_task_does_not_say_is_not_made_up(net: Net) -> None:
    from tersenet.inputs_said import inputs_said
    from tersenet.ship import preparation_dict

    task = Task(example=X[:2], test=[(X, Y)])
    assert task.preparation.size == (8, 8)
    assert inputs_said(task)[0] == "inputs: 1x8x8, prepared by the task"
    assert preparation_dict(task) == {"labels": [], "inputs": [{"shape": [1, 8, 8], "dtype": "float32"}]}
    known = Preparation((8, 8), (0.2,), (0.3,))
    assert preparation_dict(Task(example=X[:2], preparation=known))["mean"] == [0.2]
