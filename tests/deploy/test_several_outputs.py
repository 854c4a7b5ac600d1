"""Models with several inputs and outputs, whatever these stand in: every file gives what the model gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_flatten

import tersenet
from tersenet.deploy.artifact import load_terse, save_terse
from tersenet.deploy.onnx import export_onnx
from tersenet.deploy.pt2 import export_pt2, read_pt2
from tersenet.deploy.runtimes import open_file
from tersenet.deploy.stand_in import StandIn
from tersenet.deploy.verify import score_file
from tersenet.errors import DataError, ModelError, TraceError
from tersenet.graph.outputs import assemble, describe, names
from tersenet.graph.trace import trace
from tersenet.numerics.divergence import divergence
from tersenet.task import Task, score_model

FORMS: dict[str, Any] = {
    "tuple": lambda y, z: (y, z),
    "list": lambda y, z: [y],
    "dict": lambda y, z: {"mask": z, "logits": y},
    "nested": lambda y, z: {"aux": (z, None, [y.argmax(1)]), "logits": y, "it's": 3},
    "twice": lambda y, z: (y, y, z > 0),
}


class Two(nn.Module):
    """(N, 1, 8, 8) -> class scores and a map, in one of FORMS."""

    def __init__(self, form: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(1, 8, 3, 2, 1), nn.BatchNorm2d(8)
        self.head, self.side = nn.Linear(8, 5), nn.Conv2d(8, 2, 1)
        self.norm.running_mean.normal_()
        self.form = form

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.norm(self.conv(x)))
        return FORMS[self.form](self.head(x.mean((2, 3))), self.side(x))


class Pair(nn.Module):
    """Token ids (N, 6) and an image (N, 1, 8, 8)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.conv, self.head = nn.Embedding(700, 8), nn.Conv2d(1, 8, 3, 2, 1), nn.Linear(8, 5)

    def forward(self, ids: Tensor, x: Tensor) -> dict[str, Tensor]:
        features = self.embed(ids).mean(1) + F.relu(self.conv(x)).mean((2, 3))
        return {"features": features, "logits": self.head(features)}


X = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(1))
IDS = torch.tensor([[699, 1, 2, 3, 4, 5]] * 3 + [[0, 698, 9, 300, 4, 5]] * 2)


def same(found: Any, expected: Any) -> None:
    (got, structure), (wanted, should) = tree_flatten(found), tree_flatten(expected)
    assert structure == should
    for one, other in zip(got, wanted, strict=True):
        if isinstance(other, Tensor):
            assert one.shape == other.shape
            torch.testing.assert_close(one.to(other.dtype), other, atol=1e-5, rtol=1e-4)
        else:
            assert one == other


@pytest.mark.parametrize("form", FORMS)
def test_a_captured_graph_gives_what_the_model_gives(form: str) -> None:
    model = Two(form).eval()
    graph = trace(model, X)
    same(graph(X), model(X))
    same(trace(graph, X)(X), model(X))
    leaves, structure = describe(model(X))
    same(assemble(json.loads(json.dumps(structure)), leaves), model(X))


@pytest.mark.parametrize("form", FORMS)
def test_every_file_gives_what_the_model_gives(form: str, tmp_path: Path) -> None:
    model = Two(form).eval()
    with torch.no_grad():
        expected = model(X)
    files = {
        "onnx": export_onnx(model, X[:2], tmp_path / "m.onnx"),
        "pt2": export_pt2(trace(model, X[:2]), X[:2], tmp_path / "m.pt2"),
        "terse": save_terse(model, X[:2], tmp_path / "m.terse"),
    }
    for kind, runtime in (("onnx", "onnxruntime"), ("onnx", "openvino"), ("pt2", "pytorch"), ("terse", "pytorch")):
        pytest.importorskip(runtime if kind == "onnx" else "torch")
        same(StandIn(open_file(files[kind], runtime))(X), expected)
    with torch.no_grad():
        same(load_terse(files["terse"])(X), expected)
        same(read_pt2(files["pt2"])[0](X), expected)
        same(torch.export.load(files["pt2"]).module()(X), expected)


def test_outputs_are_called_by_their_keys(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    for form, expected in (
        ("tuple", ["output", "output_1"]),
        ("list", ["output"]),
        ("nested", ["aux.0", "aux.2.0", "logits"]),
    ):
        proto = onnx.load(export_onnx(Two(form).eval(), X[:2], tmp_path / f"{form}.onnx"))
        assert [each.name for each in proto.graph.output] == expected
    assert names({"dict": [["a.b", 0], ["a", {"dict": [["b", 1]]}]]}) == ["output", "output_1"]  # else one name twice


def test_several_inputs_keep_their_order_names_and_types(tmp_path: Path) -> None:
    model = Pair().eval()
    with torch.no_grad():
        expected = model(IDS, X)
    for kind, write in (("onnx", export_onnx), ("pt2", export_pt2), ("terse", save_terse)):
        path = write(model, (IDS, X), tmp_path / f"m.{kind}")  # type: ignore[operator]
        for runtime in ("onnxruntime", "openvino") if kind == "onnx" else ("pytorch",):
            pytest.importorskip("torch" if runtime == "pytorch" else runtime)
            runner = open_file(path, runtime)
            assert [(each.name, each.shape, each.dtype) for each in runner.inputs] == [
                ("ids", (None, 6), "int64"), ("x", (None, 1, 8, 8), "float32"),
            ]  # fmt: skip
            file = StandIn(runner)
            same(file(IDS, X), expected)
            same(file(x=X, ids=IDS), expected)
            with pytest.raises(DataError, match="takes ids, x, got ids, image"):
                file(ids=IDS, image=X)
    tersenet.deploy.artifact.unpack(tmp_path / "m.terse", tmp_path / "again.onnx")
    same(StandIn(open_file(tmp_path / "again.onnx"))(IDS, X), expected)


def test_a_file_is_scored_through_the_tasks_own_forward(tmp_path: Path) -> None:
    data = [(X, torch.tensor([0, 1, 2, 3, 4]))]
    for form, forward in (
        ("tuple", lambda model, batch: model(batch[0])[0]),
        ("dict", lambda model, batch: model(batch[0])["logits"]),
        ("nested", lambda model, batch: model(batch[0])["logits"] + 0 * model(batch[0])["aux"][0].mean()),
    ):
        model = Two(form).eval()
        path = export_onnx(model, X[:2], tmp_path / f"{form}.onnx")
        for task in (Task(example=X[:2], forward=forward), Task(example=X[:2])):
            by_hand = float(
                (model.head(F.relu(model.norm(model.conv(X))).mean((2, 3))).argmax(1) == data[0][1]).double().mean()
            )
            assert score_model(model, task, data).value == pytest.approx(by_hand)
            assert score_file(open_file(path), task, data).value == pytest.approx(by_hand)


def test_which_output_is_scored_is_clear_or_refused() -> None:
    data = [(X, torch.tensor([0, 1, 2, 3, 4]))]

    class Unclear(Two):
        def forward(self, x: Tensor) -> Any:
            y = super().forward(x)["logits"]
            return {"coarse": y, "fine": y * 2}

    with pytest.raises(ModelError, match=r"are coarse \(5, 5\), fine \(5, 5\); which .* Task\(forward=\.\.\.\)"):
        score_model(Unclear("dict").eval(), Task(example=X[:2]), data)
    own = Task(example=X[:2], forward=lambda model, batch: model(batch[0]))
    with pytest.raises(DataError, match=r"needs logits \(N, classes\) and whole labels \(N,\), got a tuple"):
        score_model(Two("tuple").eval(), own, data)
    soft = [(X, F.one_hot(data[0][1]).float())]
    with pytest.raises(DataError, match=r"got \(5, 5\) of torch.float32 and \(5, 5\) of torch.float32"):
        score_model(Two("dict").eval(), Task(example=X[:2]), soft)


def test_other_containers_are_refused_when_the_model_is_captured() -> None:
    import collections

    named = collections.namedtuple("Named", "a b")

    class Other(Two):
        def forward(self, x: Tensor) -> Any:
            return named(*super().forward(x))

    with pytest.raises(
        TraceError, match=r"outputs of Other are in a .*amed.*; return tensors, or a tuple, list or dict"
    ):
        trace(Other("tuple").eval(), X)


def test_divergence_counts_every_output() -> None:
    one, other = {"a": X[:, 0, 0], "b": [X[:, 0, 1]]}, {"a": X[:, 0, 0], "b": [X[:, 0, 2]]}
    assert divergence(one, other) == divergence(X[:, 0, 1], X[:, 0, 2]) > 0
    assert divergence(X[:, 0, 0, :1], X[:, 0, 1, :1]) > 0  # one number per sample is not always the same distribution


STEPS = {
    "prune": [tersenet.PruneChannels(sparsity=0.4, multiple_of=1)],
    "int8": [tersenet.FoldBatchNorm(), tersenet.Quantize()],
}


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("form", ["tuple", "nested"])
def test_steps_keep_the_structure(form: str, steps: str) -> None:
    data = [(X, torch.tensor([0, 1, 2, 3, 4]))] * 4
    task = Task(example=X[:2], train=data, calibrate=data, test=data, quiet=True)
    model = Two(form).eval()
    changed: nn.Module = model
    for step in STEPS[steps]:
        changed, plan = step.run(changed, task)
        assert plan
    assert tree_flatten(changed.eval()(X))[1] == tree_flatten(Two(form).eval()(X))[1]
    np.testing.assert_equal(score_model(changed, task, data).samples, 20)
