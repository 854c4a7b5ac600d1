"""Labels on channels: which positions of which tensors and layers are one and the same channel.

Every dimension of every tensor in a graph either has a vector of labels, one per position, or none. Positions with
the same label stand or fall together; label 0 marks a position that stays. Operators say that two labels are the same
(`unite`) or that they must stay (`freeze`), and layers say which of their positions carry which labels (`slot`).
`resolve` then finds the classes: connected components, by hooking to the smaller neighbour and pointer jumping
(Shiloach & Vishkin, J. Algorithms 3, 1982), so that no Python loop runs over channels.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import fx

Vector = np.ndarray  # (size of the dimension,) labels
Shape = tuple[int, ...]
State = tuple[Vector | None, ...]  # one entry per dimension of a tensor


@dataclass(frozen=True)
class Split:
    """A dimension of channels that a reshape splits into several.

    Args:
        parents: the labels that were split.
        axes: labels of each new dimension; of a decided split, only those of the one that shrinks.
        likely: number of the new dimension that shrinks when nothing speaks for another.
    """

    parents: Vector
    axes: tuple[Vector, ...]
    likely: int


@dataclass
class Labels:
    """What is known about labels while a graph is being read.

    Args:
        tagging: give every dimension of a split labels of its own, to see where each of them goes.
        orders: (node, first new dimension) of a split -> its new dimensions, the one that should shrink first.
    """

    tagging: bool = False
    orders: dict[tuple[str, int], tuple[int, ...]] = field(default_factory=dict)
    count: int = 1  # label 0 is taken: it is what cannot be cut
    edges: list[tuple[Vector, Vector]] = field(default_factory=list)
    freezes: list[tuple[Vector, str]] = field(default_factory=list)
    slots: dict[tuple[str, str], Vector] = field(default_factory=dict)
    added: list[Vector] = field(default_factory=list)
    heads: list[Vector] = field(default_factory=list)
    splits: dict[tuple[str, int], Split] = field(default_factory=dict)

    def fresh(self, size: int) -> Vector:
        """Labels that nothing else has."""
        labels = np.arange(self.count, self.count + size)
        self.count += size
        return labels

    def unite(self, a: Vector, b: Vector, reason: str) -> None:
        """Position by position, two vectors hold the same channels; what meets a fixed position stays."""
        both = (a > 0) & (b > 0)
        self.edges.append((a[both], b[both]))
        if not both.all():
            self.freeze(np.concatenate([a[b == 0], b[a == 0]]), reason)

    def unite_rows(self, rows: np.ndarray, reason: str) -> None:
        """(R, size): every row holds the same channels."""
        if len(rows) > 1 and not (rows == rows[0]).all():
            self.unite(np.broadcast_to(rows[0], rows[1:].shape).ravel(), rows[1:].ravel(), reason)

    def freeze(self, labels: Vector | None, reason: str) -> None:
        """These channels stay. Of several reasons the first counts."""
        if labels is not None and (labels > 0).any():
            self.freezes.append((labels[labels > 0], reason))

    def freeze_state(self, state: Any, reason: str) -> None:
        for part in state if isinstance(state, list) else [state]:
            for labels in part or ():
                self.freeze(labels, reason)

    def slot(self, path: str, role: str, labels: Vector | None, size: int, reason: str) -> Vector:
        """A layer's positions carry these labels. A layer that is called twice gets both calls' labels united."""
        labels = np.zeros(size, dtype=np.int64) if labels is None else labels
        if (path, role) in self.slots:
            self.unite(self.slots[path, role], labels, reason)
        else:
            self.slots[path, role] = labels
        return labels

    def resolve(self) -> tuple[np.ndarray, np.ndarray]:
        """(class of every label, which of `freezes` holds every class, -1 for none).

        A class is named by its smallest label.
        """
        root = np.arange(self.count)
        if self.edges:
            a = np.concatenate([edge[0] for edge in self.edges])
            b = np.concatenate([edge[1] for edge in self.edges])
            while True:
                ra, rb = root[a], root[b]
                apart = ra != rb
                if not apart.any():
                    break
                a, b, ra, rb = a[apart], b[apart], ra[apart], rb[apart]
                np.minimum.at(root, np.maximum(ra, rb), np.minimum(ra, rb))
                while (root[root] != root).any():
                    root = root[root]
        held = np.full(self.count, -1)
        for i in range(len(self.freezes) - 1, -1, -1):  # backwards, so that the first reason is what stays
            held[root[self.freezes[i][0]]] = i
        return root, held


@dataclass
class Call:
    """One operator or layer at work: the node, its tensor inputs' labels, and its arguments."""

    labels: Labels
    node: fx.Node
    states: dict[fx.Node, Any]

    @property
    def name(self) -> str:
        """ "add" for aten.add_.Tensor."""
        packet = getattr(self.node.target, "overloadpacket", self.node.target)
        name = getattr(packet, "__name__", str(packet))
        return name if name.startswith("_") else name.rstrip("_")

    @property
    def shape(self) -> Shape:
        return self.node.meta["shape"]

    def arg(self, place: int, name: str, default: Any = None) -> Any:
        """An argument by place or by name."""
        if len(self.node.args) > place:
            return self.node.args[place]
        return self.node.kwargs.get(name, default)

    @property
    def source(self) -> Any:
        """The node of the first input."""
        return self.node.args[0]

    @property
    def input(self) -> State:
        """The labels of the first input."""
        return self.states[self.source]

    def because(self, why: str) -> str:
        """A reason with the operator and where it stands."""
        target = self.node.target
        name = (
            str(target)
            if not callable(target) or hasattr(target, "overloadpacket")
            else getattr(target, "__name__", "")
        )
        path = self.node.meta.get("path") or "the model's own forward"
        line = self.node.meta.get("line")
        return f"{name} in {path}{f' ({line})' if line and self.node.op == 'call_function' else ''} {why}"

    def freeze(self, why: str, *dims: Vector | None) -> None:
        for labels in dims:
            self.labels.freeze(labels, self.because(why))


def unknown(call: Call) -> None:
    """Freezes everything that reaches an operator nobody described."""
    for node in call.node.all_input_nodes:
        call.labels.freeze_state(call.states.get(node), call.because("is not known to the coupling"))


def nothing(call: Call) -> State:
    return (None,) * len(call.node.meta.get("shape", ()))
