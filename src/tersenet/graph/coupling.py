"""Which channels of which layers must be cut together.

Every channel that a layer makes gets a label; the labels follow the graph of the model through every operator, and
channels whose labels meet (at a residual addition, in a depthwise convolution) are one class. Classes that live in
the same layers form a bundle, within which they compete. The idea of a dependency graph with index maps is that of
DepGraph (Fang et al., arXiv:2301.12900); departures: labels are vectors per dimension, carried by the operators'
own shapes, and what was concluded is tried on a copy of the model without data (fake tensors), so that sizes written
into a forward are found out and frozen before anything is cut.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tersenet.graph.coupling_layers import layer
from tersenet.graph.coupling_rules import operator
from tersenet.graph.labels import Call, Labels
from tersenet.graph.surgery import cut
from tersenet.graph.trace import trace


@dataclass(frozen=True)
class Bundle:
    """Channels that live in the same layers, so that one can be cut instead of another.

    Args:
        classes: ids of its channels, ascending.
        members: (layer path, role) of every layer they live in.
        residual: whether they pass through a residual addition.
    """

    classes: np.ndarray
    members: tuple[tuple[str, str], ...]
    residual: bool


@dataclass(frozen=True)
class Coupling:
    """What must be cut together in one model.

    Args:
        slots: (layer path, role) -> class of every position; 0 = stays.
        bundles: what can be cut, in the model's order.
        frozen: path of a layer that makes channels which cannot be cut -> reason, naming the operator and its place.
        graph: the model's graph.
        states: node -> labels per dimension, as classes.
    """

    slots: dict[tuple[str, str], np.ndarray]
    bundles: tuple[Bundle, ...]
    frozen: dict[str, str]
    graph: fx.GraphModule
    states: dict[fx.Node, Any]

    def kept(self, removed: Sequence[int] | np.ndarray) -> dict[str, dict[str, list[int]]]:
        """The cut that removes these classes: {layer path: {role: kept indices}}, of the layers that change."""
        result: dict[str, dict[str, list[int]]] = {}
        for (path, role), classes in self.slots.items():
            stays = ~np.isin(classes, removed)
            if not stays.all():
                result.setdefault(path, {})[role] = np.flatnonzero(stays).tolist()
        return result

    def shape(self, node: fx.Node, removed: Sequence[int] | np.ndarray) -> tuple[int, ...]:
        """The shape of a node's output once these classes are gone."""
        return tuple(
            size if classes is None else size - int(np.isin(classes, removed).sum())
            for size, classes in zip(node.meta["shape"], self.states[node], strict=True)
        )


def coupling(model: nn.Module, example: Tensor) -> Coupling:
    """Reads what must be cut together, and tries it on a copy without data.

    Args:
        example: (N, ...), an input of the model.
    Raises:
        TraceError: when the forward cannot be captured.
    """
    graph = trace(model, example)
    labels = Labels()
    states: dict[fx.Node, Any] = {}
    for node in graph.graph.nodes:
        states[node] = _step(Call(labels, node, states), model, graph)
    _freeze_shared(labels, model, graph)
    known = _resolve(labels, graph, states)
    bad = _failures(model, known, example)
    if not bad:
        return known
    root, _ = labels.resolve()
    for bundle, said in bad:
        touching = [reason for literal, reason in labels.literals if np.isin(root[literal], bundle.classes).any()]
        reason = touching[0] if touching else f"cutting it breaks the forward: {said}"
        labels.freezes.append((bundle.classes, reason))
    return _resolve(labels, graph, states)


def _step(call: Call, model: nn.Module, graph: fx.GraphModule) -> Any:
    """Labels after one node."""
    node = call.node
    if node.op == "call_module":
        module = graph.get_submodule(str(node.target))
        return layer(call, module, _paths(model).get(id(module), str(node.target)))
    if node.op == "call_function":
        return operator(call)
    if node.op == "output":
        for source in node.all_input_nodes:
            call.labels.freeze_state(call.states[source], "its channels are the model's output")
    return (None,) * len(node.meta.get("shape", ()))


def _paths(model: nn.Module) -> dict[int, str]:
    """id of a module -> the first of its paths, so that a module with two names is cut once."""
    return {id(module): path for path, module in model.named_modules()}


def _freeze_shared(labels: Labels, model: nn.Module, graph: fx.GraphModule) -> None:
    """Freezes layers whose parameters are used by another layer or by the forward itself."""
    owner: dict[int, str] = {}
    reasons: dict[str, str] = {}
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            path, _, leaf = str(node.target).rpartition(".")
            reasons.setdefault(path, f"its {leaf} is also used outside of the layer")
    for path in dict.fromkeys(path for path, _ in labels.slots):
        for name, parameter in model.get_submodule(path).named_parameters(recurse=False):
            other = owner.setdefault(id(parameter), path)
            if other != path:
                reasons.setdefault(path, f"it shares its {name} with {other}")
                reasons.setdefault(other, f"it shares its {name} with {path}")
    for (path, _), vector in labels.slots.items():
        if path in reasons:
            labels.freeze(vector, f"{path}: {reasons[path]}")


def _resolve(labels: Labels, graph: fx.GraphModule, states: dict[fx.Node, Any]) -> Coupling:
    """Labels -> classes, frozen ones as 0, and the bundles they form."""
    root, reasons = labels.resolve()
    stays = np.array(sorted(reasons), dtype=np.int64)
    final = root.copy()
    final[np.isin(root, stays)] = 0
    frozen: dict[str, str] = {}
    for (path, role), vector in labels.slots.items():
        if role != "in":
            held = root[vector[final[vector] == 0]]
            reason = next((reasons[label] for label in held.tolist() if label in reasons), None)
            if reason is not None:
                frozen[path] = reason
    slots = {key: final[vector] for key, vector in labels.slots.items()}
    added = np.unique(final[np.concatenate(labels.added)]) if labels.added else np.zeros(0, np.int64)

    def classes(state: Any) -> Any:
        if isinstance(state, list):
            return [classes(part) for part in state]
        return tuple(None if vector is None else final[vector] for vector in state)

    resolved = {node: classes(state) for node, state in states.items()}
    return Coupling(slots, _bundles(slots, labels.count, added), frozen, graph, resolved)


def _bundles(slots: dict[tuple[str, str], np.ndarray], count: int, added: np.ndarray) -> tuple[Bundle, ...]:
    """Groups classes by the set of slots they live in. A set is known by the sum of its slots' random numbers."""
    keys = np.random.default_rng(0).integers(1, 2**63, len(slots), dtype=np.uint64)
    marks = np.zeros(count, dtype=np.uint64)
    for key, vector in zip(keys, slots.values(), strict=True):
        marks[np.unique(vector)] += key  # wraps around, which is as good
    marks[0] = 0
    found = []
    for mark in np.unique(marks[marks > 0]):
        ids = np.flatnonzero(marks == mark)
        members = tuple(slot for slot, vector in slots.items() if (vector == ids[0]).any())
        if any(role != "in" for _, role in members):
            found.append(Bundle(ids, members, bool(np.isin(ids, added).any())))
    return tuple(sorted(found, key=lambda bundle: int(bundle.classes[0])))


# --- the trial ---------------------------------------------------------------------------------------------------


def _failures(model: nn.Module, known: Coupling, example: Tensor) -> list[tuple[Bundle, str]]:
    """Bundles whose cut breaks the forward, and what it said: all at once, then by halves."""
    bad = []
    queue = [[bundle for bundle in known.bundles if len(bundle.classes) > 1]]
    while queue:
        group = queue.pop()
        if not group:
            continue
        said = _try(model, known, np.concatenate([bundle.classes[1::2] for bundle in group]), example)
        if said is None:
            continue
        if len(group) == 1:
            bad.append((group[0], said))
        else:
            queue += [group[: len(group) // 2], group[len(group) // 2 :]]
    return bad


def _try(model: nn.Module, known: Coupling, removed: np.ndarray, example: Tensor) -> str | None:
    """Runs the model without these classes on fake tensors: what went wrong, None when every shape is right."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(mode.from_tensor(parameter.detach()), requires_grad=False)
    for buffer in model.buffers():
        memo[id(buffer)] = mode.from_tensor(buffer)
    twin = copy.deepcopy(model, memo)
    expected: dict[str, list[tuple[int, ...]]] = {}
    for node in known.graph.graph.nodes:
        if node.op == "call_module" and "shape" in node.meta:
            expected.setdefault(str(node.target), []).append(known.shape(node, removed))
    wrong: list[str] = []

    def check(path: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            want = expected[path].pop(0) if expected[path] else None
            if want is not None and tuple(output.shape) != want and not wrong:
                wrong.append(f"{path} gives {tuple(output.shape)} in place of {want}")

        return hook

    for module in twin.modules():
        module.training = False
    for path in expected:
        twin.get_submodule(path).register_forward_hook(check(path))
    shape = (max(2, len(example)), *example.shape[1:])
    log = logging.getLogger("torch._subclasses.fake_tensor")
    was = log.disabled
    log.disabled = True  # a failure is an answer here, and it would be printed with its traceback
    try:
        cut(twin, known.kept(removed))
        with mode, torch.no_grad():
            twin(torch.empty(shape, dtype=example.dtype, device=example.device))
    except Exception as error:  # noqa: BLE001 - whatever the user's forward raises
        return (str(error).strip().splitlines() or [type(error).__name__])[0]
    finally:
        log.disabled = was
    return wrong[0] if wrong else None
