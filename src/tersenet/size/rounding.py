"""One network rounded for one price of a bit: layer by layer, each making up for what the layers before it do.

One pass over the graph with all images at once. Each layer is first fitted to what it gave in the original, from what
the rounded layers before it give now (as in pruning/refit.py), then put on a grid (numerics/rated_rounding.py); the
mean that it still misses goes into its bias (Nagel et al., arXiv:1906.04721) or into the mean of the norm behind it.
Without images all inputs are taken as equally strong and independent.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from tersenet.bricks.brick import Brick
from tersenet.bricks.evaluating import evaluating
from tersenet.bricks.mask import at_most_masked, mask_of, stored_weight
from tersenet.codec.estimate import code_lengths
from tersenet.graph import rows
from tersenet.graph.trace import trace
from tersenet.numerics.rated_rounding import LARGEST, Bits, round_rated, rounded, steps_of
from tersenet.numerics.repaired_rounding import damped
from tersenet.numerics.samples import Inputs, first
from tersenet.size.sensitivity import output_sensitivities

DAMPING = 1e-3
RIDGE = 1e-2  # of the fit to the original's outputs, drawn to the weights that are there
WIDTH = 3.8  # of the steps, see `steps_of`
_ROWS = 2**16
_DRAWN = 512  # images that tell the sensitivities


@dataclass(frozen=True)
class Pricer:
    """What a network's layers give and how much that matters, measured once, so that many prices can be tried.

    Args:
        model: in evaluation mode; left as it is.
        paths: of the layers that are rounded.
        images: all inputs, (N, ...) each, or None.
        targets: path -> (R, O) outputs at sampled places.
        sensitivities: path -> (O,).
    """

    model: nn.Module
    paths: tuple[str, ...]
    images: tuple[Tensor, ...] | None
    targets: dict[str, Tensor]
    sensitivities: dict[str, Tensor]

    @classmethod
    def of(cls, model: nn.Module, example: Inputs, matches: Callable[[str, nn.Module], bool], images: Inputs | None):  # type: ignore[no-untyped-def]
        """Measures a model; `matches(path, layer)` says which layers are wanted."""
        graph = trace(model, example)
        calls = {node: path for node, path in _calls(graph).items() if matches(path, graph.get_submodule(path))}
        paths = tuple(calls.values())
        if images is None or not paths:
            shares = {path: _equal_shares(graph.get_submodule(path)) for path in paths}
            return cls(model, paths, None, {}, shares)
        few = first(images, rows.fitting(graph))
        targets: dict[str, Tensor] = {}

        class Record(fx.Interpreter):
            def run_node(self, node: fx.Node) -> Any:
                value = super().run_node(node)
                if node in calls:
                    layer = graph.get_submodule(calls[node])
                    targets[calls[node]] = rows.given(value, layer, _places(node, layer, len(few[0]))).clone()
                return value

        with evaluating(model):
            with torch.no_grad():
                Record(graph).run(*few)
            sensitivities = output_sensitivities(graph, calls, first(few, _DRAWN))
        return cls(model, paths, few, targets, sensitivities)

    @property
    def weights(self) -> int:
        """How many weights are rounded."""
        return sum(stored_weight(self.model.get_submodule(path)).numel() for path in self.paths)

    def at(self, price: float, width: float = WIDTH) -> nn.Module:
        """A copy of the model, rounded where an error of `price` (divergence in nats) weighs as much as a bit."""
        model = copy.deepcopy(self.model)
        with evaluating(model), torch.no_grad():
            if self.images is None:
                for path in self.paths:
                    _round_blindly(model.get_submodule(path), self.sensitivities[path], price, width)
                return model
            _Pass(self, model, price, width).run(*self.images)
        return model


class _Pass(fx.Interpreter):
    def __init__(self, pricer: Pricer, model: nn.Module, price: float, width: float) -> None:
        assert pricer.images is not None
        super().__init__(trace(model, first(pricer.images, 2)))
        self.pricer, self.price, self.width = pricer, price, width
        self.calls = {node: path for node, path in _calls(self.module).items() if path in pricer.paths}  # type: ignore[arg-type]

    def run_node(self, node: fx.Node) -> Any:
        path = self.calls.get(node)
        if path is not None:
            layer: Any = self.module.get_submodule(path)
            value = self.env[node.args[0]]  # type: ignore[index]
            inputs = rows.read(value, layer, _places(node, layer, len(value)))
            behind = _norm_behind(self.module, node)  # type: ignore[arg-type]
            _round(
                layer,
                behind,
                inputs,
                self.pricer.targets[path],
                self.pricer.sensitivities[path],
                self.price,
                self.width,
            )
        return super().run_node(node)


def _round(
    layer: Any, norm: Any, inputs: Tensor, target: Tensor, sensitivity: Tensor, price: float, width: float
) -> None:
    """Puts a layer on a grid, given (R, G I K) of what it reads now and (R, O) of what it gave."""
    groups = getattr(layer, "groups", 1)
    weight = stored_weight(layer)
    was = layer.weight.double().flatten(1)
    centred = norm is not None or layer.bias is not None
    mean = inputs.mean(dim=0, dtype=torch.float64) * centred
    offset = target.mean(dim=0, dtype=torch.float64) * centred
    count = len(inputs)
    parts = [
        (part - middle.to(part.dtype)) for part, middle in zip(inputs.chunk(groups, 1), mean.chunk(groups), strict=True)
    ]
    wanted = (target - offset.to(target.dtype)).chunk(groups, dim=1)
    gram = torch.stack([part.T @ part for part in parts]).double() / count  # (G, I, I)
    cross = torch.stack([out.T @ part for out, part in zip(wanted, parts, strict=True)]).double() / count  # (G, O, I)
    old = was.view(groups, -1, was.shape[1])
    ridge = damped(gram, RIDGE)
    pull = ridge.diagonal(dim1=-2, dim2=-1)[:, :1] - gram.diagonal(dim1=-2, dim2=-1)[:, :1]  # (G, 1) what was added
    fitted = torch.linalg.solve(ridge, (cross + pull[..., None] * old).mT).mT
    made = _onto_grid(layer, fitted, damped(gram, DAMPING), sensitivity.view(groups, -1), price, width)
    given = torch.cat([new @ middle for new, middle in zip(made, mean.chunk(groups), strict=True)])  # (O,)
    weight.copy_(made.reshape(weight.shape))
    if layer.bias is not None:
        layer.bias.copy_(_bias(offset - given, sensitivity, price, width))
    elif norm is not None:
        norm.running_mean.add_((given - offset).to(norm.running_mean.dtype))


def _onto_grid(layer: Any, weight: Tensor, gram: Tensor, sensitivity: Tensor, price: float, width: float) -> Tensor:
    """(G, O, I) values on grids, a step for each row."""
    shape = tuple(layer.weight.shape)
    largest = weight.abs().amax(dim=-1)  # (G, O)
    step = steps_of(gram, sensitivity, price, width)
    # No step finer than what whole numbers reach, and none that could not take its row's largest value.
    step = rounded(torch.minimum(torch.maximum(step, largest / LARGEST), 4 * largest.clamp(min=1e-12)), 4)
    mask = mask_of(layer)
    gone = None if mask is None else ~mask.mask.reshape(weight.shape)

    def costs(q: Tensor) -> Bits:
        lengths = code_lengths(q.reshape(shape).to(torch.int32).cpu().numpy(), spread=2)
        contexts = torch.from_numpy(lengths.contexts).long().reshape(weight.shape).to(q.device)
        table = torch.from_numpy(lengths.bits).double().to(q.device)
        top = table.shape[1] - 1

        def bits(column: int, numbers: Tensor) -> Tensor:
            found = table[contexts[..., column], (numbers.long() - lengths.low).clamp(0, top)]
            return found if gone is None else found + 1e30 * (gone[..., column] & (numbers != 0))

        return bits

    q = round_rated(weight, gram, sensitivity, step, price, costs)
    if gone is not None:
        q = torch.where(gone, 0.0, q)
    return q * step[..., None]


def _bias(bias: Tensor, sensitivity: Tensor, price: float, width: float) -> Tensor:
    """A bias on one grid for all of it: a bias is a weight whose input is 1."""
    largest = float(bias.abs().max())
    step = float(torch.exp((width * torch.sqrt(price / sensitivity)).log().mean()))
    step = max(min(step, largest / 8), largest / LARGEST, 1e-12)
    unit = rounded(torch.tensor(step, dtype=torch.float64), 4)
    return torch.round(bias / unit).clamp(-LARGEST, LARGEST) * unit


def _equal_shares(layer: Any) -> Tensor:
    """(O,) sensitivities under which an error counts as a share of its row."""
    return 1 / layer.weight.detach().double().flatten(1).square().sum(dim=1).clamp(min=1e-12)


def _round_blindly(layer: Any, sensitivity: Tensor, price: float, width: float) -> None:
    """Puts a layer on a grid without data: inputs of strength 1 that have nothing to do with each other."""
    groups, weight = getattr(layer, "groups", 1), stored_weight(layer)
    was = layer.weight.double().flatten(1)
    gram = torch.eye(was.shape[1], dtype=torch.float64, device=was.device).expand(groups, -1, -1)
    made = _onto_grid(layer, was.view(groups, -1, was.shape[1]), gram, sensitivity.view(groups, -1), price, width)
    weight.copy_(made.reshape(weight.shape))
    if layer.bias is not None:
        layer.bias.copy_(_bias(layer.bias.double(), sensitivity, price, width))


def why_not_rounded(graph: fx.GraphModule, path: str, layer: nn.Module) -> str | None:
    """Why a layer is left alone; None for one that is rounded."""
    calls = sum(node.op == "call_module" and node.target == path for node in graph.graph.nodes)
    if isinstance(layer, Brick):
        return "are quantized already"
    if not isinstance(layer, nn.Conv2d | nn.Linear):
        return f"are no 2-d convolutions or linear layers, but {type(layer).__name__}"
    if not _readable(layer):
        return "have another parametrization, or a padding that is not zeros"
    return None if calls == 1 else f"are called {calls} times"


def _calls(graph: fx.GraphModule) -> dict[fx.Node, str]:
    """node -> path of the layers that are called once and compute what their weight, under its mask, says."""
    nodes: dict[str, list[fx.Node]] = {}
    for node in graph.graph.nodes:
        if node.op == "call_module" and _readable(graph.get_submodule(str(node.target))):
            nodes.setdefault(str(node.target), []).append(node)
    return {calls[0]: path for path, calls in nodes.items() if len(calls) == 1}


def _readable(layer: Any) -> bool:
    if isinstance(layer, Brick):  # a layer of few values: its float weights are in no file
        return False
    if not isinstance(stored_weight(layer) if hasattr(layer, "weight") else None, nn.Parameter):
        return False
    if not at_most_masked(layer):
        return False
    if isinstance(layer, nn.Conv2d):
        return layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    return isinstance(layer, nn.Linear)


def _places(node: fx.Node, layer: Any, images: int) -> Tensor:
    """(P,) positions of a layer's output that take part, the same for every image."""
    unknowns = layer.weight[0].numel() * getattr(layer, "groups", 1)
    wanted = min(_ROWS, max(4 * unknowns, rows.FLOATS // unknowns))
    count = rows.size(node) // node.meta["shape"][0] // layer.weight.shape[0]
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    return order[: max(1, -(-wanted // images))].sort().values.to(layer.weight.device)


def _norm_behind(graph: fx.GraphModule, node: fx.Node) -> Any:
    """The batch norm that alone reads what a layer gives, or None."""
    user = next(iter(node.users)) if len(node.users) == 1 else None
    if user is None or user.op != "call_module":
        return None
    norm = graph.get_submodule(str(user.target))
    return norm if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.running_mean is not None else None
