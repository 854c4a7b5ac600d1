"""Which layers can be given another format, and how much each format hurts there alone.

The divergence of the outputs when one layer's weights are rounded and nothing else, as in mixed precision by
sensitivity (Hubara et al., arXiv:2006.10518, section 5, who measure the loss). Rounding is to nearest: what repairs it
makes all of them better, and changes little in their order.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from tersenet.bricks.mask import stored_weight
from tersenet.bricks.quantized import quantized_kind
from tersenet.graph.fold import fold_all
from tersenet.graph.trace import trace
from tersenet.numerics.divergence import divergence
from tersenet.numerics.samples import Inputs, as_batch, first, side_by_side
from tersenet.quantization.formats import Storage, for_storage
from tersenet.quantization.nearest import fit_code
from tersenet.task import Task

if TYPE_CHECKING:
    from tersenet.quantization.quantize import Quantize

# Rounding one layer in one format takes a forward of all of them.
_IMAGES = 128


def layers_at_input(step: Quantize, model: nn.Module, task: Task) -> list[tuple[str, nn.Module]]:
    """The layers that read the model's input."""
    graph = trace(model, task.example)
    found: dict[str, nn.Module] = {}
    for node in graph.graph.nodes:
        if node.op != "call_module" or all(source.op != "placeholder" for source in node.all_input_nodes):
            continue
        path, layer = str(node.target), graph.get_submodule(str(node.target))
        if quantized_kind(layer) is not None and step.matches(path, layer):
            found[path] = layer
    return list(found.items())


def layers_to_choose(step: Quantize, model: nn.Module, task: Task) -> dict[str, str]:
    """Path -> format of the layers that the step quantizes; shortcuts of zeros and ones are none."""
    plan = step.plan(model, task)
    shortcuts: Mapping[str, Any] = plan.get("shortcuts", {})
    return {path: entry["weights"] for path, entry in plan.get("layers", {}).items() if path not in shortcuts}


def find_sensitivities(step: Quantize, model: nn.Module, task: Task, images: Inputs) -> dict[str, dict[Any, float]]:
    """path -> setting of `choices` -> divergence."""
    choices = step.choices(model, task)
    found: dict[str, dict[Any, float]] = {path: {} for path in choices}
    few = first(images, _IMAGES)
    folded = trace(copy.deepcopy(model).eval(), task.example)
    if step.activations is not None:
        fold_all(folded)
    with torch.no_grad():
        wanted = folded(*few)
        for path, settings in choices.items():
            for name in settings:
                if name == "float":
                    found[path][name] = 0.0
                elif not step.offer:
                    found[path][name] = _whole(step, model, task, path, images)
                else:
                    found[path][name] = divergence(wanted, _rounded(folded, path, name, *few))
    return found


def spared(step: Quantize, model: nn.Module, task: Task) -> tuple[str, ...]:
    """The `step.spare` layers whose rounding alone moves the outputs of calibration images furthest."""
    layers = layers_to_choose(dataclasses.replace(step, spare=0), model, task)
    few = task.inputs_like(model, _IMAGES)
    folded = trace(copy.deepcopy(model).eval(), task.example)
    if step.activations is not None:
        fold_all(folded)
    with torch.no_grad():
        wanted = folded(*few)
        hurt = {path: divergence(wanted, _rounded(folded, path, name, *few)) for path, name in layers.items()}
    return tuple(sorted(hurt, key=hurt.__getitem__, reverse=True)[: step.spare])


def _whole(step: Quantize, model: nn.Module, task: Task, path: str, images: Inputs) -> float:
    """The divergence when one layer, and the values that it reads and gives, are rounded."""
    task = dataclasses.replace(task, calibrate=[as_batch(images)], test=None, quiet=True)
    alone, _ = dataclasses.replace(step, only=(path,), skip=()).run(copy.deepcopy(model), task)
    return divergence(model(*side_by_side(images)), alone(*side_by_side(images)))


def _rounded(graph: fx.GraphModule, path: str, name: str, *inputs: Tensor) -> Any:
    """The outputs with one layer rounded to nearest; the layer is left as it was."""
    layer: Any = graph.get_submodule(path)
    weight = stored_weight(layer)
    before = weight.detach().clone()
    entry = Storage().entry(name, tuple(weight.shape))
    if entry is None:
        return graph(*inputs)
    brick: Any = for_storage(copy.deepcopy(layer), entry)
    fit_code(brick.code, brick.weight)
    weight.copy_(brick.rounded_weight())
    try:
        return graph(*inputs)
    finally:
        weight.copy_(before)
