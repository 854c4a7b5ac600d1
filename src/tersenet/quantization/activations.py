"""Quantization of a whole graph: which layers and values, and putting bricks and quantizers in their places."""

from __future__ import annotations

import copy
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd

from tersenet.bricks.brick import Brick
from tersenet.bricks.coded import RoundedLayer
from tersenet.bricks.quantized import QuantizedLayer, identity_convolution, quantized_kind
from tersenet.bricks.quantizer import Quantizer
from tersenet.bricks.shortcut import PadShortcut
from tersenet.errors import SettingsError
from tersenet.graph.fold import fold_all
from tersenet.graph.outside_reads import keep_reads
from tersenet.graph.points import activation_points, insert_after, layers_on_constants
from tersenet.graph.trace import said_input, trace, trace_with
from tersenet.graph.twins import merge_twins
from tersenet.quantization.equalise import find_pairs, unclip
from tersenet.quantization.formats import Format
from tersenet.step import Plan, Step

if TYPE_CHECKING:
    from tersenet.quantization.quantize import Quantize

QUANTIZERS = "quantizers"


def plan_activations(model: nn.Module, example: Tensor, step: Quantize) -> Plan:
    """Decides on a copy, because folding norms and replacing shortcuts come first.

    Returns:
        {"input": {"shape", "dtype"}, "layers": {path: scheme}, "shortcuts": {path: [channels, before, after, stride]},
        "points": {grid: [node, ...]}, "float": {layer or node: why}}, or {} when no layer can be quantized.
    """
    graph = trace(copy.deepcopy(model), example)
    _unquantize_weights(graph)
    keep_reads(graph, copies=True)
    shortcuts = _shortcuts(graph, step)
    _prepare(graph, shortcuts)
    layers, floats = {}, {}
    for path, module in graph.named_modules():
        if isinstance(module, _ConvNd | nn.Linear) and not isinstance(module, Brick):
            # A shortcut's weights are 0 and 1, exact with any number of bits.
            weights = "int8" if path in shortcuts else step.format_of(path, module)
            reason = _why_float(path, module, step) or ("left out by formats" if weights == "float" else None)
            if reason is None:
                layers[path] = {"weights": weights, "activations": step.activations}
            else:
                floats[path] = reason
    if not set(layers) - set(shortcuts):
        return {}
    clips = []
    if step.equalise:
        pairs = find_pairs(graph)
        clips = [name for pair in pairs if {pair.first, pair.second} <= set(layers) for name in pair.clips]
        unclip(graph, clips)
    points = activation_points(graph, layers, copies=shortcuts)
    if fixed := layers_on_constants(graph, layers, points):
        layers = {path: scheme for path, scheme in layers.items() if path not in fixed}
        floats.update(dict.fromkeys(fixed, "reads constants, which are not rounded"))
        if not set(layers) - set(shortcuts):
            return {}
        points = activation_points(graph, layers, copies=shortcuts)
    floats.update(
        {
            name: f"{kind} has no int8 operator in every runtime"
            for name, kind in points.floats.items()
            if name not in floats
        }
    )
    return {
        "input": said_input(example),
        "layers": layers,
        "shortcuts": shortcuts,
        **({"unclipped": clips} if clips else {}),
        "points": points.groups,
        "float": floats,
    }


def apply_activations(model: nn.Module, plan: Plan) -> fx.GraphModule:
    """The traced model with bricks in place of layers and quantizers at the points.

    Raises:
        SettingsError: when the plan is another model's.
    """
    device = next((p.device for p in model.parameters()), None)
    graph = trace_with(model, plan["input"])
    _unquantize_weights(graph)
    keep_reads(graph, copies=True)
    _prepare(graph, plan["shortcuts"])
    try:
        unclip(graph, plan.get("unclipped", []))
        bits = 8
        for path, entry in plan["layers"].items():
            layer = graph.get_submodule(path)
            kind = quantized_kind(layer)
            if kind is None:
                raise SettingsError(
                    f"the plan quantizes {path}, which is {type(layer).__name__} here; it is another model's"
                )
            graph.add_submodule(path, kind.of(layer, bits=Format.named(entry["weights"]).bits))
            bits = Format.named(entry["activations"]).bits
        insert_after(graph, plan["points"], QUANTIZERS, partial(Quantizer, bits))
    except (AttributeError, KeyError) as error:
        raise SettingsError(
            f"the plan does not fit: this model has no {error}; apply it to the model it was made for"
        ) from error
    return graph.to(device) if device is not None else graph


def _unquantize_weights(graph: fx.GraphModule) -> None:
    """Layers whose weights alone were quantized start again from their float weights, with activations this time."""
    for path, module in list(graph.named_modules()):
        if isinstance(module, RoundedLayer) or (isinstance(module, QuantizedLayer) and module.input_scale is None):
            graph.add_submodule(path, module.unquantized())


def _shortcuts(graph: fx.GraphModule, step: Step) -> dict[str, list[int]]:
    """Path -> what `identity_convolution` takes, for each zero-padding shortcut."""
    found: dict[str, list[int]] = {}
    for node in graph.graph.nodes:
        if node.op == "call_module":
            brick = graph.get_submodule(str(node.target))
            if not isinstance(brick, PadShortcut):
                continue
            arguments = [int(node.args[0].meta["shape"][1]), brick.before, brick.after, brick.stride]
            # `only` and `skip` treat it as the convolution that it becomes.
            if step.matches(str(node.target), identity_convolution(*arguments)):
                found[str(node.target)] = arguments
    return found


def _prepare(graph: fx.GraphModule, shortcuts: dict[str, list[int]]) -> None:
    """Folds norms, merges what is computed twice, and makes convolutions of the zero-padding shortcuts. Exact."""
    fold_all(graph)
    merge_twins(graph)
    for path, arguments in shortcuts.items():
        graph.add_submodule(path, identity_convolution(*arguments))


def _why_float(path: str, module: Any, step: Step) -> str | None:
    """Why a layer stays float; None when it does not."""
    if quantized_kind(module) is None:
        return f"no int8 kernel for {type(module).__name__}"
    if not step.matches(path, module):
        return "left out by only or skip"
    if isinstance(module, nn.Conv2d) and module.padding_mode != "zeros":
        return f"no int8 kernel for padding_mode={module.padding_mode!r}"
    return None
