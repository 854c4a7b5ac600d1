"""Paths of layers: as in the network that the file was exported from, where the file still says them.

torch's exporters keep the names of parameters ("layer1.0.conv1.weight") unless they change a number (a folded batch
norm, a transposed matrix); then the node's scope says the module ("/layer1/layer1.0/conv1/Conv"). Other frameworks'
names are paths with slashes.
"""

from __future__ import annotations

import itertools
import keyword
import re
from collections.abc import Collection, Sequence

from torch import fx

from tersenet.onnx_import.call import Step

_LEAVES = {
    "weight", "bias", "kernel", "gamma", "beta", "scale", "w", "b", "w_0", "b_0", "w_1", "w_2", "depthwise_kernel",
    "moving_mean", "moving_variance", "running_mean", "running_var", "ReadVariableOp", "weights", "in_proj_weight",
}  # fmt: skip
# What exporters and optimizers call a number that had no name.
_NAMELESS = re.compile(r"(onnx::|val_|_?[vV]?\d|const|Constant|node_|tmp|t_\d|p2o\.)", re.IGNORECASE)
_LONGEST = 100


class Names:
    """Gives out paths, each once; none lies inside of another."""

    def __init__(self) -> None:
        self.taken: set[str] = set()

    def of_layer(self, step: Step, constants: Sequence[str], shared: Collection[str]) -> str:
        """The path of a layer: from the name of its weight, else from the node's, else from its other constants.

        Args:
            constants: names, the weight's first.
            shared: those that several nodes read. Exporters keep one of equal numbers, such as the biases of a network
                that was not trained, under the first one's name.
        """
        own = [_parts(name) for name in constants if name not in shared and not _NAMELESS.match(name)]
        named = [parts for parts in own if len(parts) > 1 and parts[-1] in _LEAVES]
        if named and constants[0] not in shared and not _NAMELESS.match(constants[0]) and named[0] is own[0]:
            return self._free(named[0][:-1])
        scope = _scope(step)
        return self._free(scope or (named[0][:-1] if named else [_word(step.op.lower())]))

    def of_constant(self, step: Step, name: str) -> str:
        """The path of a parameter or buffer that stands alone."""
        if name and not _NAMELESS.match(name):
            return self._free(_parts(name))
        scope = _scope(step)
        return self._free([*scope, "constant"] if scope else ["constant"])

    def _free(self, parts: list[str]) -> str:
        parts = [each for each in parts if each] or ["layer"]
        parts[0] = f"{parts[0]}_" if hasattr(fx.GraphModule, parts[0]) or parts[0] == "training" else parts[0]
        if parts[0][0].isdigit():
            parts[0] = f"layer{parts[0]}"
        path = ".".join(parts)
        if len(path) > _LONGEST:
            path = parts[-1][-_LONGEST:]
        flat = path.replace(".", "_")
        for candidate in itertools.chain((path, flat), (f"{flat}_{i}" for i in itertools.count(1))):
            if self._is_free(candidate):
                self.taken.add(candidate)
                return candidate
        raise AssertionError("there are infinitely many names")

    def _is_free(self, path: str) -> bool:
        beside = any(path.startswith(f"{other}.") or other.startswith(f"{path}.") for other in self.taken)
        return path not in self.taken and not beside


def _parts(name: str) -> list[str]:
    name = name.split(";")[0].rsplit(":", 1)[0] if re.search(r":\d+$", name.split(";")[0]) else name.split(";")[0]
    return [word for each in re.split(r"[./]+", name) if (word := _word(each))]


def _word(text: str) -> str:
    word = re.sub(r"\W+", "_", text).strip("_") or ""
    return f"{word}_" if keyword.iskeyword(word) else word


def _scope(step: Step) -> list[str]:
    """The module that a node was written for, as the two exporters of torch say it, else the node's own name."""
    if step.scopes:
        return _parts(next((scope for scope in reversed(step.scopes[:-1]) if scope), ""))
    if step.name.startswith("/"):
        path: list[str] = []
        for each in step.name.strip("/").split("/")[:-1]:
            parts = _parts(each)
            if path and parts[: len(path)] == path[: len(parts)] and len(parts) > 1:
                path = parts
            elif len(parts) > 1 and path and path[-len(parts) + 1 :] == parts[:-1]:
                path = [*path, parts[-1]]
            else:
                path = [*path, *parts]
        return path
    parts = _parts(step.name)
    if not parts or _NAMELESS.match(step.name) or re.fullmatch(r"[A-Za-z]+_?\d*", step.name):
        return []
    return parts[:-1] if len(parts) > 1 else parts
