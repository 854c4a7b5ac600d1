"""Constructs of a forward that a capture may lose: right in the graph, the files, int8 and a cut, or refused."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tersenet import PruneChannels, Quantize, Task
from tersenet.deploy.artifact import load_terse, save_terse
from tersenet.deploy.onnx import export_onnx
from tersenet.errors import NoEffect, TraceError
from tersenet.graph import agreement
from tersenet.graph.taken_apart import opened
from tersenet.graph.trace import fixed_batch, trace


class Net(nn.Module):
    """Two convolutions; what a case is about lies between them."""

    def __init__(self, between: Callable[..., Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(self, self.first(x)))


def slice_write(m: Net, y: Tensor) -> Tensor:
    y[:, :2] = 0
    return y


def decode(m: Net, y: Tensor) -> Tensor:
    y[..., 0:2] = (y[..., 0:2].sigmoid() * 2 - 0.5) * 3
    return y


def index_put(m: Net, y: Tensor) -> Tensor:
    y[:, torch.tensor([1, 4])] += 1.5
    return y


def masked_fill(m: Net, y: Tensor) -> Tensor:
    y.masked_fill_(y > 0.1, 0.7)
    return y


def add_on_a_view(m: Net, y: Tensor) -> Tensor:
    y.flatten(2)[:, 3].add_(2.0)
    return y


def out_of_place_of_another(m: Net, y: Tensor) -> Tensor:
    z = torch.empty_like(y)
    torch.mul(y, 3.0, out=z)
    return z


def unread_result(m: Net, y: Tensor) -> Tensor:
    m.relu(y)  # in place: its result is not what goes on
    return y


def read_before_and_after(m: Net, y: Tensor) -> Tensor:
    kept = y + 0.0
    F.relu_(y)
    return y + kept


def copied_in_place(m: Net, y: Tensor) -> Tensor:
    z = torch.zeros_like(y)
    for i in range(4):
        z[:, 2 * i].copy_(y[:, i])
    return z


def without_gradients(m: Net, y: Tensor) -> Tensor:
    with torch.no_grad(), torch.enable_grad():
        y = m.relu(y)
    with torch.set_grad_enabled(True):
        return y * 2


def autocast_off(m: Net, y: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return m.middle(y)


def autocast_on(m: Net, y: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = m.middle(y)
    return y.float()


def output_size(m: Net, y: Tensor) -> Tensor:
    return m.up(m.down(y), output_size=y.shape[-2:])


def both_output_sizes(m: Net, y: Tensor) -> Tensor:
    small = m.down(y)
    return m.up(small, output_size=y.shape[-2:]) + F.pad(m.up(small), (0, 1, 0, 1))


def indices(m: Net, y: Tensor) -> Tensor:
    pooled, places = m.pool(y)
    return m.unpool(pooled, places, output_size=y.shape)


def two_inputs(m: Net, y: Tensor) -> Tensor:
    a, b = y.movedim(1, -1).split(4, -1)
    return m.both(a, b).movedim(-1, 1)


def states(m: Net, y: Tensor) -> Tensor:
    start = torch.ones(1, len(y), 8)
    return m.gru(y[..., 0, :2].mT, start)[0].mT[..., None]


def sizes_by_len(m: Net, y: Tensor) -> Tensor:
    flat = torch.relu(y).reshape(len(y), 8, -1)
    return flat[:, :, :49].reshape(int(y.shape[0]), 8, 7, 7)


def own_token(m: Net, y: Tensor) -> Tensor:
    tokens = y.flatten(2).mT
    tokens = torch.cat([m.first.bias.expand(len(y), 1, -1), tokens], 1)
    return tokens[:, 1:].mT.reshape(y.shape)


def conv(*args: Any, **kwargs: Any) -> nn.Conv2d:
    return nn.Conv2d(*args, **kwargs)


def relu() -> nn.Module:
    return nn.ReLU(inplace=True)


CASES: dict[str, Callable[[], Net]] = {
    "slice write": lambda: Net(slice_write),
    "decode of boxes": lambda: Net(decode),
    "index_put": lambda: Net(index_put),
    "masked_fill": lambda: Net(masked_fill),
    "add on a view": lambda: Net(add_on_a_view),
    "out=": lambda: Net(out_of_place_of_another),
    "result not read": lambda: Net(unread_result, relu=relu()),
    "read before and after": lambda: Net(read_before_and_after),
    "copies": lambda: Net(copied_in_place),
    "gradients on and off": lambda: Net(without_gradients, relu=relu()),
    "autocast off": lambda: Net(autocast_off, middle=conv(8, 8, 3, padding=1)),
    "autocast on": lambda: Net(autocast_on, middle=conv(8, 8, 3, padding=1)),
    "output_size": lambda: Net(output_size, down=conv(8, 8, 3, 2, 1), up=nn.ConvTranspose2d(8, 8, 3, 2, 1)),
    "two output sizes": lambda: Net(both_output_sizes, down=conv(8, 8, 3, 2, 1), up=nn.ConvTranspose2d(8, 8, 3, 2, 1)),
    "two inputs": lambda: Net(two_inputs, both=nn.Bilinear(4, 4, 8)),
    "len": lambda: Net(sizes_by_len),
    "class token": lambda: Net(own_token),
}
IN_NO_TERSE = {"unpooling": lambda: Net(indices, pool=nn.MaxPool2d(2, return_indices=True), unpool=nn.MaxUnpool2d(2))}
IN_NO_FILE = {"a start state": lambda: Net(states, gru=nn.GRU(8, 8, batch_first=True))}


def example(seed: int = 0, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def near(a: Tensor, b: Tensor, share: float) -> bool:
    return a.shape == b.shape and float((a - b).square().mean().sqrt()) <= share * float(b.square().mean().sqrt())


def close(a: Tensor, b: Tensor, share: float = 1e-5) -> bool:
    return a.shape == b.shape and float((a - b).abs().max()) <= share * float(b.abs().max())


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(agreement, "_seen", set())
    torch.manual_seed(0)
    with torch.no_grad():  # torch refuses `out=` where gradients are wanted
        yield


@pytest.mark.parametrize("name", CASES | IN_NO_TERSE | IN_NO_FILE)
def test_the_graph_computes_what_the_forward_does(name: str) -> None:
    model = (CASES | IN_NO_TERSE | IN_NO_FILE)[name]().eval()
    graph = trace(model, example())
    assert fixed_batch(graph) is None
    for batch in (1, 2, 5):
        x = example(1, batch)
        assert close(graph(x.clone()), model(x.clone()), 2e-2 if name == "autocast on" else 1e-5)


@pytest.mark.parametrize("name", [name for name in CASES if name != "autocast on"])
def test_files_compute_what_the_forward_does(name: str, tmp_path: Path) -> None:
    model, x = CASES[name]().eval(), example(1, 3)
    export_onnx(model, example(), tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    assert close(torch.from_numpy(session.run(None, {"input": x.numpy()})[0]), model(x.clone()))
    file = save_terse(model, example(), tmp_path / "m.terse")
    assert close(load_terse(file)(x.clone()), model(x.clone()))


@pytest.mark.parametrize(
    "name", ["decode of boxes", "masked_fill", "result not read", "autocast on", "output_size", "len"]
)
def test_int8_stays_near_the_forward(name: str) -> None:
    model, x = CASES[name]().eval(), example()
    made, _ = Quantize(samples=8).run(copy.deepcopy(model), Task(example=x, calibrate=[x] * 4, quiet=True))
    assert near(made(x), model(x.clone()), 0.05)


@pytest.mark.parametrize("name", CASES)
def test_a_cut_leaves_what_stays(name: str) -> None:
    """Where channels can be cut, the network computes what it does with nobody reading them."""
    model, x = CASES[name]().eval(), example()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NoEffect)
        made, plan = PruneChannels(sparsity=0.5, refit=False).run(copy.deepcopy(model), Task(example=x, quiet=True))
    if not plan:
        assert close(made(x.clone()), model(x.clone()))
        return
    kept = plan["kept"]
    twin = copy.deepcopy(model)
    for path, roles in kept.items():
        if "in" in roles:
            layer: Any = twin.get_submodule(path)
            weight = layer.weight.data.transpose(0, 1) if getattr(layer, "transposed", False) else layer.weight.data
            weight[:, [i for i in range(weight.shape[1]) if i not in roles["in"]]] = 0
    if name in ("index_put", "len", "class token", "gradients on and off", "output_size", "out="):
        assert close(made(x.clone()), twin(x.clone()), 1e-4)
    assert made(x.clone()).shape == model(x.clone()).shape


class Counting(nn.Module):
    def __init__(self, read: bool) -> None:
        super().__init__()
        self.conv, self.read = nn.Conv2d(3, 4, 1), read
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.conv(x) * (self.calls if self.read else 1.0)


def test_a_buffer_that_is_only_counted_is_no_matter() -> None:
    model = Counting(read=False).eval()
    graph = trace(model, example())
    assert close(graph(example(1)), model(example(1)))


def test_a_buffer_that_is_changed_and_read_is_refused_by_name() -> None:
    with pytest.raises(TraceError, match="changes its buffer calls and computes with it"):
        trace(Counting(read=True).eval(), example())


class Loops(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.conv(x[i : i + 1])[0] for i in range(x.shape[0])])  # one at a time


def test_a_file_of_a_fixed_batch_is_refused_with_the_line(tmp_path: Path) -> None:
    for write in (export_onnx, save_terse):
        with pytest.raises(TraceError, match=r"fixes the batch at 2 at .*test_capture\.py, line \d+ .*x\.shape\[0\]"):
            write(Loops().eval(), example(), tmp_path / "m")
    assert not list(tmp_path.iterdir())


class Several(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.conv(inputs[0]) + self.conv(inputs[-1])


def test_inputs_that_come_as_a_list_are_captured() -> None:
    model = Several().eval()
    graph = trace(model, (example(), example(1)))
    assert close(graph(example(2, 3), example(3, 3)), model(example(2, 3), example(3, 3)))


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda m: torch.compile(m, backend="eager")])
def test_wrappers_are_named_and_taken_off_by_a_step(wrap: Any) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 1)).eval()
    with pytest.raises(TraceError, match=r"is wrapped in .*; give what it wraps, model\."):
        trace(wrap(model), example())
    _, plan = PruneChannels(sparsity=0.5, refit=False).run(wrap(model), Task(example=example(), quiet=True))
    assert "0" in plan["kept"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_types_of_numbers_are_captured(dtype: torch.dtype) -> None:
    model = Net(lambda m, y: torch.relu(y)).eval().to(dtype)
    x = example().to(dtype)
    assert torch.equal(trace(model, x)(x), model(x))


@pytest.mark.parametrize("wrong", ["operator", "layer", "constant"])
def test_a_graph_that_computes_something_else_is_refused(wrong: str) -> None:
    """The capture is not believed: with a fault in its graph the comparison fails, and names where."""
    model = Net(lambda m, y: F.leaky_relu(y, 0.2) * 3.0, bn=nn.BatchNorm2d(8)).eval()
    graph = trace(model, example())
    nodes = {str(node.target): node for node in graph.graph.nodes}
    if wrong == "operator":
        nodes["aten.mul.Tensor"].target = torch.ops.aten.add.Tensor
    elif wrong == "constant":
        nodes["aten.leaky_relu.default"].args = (nodes["aten.leaky_relu.default"].args[0], 0.21)
    else:
        graph.first = copy.deepcopy(graph.first)
        graph.first.padding = (0, 0)
    graph.recompile()
    where = {"operator": "aten.add.Tensor", "layer": "first", "constant": "aten.leaky_relu.default"}[wrong]
    with pytest.raises(TraceError, match=f"captured graph.*first at {where}"):
        agreement.check(model, graph, (example(),), True)


def test_what_agreed_once_is_compared_once_more_only(monkeypatch: pytest.MonkeyPatch) -> None:
    model, counted = Net(slice_write).eval(), []
    real = agreement.run
    monkeypatch.setattr(agreement, "run", lambda *args: counted.append(args) or real(*args))
    trace(model, example())
    assert counted
    counted.clear()
    trace(copy.deepcopy(model), example())
    assert len(counted) == 2  # the model and its graph, on the example
    other = Net(decode).eval()
    trace(other, example())
    assert counted


def test_kernels_of_each_image_are_left_alone() -> None:
    class PerSample(Net):
        def forward(self, x: Tensor) -> Tensor:
            n, c, h, w = x.shape
            kernels = self.first.weight.repeat(n, 1, 1, 1)
            y = F.conv2d(x.reshape(1, n * c, h, w), kernels, padding=1, groups=n)
            return self.last(y.view(n, 8, h, w))

    model = PerSample(slice_write).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NoEffect)
        made, _ = PruneChannels(sparsity=0.5, refit=False).run(model, Task(example=example(), quiet=True))
    assert close(made(example(1)), model(example(1)))


def test_opening_twice_does_nothing_the_second_time() -> None:
    model = Net(slice_write).eval()
    assert opened(model, example()) is model


class Differently(nn.Module):
    """One layer reads both inputs, each in its own way."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return self.last(self.first(x).relu() - 2 * self.first(z))


def test_an_example_with_one_tensor_twice_stands_for_two_inputs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Differently().eval(), torch.randn(2, 3, 8, 8)
    inputs = (torch.randn(5, 3, 8, 8), torch.randn(5, 3, 8, 8))
    wanted = model(*inputs)
    torch.testing.assert_close(trace(model, (x, x))(*inputs), wanted)
    cut, plan = PruneChannels(sparsity=0.5, refit=False).run(copy.deepcopy(model), Task(example=(x, x), quiet=True))  # type: ignore[arg-type]
    assert list(plan["keep"]) == ["first"]
    twin = copy.deepcopy(model)
    gone = [channel for channel in range(8) if channel not in plan["keep"]["first"]]
    with torch.no_grad():
        twin.last.weight[:, gone] = 0
    torch.testing.assert_close(cut(*inputs), twin(*inputs))
    torch.testing.assert_close(load_terse(save_terse(cut, (x, x), tmp_path / "cut.terse"))(*inputs), cut(*inputs))
