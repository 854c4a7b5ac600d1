"""Networks that read a layer's attributes beside calling it: every step is right, or leaves the layer alone.

What a step would get wrong is large in these networks, and each is held against what it computed before.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tersenet import left_alone
from tersenet.deploy.folded import folded_graph
from tersenet.errors import NoEffect
from tersenet.graph.blocks import residual_blocks
from tersenet.graph.outside_reads import Read, keep_reads, outside_reads, read_by_graph, used_outside
from tersenet.graph.trace import trace
from tersenet.pruning.prune_weights import PruneWeights
from tersenet.quantization.binarise import Binarise
from tersenet.quantization.quantize import Quantize
from tersenet.quantization.quantize_aware import QuantizeAware
from tersenet.quantization.ternarise import Ternarise
from tersenet.rewrite.fold_batch_norm import FoldBatchNorm
from tersenet.rewrite.settle import Settle
from tersenet.step import Step
from tersenet.task import Task

X = torch.randn(8, 3, 12, 12, generator=torch.Generator().manual_seed(5))


class Net(nn.Module):
    """Two convolutions with a norm between them, a linear head, and a forward as a function."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor], bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 8, 3, bias=bias)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)
        for name, low, high in (("running_mean", -1.0, 1.0), ("running_var", 0.3, 2.0)):
            getattr(self.norm, name).uniform_(low, high)
        nn.init.uniform_(self.norm.weight, 0.5, 1.5)
        nn.init.uniform_(self.norm.bias, -1, 1)
        self.function = forward
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)

    def rest(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.second(F.relu(x))).mean((2, 3)))


def norm_by_hand(m: Any, x: Tensor, **options: Any) -> Tensor:
    norm = m.norm
    return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, **options)


NORM_READ: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "functional": lambda m, x: m.rest(norm_by_hand(m, m.first(x))),
    "functional, another eps": lambda m, x: m.rest(norm_by_hand(m, m.first(x), eps=0.5)),
    "a statistic": lambda m, x: m.rest(m.norm(m.first(x)) * m.norm.running_var.mean()),
    "the type of a tensor": lambda m, x: m.rest(m.norm(m.first(x))).to(m.norm.weight.dtype),
    "a setting": lambda m, x: m.rest(m.norm(m.first(x)) / m.norm.num_features),
}
WEIGHT_READ: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "weight": lambda m, x: m.rest(m.norm(m.first(x))) * m.first.weight.abs().sum(),
    "bias": lambda m, x: m.rest(m.norm(m.first(x))) + 5 * m.first.bias.sum(),
    "transposed": lambda m, x: m.rest(F.conv_transpose2d(m.norm(m.first(x)), m.first.weight)[:, :1].repeat(1, 8, 1, 1)),
}
SECOND_READ: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "weight": lambda m, x: m.rest(m.norm(m.first(x))) * m.second.weight.abs().sum(),
    "functional": lambda m, x: m.head(F.conv2d(m.norm(m.first(x)), m.second.weight, m.second.bias).mean((2, 3))),
    "scaled": lambda m, x: m.head(F.conv2d(m.norm(m.first(x)), m.second.weight / m.second.weight.norm()).mean((2, 3))),
    "the type of the weight": lambda m, x: m.rest(m.norm(m.first(x)).to(m.second.weight.dtype)),
}


def run(step: Step, model: nn.Module, task: Task | None = None) -> tuple[nn.Module, dict[str, str]]:
    """What a step makes, and why it left which layers alone."""
    with left_alone.listening() as heard, warnings.catch_warnings():
        warnings.simplefilter("ignore", NoEffect)
        model, _ = step.run(model, task or Task(example=X[:2]))
    return model, {path: reason.why for _, left in heard for reason in left.reasons for path in reason.layers}


# --- who reads what ------------------------------------------------------------------------------------------------


def test_reads_from_outside_are_found_with_their_reader() -> None:
    model = Net(NORM_READ["functional"])
    names = ("running_mean", "running_var", "weight", "bias")
    assert outside_reads(model, X[:2]) == [Read("norm", name, "", "Net") for name in names]
    assert used_outside(model, X[:2], ("eps",)) == {}
    attention = nn.Sequential(nn.Flatten(2), nn.TransformerEncoderLayer(144, 4, 16, batch_first=True)).eval()
    found = {(read.path, read.reader, read.kind) for read in outside_reads(attention, X[:2])}
    assert found == {("1.self_attn.out_proj", "1.self_attn", "MultiheadAttention")}


def test_a_model_is_as_it_was_after_it_was_watched() -> None:
    def counting(m: Any, x: Tensor) -> Tensor:
        m.norm.num_batches_tracked.add_(1)
        m.norm.running_mean = m.norm.running_mean + 1
        m.seen = x
        return m.rest(m.norm(m.first(x)))

    model = Net(counting).train()
    kinds, state = [type(module) for module in model.modules()], {k: v.clone() for k, v in model.state_dict().items()}
    assert outside_reads(model, X[:2])
    assert [type(module) for module in model.modules()] == kinds
    assert all(m.training for m in model.modules())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not hasattr(model, "seen")
    assert torch.backends.mha.get_fastpath_enabled()


def test_models_made_in_inference_mode_and_graphs_are_watched() -> None:
    with torch.inference_mode():
        made = Net(NORM_READ["a statistic"])
    assert used_outside(made, X[:2], None).keys() == {"norm"}
    graph = trace(Net(WEIGHT_READ["weight"]), X[:2])
    before = graph(X)
    assert used_outside(graph, X[:2]).keys() == {"first"}
    folded, why = run(FoldBatchNorm(), graph)
    torch.testing.assert_close(folded(X), before)
    assert "norm" in why


def test_masks_and_calls_are_no_reads_from_outside() -> None:
    model, _ = run(PruneWeights(sparsity=0.5), Net(lambda m, x: m.rest(m.norm(m.first(x)))))
    assert outside_reads(model, X[:2]) == []
    direct = Net(lambda m, x: m.rest(m.norm.forward(m.first(x))))
    assert used_outside(direct, X[:2]) == {}


# --- folding -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NORM_READ)
def test_a_norm_that_is_read_elsewhere_stays(name: str) -> None:
    model = Net(NORM_READ[name])
    before = model(X)
    model, why = run(FoldBatchNorm(), model)
    torch.testing.assert_close(model(X), before)
    assert why["norm"].startswith("are read elsewhere, too: their ")
    assert why["norm"].endswith("in the model's own forward")
    torch.testing.assert_close(folded_graph(model, X[:2])(X), before, rtol=1e-4, atol=1e-4)  # in a graph all can go


@pytest.mark.parametrize("name", WEIGHT_READ)
def test_a_norm_behind_a_layer_that_is_read_elsewhere_stays(name: str) -> None:
    model = Net(WEIGHT_READ[name])
    before = model(X)
    model, why = run(FoldBatchNorm(), model)
    torch.testing.assert_close(model(X), before)
    assert why["norm"].startswith("stand behind layers that are read elsewhere, too: their ")
    graph = folded_graph(model, X[:2])
    torch.testing.assert_close(graph(X), before, rtol=1e-4, atol=1e-4)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in graph.modules())


def test_a_layer_that_is_only_called_by_hand_gets_no_bias_that_nobody_reads() -> None:
    model = Net(lambda m, x: m.rest(m.norm(F.conv2d(x, m.first.weight))), bias=False)
    before = model(X)
    model, _ = run(FoldBatchNorm(), model)
    torch.testing.assert_close(model(X), before)


# --- few bits ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SECOND_READ)
@pytest.mark.parametrize(
    "step",
    [Quantize(activations=None), Ternarise(edges="same"), Binarise(edges="same"), QuantizeAware(activations=None)],
    ids=lambda step: step.name,
)
def test_a_layer_whose_weight_is_read_elsewhere_stays_float(step: Step, name: str) -> None:
    model = Net(SECOND_READ[name])
    task = Task(example=X[:2], calibrate=[X])
    model, why = run(step, model, task)
    assert type(model.second) is nn.Conv2d
    assert type(model.first) is not nn.Conv2d
    assert why["second"] == "are read elsewhere, too: their weight in the model's own forward"
    simulated = model(X)
    torch.testing.assert_close(trace(model, X[:2])(X), simulated)
    settled, _ = run(Settle(), model, task)
    torch.testing.assert_close(settled(X), simulated, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["weight", "scaled", "functional"])
@pytest.mark.parametrize("equalise", [False, True])
def test_a_quantized_graph_keeps_what_it_reads_in_float(name: str, equalise: bool) -> None:
    model = Net(SECOND_READ[name])
    before, task = model(X), Task(example=X[:2], calibrate=[X])
    quantized, _ = run(Quantize(samples=8, equalise=equalise), model, task)
    simulated = quantized(X)
    assert (simulated - before).abs().max() < 0.05 * before.abs().max()
    settled, _ = run(Settle(), quantized, task)
    torch.testing.assert_close(settled(X), simulated, rtol=1e-4, atol=1e-4)


def test_a_layer_that_is_never_called_is_not_said_to_have_no_kernel() -> None:
    model = Net(SECOND_READ["scaled"])
    _, why = run(Quantize(samples=8), model, Task(example=X[:2], calibrate=[X]))
    assert why == {"second": "stay float: the forward does not call them"}


def test_a_trained_graph_keeps_what_it_reads_with_the_layer() -> None:
    model, _ = run(QuantizeAware(), Net(SECOND_READ["weight"]), Task(example=X[:2], calibrate=[X]))
    assert not read_by_graph(model)  # type: ignore[arg-type]
    assert model.second_weight is model.second.weight
    simulated = model(X)
    settled, _ = run(Settle(), model)  # which also rounds the bias to the steps of int32
    assert (settled(X) - simulated).abs().max() < 0.01 * simulated.abs().max()


def test_what_a_graph_reads_can_be_copied() -> None:
    graph = trace(Net(SECOND_READ["weight"]), X[:2])
    before = graph(X)
    assert list(read_by_graph(graph)) == ["second"]
    keep_reads(graph, copies=True)
    assert torch.equal(graph(X), before)
    with torch.no_grad():
        graph.second.weight.zero_()
    assert torch.equal(graph.second_weight, Net(SECOND_READ["weight"]).second.weight)


def test_equalising_leaves_layers_that_are_read_elsewhere() -> None:
    model = Net(lambda m, x: m.head(m.second(F.relu(m.first(x))).mean((2, 3))) * m.first.weight.abs().sum())
    before = model(X)
    model, _ = run(Quantize(activations=None, equalise=True), model)
    assert (model(X) - before).abs().max() < 0.02 * before.abs().max()


@pytest.mark.parametrize("outer", ["layer", "stack"])
def test_transformer_layers_compute_with_rounded_weights_in_evaluation(outer: str) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    inner = layer if outer == "layer" else nn.TransformerEncoder(layer, 1)
    model = nn.Sequential(nn.Unflatten(1, (1, 3)), nn.Flatten(0, 1), nn.Flatten(2), nn.Linear(144, 16), inner).eval()
    model, why = run(Quantize(weights="int2", activations=None), model)
    assert [path for path, said in why.items() if "MultiheadAttention" in said] == [
        path for path, _ in model.named_modules() if path.endswith("out_proj")
    ]
    with torch.no_grad():
        quick = model(X)
    model.requires_grad_(True)
    torch.testing.assert_close(quick, model(X))  # with gradients torch calls the layers one by one
    torch.testing.assert_close(trace(model, X[:2])(X), quick)


# --- the others ----------------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inside(x)


class Blocks(nn.Module):
    """Of the second block a setting is read."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.a, self.b, self.head = nn.Conv2d(3, 8, 3), Block(), Block(), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.a(self.first(x))).mean((2, 3)) / self.b.inside.out_channels)


def test_a_block_of_which_a_setting_is_read_is_not_dropped() -> None:
    found = residual_blocks(Blocks().eval(), X[:2])
    assert list(found.found) == ["a"]
    assert found.refused["b"] == "its inside is used outside of it"


def test_refitting_leaves_layers_that_are_read_elsewhere() -> None:
    model = Net(WEIGHT_READ["bias"])
    bias, weight = model.first.bias.clone(), model.second.weight.clone()
    model, _ = run(PruneWeights(sparsity=0.5, refit=True, samples=8), model, Task(example=X[:2], calibrate=[X]))
    assert torch.equal(model.first.bias, bias)
    mask = model.second.weight != 0
    assert not torch.equal(model.second.weight[mask], weight[mask])
