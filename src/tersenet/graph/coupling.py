"""Which channels of which layers must be cut together.

Every channel that a layer makes gets a label; the labels follow the graph of the model through every operator, and
channels whose labels meet (at a residual addition, in a depthwise convolution) are one class. Classes that live in
the same layers form a bundle, within which they compete. The idea of a dependency graph with index maps is that of
DepGraph (Fang et al., arXiv:2301.12900); departures: labels are vectors per dimension, carried by the operators'
own shapes; sizes written into a forward are no obstacle, because the model can be replaced by its traced graph, in
which they are written anew (graph/literals.py); and what was concluded is tried on a copy of the model without data
(graph/trial.py), so that what cannot be cut is found out and frozen before anything is.

Where a dimension of channels is split into several by a reshape, one of them shrinks. A first reading follows each of
them alone: the one over which a product of tensors is repeated holds the heads of attention, and it is taken; else the
last. What turns out to be frozen that way is tried the other ways.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor, fx, nn

from tersenet.errors import SurgeryError
from tersenet.graph import trial
from tersenet.graph.capture import Example, inputs_of
from tersenet.graph.coupling_layers import layer
from tersenet.graph.coupling_rules import operator
from tersenet.graph.labels import Call, Labels
from tersenet.graph.literals import Rewrite, rewrites
from tersenet.graph.surgery import axes
from tersenet.graph.trace import has_open_batch, said_input, trace

Kept = dict[str, dict[str, list[int]]]
_ATTEMPTS = 3  # ways to split a dimension; more dimensions than (3, heads, size) are rare


@dataclass(frozen=True)
class Bundle:
    """Channels that live in the same layers, so that one can be cut instead of another.

    Args:
        classes: ids of its channels, ascending.
        members: (layer path, role) of every layer they live in.
        residual: whether they pass through a residual addition.
        tensors: (parameter path, "dim" and its number) of every parameter or buffer outside of layers.
    """

    classes: np.ndarray
    members: tuple[tuple[str, str], ...]
    residual: bool
    tensors: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Coupling:
    """What must be cut together in one model.

    Args:
        slots: (layer path, role) -> class of every position; 0 = stays. Parameters outside of layers have the roles
            "dim0", "dim1" and so on.
        bundles: what can be cut, in the model's order.
        frozen: path of a layer that makes channels which cannot be cut -> reason, naming the operator and its place.
        graph: the model's graph.
        states: node -> labels per dimension, as classes.
        count: classes are below this number.
        rigid: whether the model's own forward may fail on a cut, so that the graph must take its place.
        inputs: the example without its numbers.
    """

    slots: dict[tuple[str, str], np.ndarray]
    bundles: tuple[Bundle, ...]
    frozen: dict[str, str]
    graph: fx.GraphModule
    states: dict[fx.Node, Any]
    count: int
    rigid: bool = False
    inputs: tuple[Tensor, ...] = ()

    def gone(self, removed: Sequence[int] | np.ndarray) -> np.ndarray:
        """(count,) bool."""
        gone = np.zeros(self.count, dtype=bool)
        gone[np.asarray(removed, dtype=np.int64)] = True
        return gone

    def kept(self, removed: Sequence[int] | np.ndarray) -> Kept:
        """The cut that removes these classes: {layer path: {role: kept indices}}, of the layers that change."""
        gone, result = self.gone(removed), Kept()
        for (path, role), classes in self.slots.items():
            goes = gone[classes]
            if goes.any():
                result.setdefault(path, {})[role] = np.flatnonzero(~goes).tolist()
        return result

    def plan(self, model: nn.Module, removed: Sequence[int] | np.ndarray) -> dict[str, Any]:
        """What graph/recut.py needs: {"kept": the cut}, and "traced" where the graph must take the model's place.

        "traced" describes the inputs with which the graph is traced again, [{"shape", "dtype"}].
        """
        kept = self.kept(removed)
        rigid = self.rigid and self._must_trace(model, kept, removed)
        if not rigid and not (kept and has_idle(model, self.graph)):
            return {"kept": kept}
        return {"kept": kept, "traced": [said_input(x) for x in self.inputs]}

    def _must_trace(self, model: nn.Module, kept: Kept, removed: Sequence[int] | np.ndarray) -> bool:
        found = self.rewrites(removed)
        return (
            any(not new.audible for new in found.values())
            or trial.of_model(model, kept, self.shapes(removed), self.inputs) is not None
            or trial.differs(model, self.graph, kept, found, self.inputs) is not None
        )

    def rewrites(self, removed: Sequence[int] | np.ndarray) -> dict[str, Rewrite]:
        """The sizes in the graph that these classes change."""
        return rewrites(list(self.graph.graph.nodes), self.states, self.gone(removed))

    def shapes(self, removed: Sequence[int] | np.ndarray) -> dict[fx.Node, tuple[int, ...]]:
        """The shape of every tensor of the graph once these classes are gone."""
        gone = self.gone(removed)
        return {
            node: tuple(
                size if classes is None else size - int(gone[classes].sum())
                for size, classes in zip(node.meta["shape"], state, strict=True)
            )
            for node, state in self.states.items()
            if "shape" in node.meta
        }

    def shape(self, node: fx.Node, removed: Sequence[int] | np.ndarray) -> tuple[int, ...]:
        """The shape of a node's output once these classes are gone."""
        gone = self.gone(removed)
        return tuple(
            size if classes is None else size - int(gone[classes].sum())
            for size, classes in zip(node.meta["shape"], self.states[node], strict=True)
        )

    def removed(self, kept: Mapping[str, Mapping[str, Sequence[int]]]) -> np.ndarray:
        """The classes that a cut removes, the inverse of `kept`.

        Raises:
            SurgeryError: when the cut takes what cannot be cut, or not everything that must go together.
        """
        gone = np.zeros(self.count, dtype=bool)
        for (path, role), classes in self.slots.items():
            if role in kept.get(path, {}):
                goes = np.ones(len(classes), dtype=bool)
                goes[np.asarray(kept[path][role], dtype=np.int64)] = False
                gone[classes[goes]] = True
                if gone[0]:
                    why = self.frozen.get(path, "they are coupled to something that cannot be cut")
                    raise SurgeryError(f"layer '{path}', role '{role}', must keep some of the channels to cut: {why}")
        for path, roles in self.kept(np.flatnonzero(gone)).items():
            for role, indices in roles.items():
                if list(kept.get(path, {}).get(role, ())) != indices:
                    raise SurgeryError(
                        f"layer '{path}', role '{role}', must lose what is coupled to the channels cut; keep {indices}"
                    )
        return np.flatnonzero(gone)


def has_idle(model: nn.Module, graph: fx.GraphModule) -> bool:
    """Whether a model has parameters that its graph does not use, such as those of heads that only training uses. What
    they read would be cut and they would not, so the graph must take the model's place."""
    used = {id(parameter) for parameter in graph.parameters()}
    return any(id(parameter) not in used for parameter in model.parameters())


def coupling(model: nn.Module, example: Example) -> Coupling:
    """Reads what must be cut together, and tries it on a copy without data.

    Args:
        example: an input of the model, (N, ...), or a tuple of its inputs.
    Raises:
        TraceError: when the forward cannot be captured.
    """
    graph = trace(model, example)
    labels, states = _labels(graph, model)
    return _tried(labels, states, graph, model, tuple(x.to("meta") for x in inputs_of(example)))


def read(graph: fx.GraphModule, model: nn.Module) -> Coupling:
    """What must be cut together, by the graph alone: untried."""
    labels, states = _labels(graph, model)
    return _resolve(labels, graph, states)


# --- reading -----------------------------------------------------------------------------------------------------


def _labels(graph: fx.GraphModule, model: nn.Module) -> tuple[Labels, dict[fx.Node, Any]]:
    """Labels of all dimensions, with the splits decided."""
    tags = Labels(tagging=True)
    _follow(tags, graph, model)
    orders = _orders(tags)
    best, most = None, -1
    for _ in range(_ATTEMPTS):
        labels = Labels(orders=orders)
        states = _follow(labels, graph, model)
        root, held = labels.resolve()
        free = sum(int((held[root[vector]] < 0).sum()) for vector in labels.slots.values())
        if free > most:
            best, most = (labels, states), free
        stuck = [key for key, split in labels.splits.items() if (held[root[split.parents]] >= 0).all()]
        again = {key: orders[key][1:] for key in stuck if len(orders.get(key, ())) > 1}
        if not again:
            break
        orders = {**orders, **again}
    assert best is not None
    return best


def _follow(labels: Labels, graph: fx.GraphModule, model: nn.Module) -> dict[fx.Node, Any]:
    """Labels of every node's dimensions."""
    paths = {id(module): path for path, module in model.named_modules()}  # a module with two names is cut once
    states: dict[fx.Node, Any] = {}
    layers: dict[str, nn.Module] = {}
    for node in graph.graph.nodes:
        call = Call(labels, node, states)
        if node.op == "call_module":
            module = graph.get_submodule(str(node.target))
            path = paths.get(id(module), str(node.target))
            layers[path] = module
            states[node] = layer(call, module, path)
        else:
            states[node] = _step(call)
    _tie(labels, layers, {str(node.target): node for node in graph.graph.nodes if node.op == "get_attr"}, graph)
    return states


def _step(call: Call) -> Any:
    """Labels after one node that is no layer."""
    node = call.node
    if node.op == "call_function":
        return operator(call)
    if node.op == "get_attr":
        return _tensor(call)
    if node.op == "output":
        for source in node.all_input_nodes:
            call.labels.freeze_state(call.states[source], "its channels are the model's output")
    return (None,) * len(node.meta.get("shape", ()))


def _tensor(call: Call) -> Any:
    """A parameter or buffer that the forward reads itself: every dimension of numbers can be cut."""
    target = str(call.node.target)
    if not call.node.meta["dtype"].is_floating_point:
        return (None,) * len(call.shape)
    why = call.because("meets channels that cannot be cut")
    return tuple(
        call.labels.slot(target, f"dim{d}", call.labels.fresh(size), size, why) if size > 1 else None
        for d, size in enumerate(call.shape)
    )


def _orders(tags: Labels) -> dict[tuple[str, int], tuple[int, ...]]:
    """Split -> its dimensions, the one that should shrink first: heads of attention, what is likely, the others."""
    root, _ = tags.resolve()
    heads = np.zeros(tags.count, dtype=bool)
    for labels in tags.heads:
        heads[root[labels]] = True
    heads[0] = False
    orders = {}
    for key, split in reversed(tags.splits.items()):  # a part may be split again
        found = [i for i, labels in enumerate(split.axes) if heads[root[labels]].any()]
        if found:
            heads[root[split.parents]] = True
            heads[0] = False
        others = sorted(range(len(split.axes)), key=lambda i, split=split: (i != split.likely, -i))  # type: ignore[misc]
        orders[key] = tuple(dict.fromkeys([*found, *others]))
    return orders


def _tie(
    labels: Labels, layers: Mapping[str, nn.Module], tensors: Mapping[str, fx.Node], graph: fx.GraphModule
) -> None:
    """A parameter with several users is cut for all of them at once, or for none."""
    users: dict[int, dict[str, dict[int, tuple[str, str]]]] = {}
    names: dict[int, str] = {}
    for path, module in layers.items():
        found = {role: axis for role, axis in axes(module).items() if (path, role) in labels.slots}
        for name, parameter in module.named_parameters():
            dims = {
                axis.tensors[name]: (path, role)
                for role, axis in found.items()
                if name in axis.tensors and not axis.shared and axis.repeat == 1
            }
            names.setdefault(id(parameter), name)
            users.setdefault(id(parameter), {})[path] = dims
    for target in tensors:
        tensor = fx.graph_module._get_attr(graph, target)
        dims = {int(role[3:]): (path, role) for path, role in labels.slots if path == target}
        users.setdefault(id(tensor), {})[target] = dims
    for identity, found_users in users.items():
        (first, dims), *others = found_users.items()
        for path, other in others:
            agree = (path in layers) == (first in layers) and dims.keys() == other.keys()
            if agree and all(len(labels.slots[dims[d]]) == len(labels.slots[other[d]]) for d in dims):
                for d in dims:
                    why = f"{path} shares its parameter with {first}, where it cannot be cut"
                    labels.unite(labels.slots[dims[d]], labels.slots[other[d]], why)
                continue
            name = names.get(identity, path)
            mixed = (path in layers) != (first in layers)
            why = f"its {name} is also used outside of the layer" if mixed else f"it shares its {name} with {first}"
            for (owner, _), vector in labels.slots.items():
                if owner in (path, first):
                    labels.freeze(vector, f"{path if path in layers else first}: {why}")


# --- concluding --------------------------------------------------------------------------------------------------


def _resolve(labels: Labels, graph: fx.GraphModule, states: dict[fx.Node, Any]) -> Coupling:
    """Labels -> classes, frozen ones as 0, and the bundles they form."""
    root, held = labels.resolve()
    final = np.where(held[root] >= 0, 0, root)
    frozen: dict[str, str] = {}
    for (path, role), vector in labels.slots.items():
        if role == "in" or role.startswith("dim"):
            continue
        reasons = held[root[vector]]
        if (reasons >= 0).any():
            frozen[path] = labels.freezes[int(reasons[reasons >= 0][0])][1]
    slots = {key: final[vector] for key, vector in labels.slots.items()}
    added = np.zeros(labels.count, dtype=bool)
    for vector in labels.added:
        added[final[vector]] = True

    def classes(state: Any) -> Any:
        if isinstance(state, list):
            return [classes(part) for part in state]
        return tuple(None if vector is None else final[vector] for vector in state)

    resolved = {node: classes(state) for node, state in states.items()}
    return Coupling(slots, _bundles(slots, labels.count, added), frozen, graph, resolved, labels.count)


def _bundles(slots: dict[tuple[str, str], np.ndarray], count: int, added: np.ndarray) -> tuple[Bundle, ...]:
    """Groups classes by the set of slots they live in. A set is known by the sum of its slots' random numbers."""
    keys = np.random.default_rng(0).integers(1, 2**63, len(slots), dtype=np.uint64)
    marks = np.zeros(count, dtype=np.uint64)
    present = {slot: np.unique(vector) for slot, vector in slots.items()}
    for key, classes in zip(keys, present.values(), strict=True):
        marks[classes] += key  # wraps around, which is as good
    marks[0] = 0
    found, number = np.unique(marks, return_inverse=True)
    members: dict[int, list[tuple[str, str]]] = {}
    for slot, classes in present.items():
        for own in np.unique(number[classes[classes > 0]]).tolist():
            members.setdefault(own, []).append(slot)
    order = np.argsort(number, kind="stable")
    runs = np.split(order, np.flatnonzero(np.diff(number[order])) + 1)
    result = []
    for own, ids in zip(found, runs, strict=True):
        slots_here = members.get(int(number[ids[0]]), [])
        layers = tuple(slot for slot in slots_here if not slot[1].startswith("dim"))
        makes = any(role != "in" for _, role in slots_here)
        if own > 0 and layers and makes:
            tensors = tuple(slot for slot in slots_here if slot[1].startswith("dim"))
            result.append(Bundle(ids, layers, bool(added[ids].any()), tensors))
    return tuple(sorted(result, key=lambda bundle: int(bundle.classes[0])))


# --- trying ------------------------------------------------------------------------------------------------------


def _tried(
    labels: Labels, states: dict[fx.Node, Any], graph: fx.GraphModule, model: nn.Module, inputs: tuple[Tensor, ...]
) -> Coupling:
    """What is left after trying a cut of every bundle: the model as it is, else its graph with new sizes."""
    # A graph that fixes the batch may only replace a forward that does so too.
    free = has_open_batch(graph) or not trial.takes_any_batch(model, inputs)
    known = replace(_resolve(labels, graph, states), inputs=inputs)
    while True:
        removed = np.concatenate([np.zeros(0, np.int64), *[bundle.classes[1::2] for bundle in known.bundles]])
        kept, shapes, found = known.kept(removed), known.shapes(removed), known.rewrites(removed)
        if len(removed) == 0:
            return known
        quiet = [name for name, new in found.items() if not new.audible]
        if (
            not quiet
            and trial.of_model(model, kept, shapes, inputs) is None
            and trial.differs(model, graph, kept, found, inputs) is None
        ):
            return known
        if not free:
            why = "has a fixed size, and the graph would fix the batch"
            culprits = {node: why for node in states if node.name in found or not found}
        elif (culprit := trial.of_graph(graph, kept, found, shapes, inputs)) is None:
            return replace(known, rigid=True)
        else:
            culprits = {culprit[0]: f"breaks when they are cut: {culprit[1]}"}
        before = len(labels.freezes)
        for node, why in culprits.items():
            for around in (node, *node.all_input_nodes):
                labels.freeze_state(states.get(around), Call(labels, node, states).because(why))
        assert len(labels.freezes) > before, "a trial can only fail where something was cut"
        less = replace(_resolve(labels, graph, states), inputs=inputs)
        if sum(len(bundle.classes) for bundle in less.bundles) == sum(len(bundle.classes) for bundle in known.bundles):
            # What was to blame stood still already, so that the fault lies elsewhere: then nothing is cut.
            labels.freezes += [(bundle.classes, next(iter(culprits.values()))) for bundle in known.bundles]
            less = replace(_resolve(labels, graph, states), inputs=inputs)
        known = less
