"""Models that come wrapped, with weights that are computed, or with layers whose forward is their own."""

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
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

from tersenet import FoldBatchNorm, PruneChannels, PruneWeights, Quantize, ShrinkFile, Task
from tersenet.bricks.opened import copied, make_permanent
from tersenet.bricks.plain import is_kind, is_plain
from tersenet.deploy.artifact import load_terse, save_terse
from tersenet.deploy.onnx import export_onnx
from tersenet.errors import MadePermanent, ModelError
from tersenet.graph.taken_apart import opened
from tersenet.graph.trace import trace


class Padded(nn.Conv2d):
    """Pads by itself, as networks from TensorFlow do."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, 1, 0, 1)))


class Standardized(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight / weight.std((1, 2, 3), keepdim=True), self.bias, self.stride, self.padding)


class Cosine(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.normalize(x), F.normalize(self.weight))


class Guarded(nn.Linear):
    """A forward of its own that does what torch's does."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            raise AssertionError
        return F.linear(x, self.weight, self.bias)


class Named(nn.Conv2d):
    """Nothing but another constructor."""

    def __init__(self) -> None:
        super().__init__(3, 4, 3)


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) * 2


class Convolves(nn.Conv2d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, weight.abs(), bias)


class NormAct(nn.BatchNorm2d):
    """A batch norm that holds its activation, as timm's."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = nn.PReLU(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(
            F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.1, self.eps)
        )


class PadsInside(nn.Conv2d):
    """A convolution that holds the layer which pads."""

    def __init__(self) -> None:
        super().__init__(3, 8, 3)
        self.padder = nn.ZeroPad2d((0, 1, 0, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(self.padder(x), self.weight, self.bias)


def patched() -> nn.Module:
    layer = nn.Linear(3, 4)
    layer.forward = lambda x: F.linear(x, layer.weight)  # type: ignore[method-assign]
    return layer


def hooked() -> nn.Module:
    layer = nn.Linear(3, 4)
    layer.register_forward_hook(lambda *args: args[-1] + 1)
    return layer


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MadePermanent)
        warnings.filterwarnings("ignore", ".*weight_norm.* is deprecated", FutureWarning)
        yield


def body(first: nn.Module, channels: int = 8) -> nn.Module:
    return nn.Sequential(
        first, nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)
    ).eval()


def example(seed: int = 0) -> Tensor:
    return torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(seed))


def away(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).detach().abs().max() / b.detach().abs().max())


@pytest.mark.parametrize("make", [lambda: nn.Linear(3, 4), lambda: Guarded(3, 4), Named, lambda: nn.BatchNorm2d(3)])
def test_layers_that_do_what_torch_does_are_plain(make: Callable[[], nn.Module]) -> None:
    assert is_plain(make())


@pytest.mark.parametrize(
    "make",
    [
        lambda: Padded(3, 4, 3), lambda: Standardized(3, 4, 3), lambda: Cosine(3, 4), lambda: Doubled(3, 4),
        lambda: Convolves(3, 4, 3), lambda: NormAct(3), PadsInside, patched, hooked,
    ],
)  # fmt: skip
def test_layers_with_a_forward_of_their_own_are_not(make: Callable[[], nn.Module]) -> None:
    layer = make().eval()
    assert not is_plain(layer)
    assert not is_kind(layer, (nn.Conv2d, nn.Linear, nn.BatchNorm2d))


STEPS = [
    Quantize(weights="fp16", activations=None), Quantize(activations=None), Quantize(samples=8),
    Quantize(weights="kmeans8", activations=None), ShrinkFile(price=1e-9), PruneWeights(sparsity=0.05), FoldBatchNorm(),
]  # fmt: skip
MODELS: dict[str, Callable[[], nn.Module]] = {
    "pads": lambda: body(Padded(3, 8, 3)),
    "standardizes": lambda: body(Standardized(3, 8, 3)),
    "pads inside": lambda: body(PadsInside()),
    "cosine": lambda: nn.Sequential(nn.Flatten(), nn.Linear(243, 16), Cosine(16, 5)).eval(),
    "norm with activation": lambda: nn.Sequential(nn.Conv2d(3, 8, 3), NormAct(8), nn.Conv2d(8, 4, 1)).eval(),
}


@pytest.mark.parametrize("name", ["standardizes", "cosine", "norm with activation"])
def test_every_step_keeps_what_a_layer_computes(name: str) -> None:
    model, x = MODELS[name](), example()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.uniform_(-1, 1)  # type: ignore[union-attr]
            norm.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    want = model(x)
    for step in STEPS:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made, _ = step.run(copy.deepcopy(model), Task(example=x, calibrate=[x] * 4, quiet=True))
        assert away(made(x), want) < (0.2 if isinstance(step, PruneWeights) else 0.05), step.name


@pytest.mark.parametrize("name", MODELS)
def test_what_is_taken_apart_is_written_and_cut(name: str, tmp_path: Path) -> None:
    model, x = MODELS[name](), example()
    made = opened(copy.deepcopy(model), x)
    assert away(made(example(1)), model(example(1))) < 1e-5
    assert away(load_terse(save_terse(made, x, tmp_path / "m.terse"))(x), model(x)) < 1e-5
    session = onnxruntime.InferenceSession(export_onnx(model, x, tmp_path / "m.onnx"))
    assert away(torch.from_numpy(session.run(None, {"input": x.numpy()})[0]), model(x)) < 1e-4
    if name != "cosine":
        cut, plan = PruneChannels(sparsity=0.4, refit=False).run(copy.deepcopy(model), Task(example=x, quiet=True))
        assert plan["kept"]["0"]
        assert cut(x).shape == model(x).shape


def test_a_layer_inside_of_a_layer_gets_a_name_of_its_own() -> None:
    model = MODELS["norm with activation"]()
    names = [str(node.target) for node in trace(model, example()).graph.nodes if node.op == "call_module"]
    assert names == ["0", "1", "1_act", "2"]


@pytest.mark.parametrize(
    "norm",
    [parametrizations.weight_norm, parametrizations.spectral_norm, weight_norm, spectral_norm,
     lambda layer: prune.l1_unstructured(layer, "weight", 0.3)],
)  # fmt: skip
def test_computed_weights_are_made_permanent_exactly(norm: Callable[[nn.Module], nn.Module], tmp_path: Path) -> None:
    model = nn.Sequential(norm(nn.Conv2d(3, 8, 3)), nn.BatchNorm2d(8), nn.ReLU(), norm(nn.Conv2d(8, 4, 3))).train()
    model(example())  # leaves the weights of the old kinds with a history
    model.eval()
    x = example(1)
    want, before = model(x).detach(), {key: value.clone() for key, value in model.state_dict().items()}
    made = copied(model)
    said = make_permanent(made)
    assert len(said) == 1
    assert said[0].endswith("of 0, 3 is made permanent")
    assert away(made(x), want) < 1e-6
    assert {"0.weight", "3.weight"} <= {name for name, _ in made.named_parameters()}
    assert not any(parametrize.is_parametrized(module) for module in made.modules())
    assert make_permanent(made) == []
    export_onnx(model, x, tmp_path / "m.onnx")
    assert away(load_terse(save_terse(model, x, tmp_path / "m.terse"))(x), want) < 1e-5
    assert model.state_dict().keys() == before.keys()  # the user's model is left as it was
    _, plan = PruneChannels(sparsity=0.5, refit=False).run(made, Task(example=x, quiet=True))
    assert plan["kept"]["0"]


def test_what_is_done_is_said() -> None:
    model = body(parametrizations.weight_norm(Standardized(3, 8, 3)))
    with pytest.warns(MadePermanent) as caught:
        opened(model, example())
    texts = [str(one.message) for one in caught]
    assert any(text == "weight norm of 0 is made permanent" for text in texts)
    assert any("Standardized" in text and "taken apart into plain layers" in text for text in texts)


def test_a_script_is_refused_in_words() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        script: Any = torch.jit.trace(body(nn.Conv2d(3, 8, 3)), example())
    with pytest.raises(ModelError, match="TorchScript, whose layers cannot be changed; build the model's own class"):
        Quantize(activations=None).run(script, Task(example=example(), quiet=True))
