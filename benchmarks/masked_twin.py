"""What a cut network must compute: the uncut one with zeros in place of the removed channels."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from tersenet.graph.coupling import Coupling


def leaves(outputs: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]


def difference(found: Tensor, expected: Tensor) -> float:
    """Largest difference, as a share of the largest expected value."""
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-12))


def half(known: Coupling) -> np.ndarray:
    """Half of the channels of every bundle, by chance, never all."""
    rng = np.random.default_rng(0)
    chosen = [rng.permutation(bundle.classes)[: len(bundle.classes) // 2] for bundle in known.bundles]
    return np.concatenate(chosen) if chosen else np.zeros(0, dtype=np.int64)


_REDUCTIONS = ("mean", "var", "std", "var_mean", "std_mean", "amax", "amin", "aminmax")
_NORMS = ("layer_norm", "rms_norm", "group_norm", "batch_norm", "instance_norm")


class Zeroed(fx.Interpreter):
    """Runs the uncut graph with zeros where channels were removed; what is normalised over channels sees the others."""

    def __init__(self, known: Coupling, removed: np.ndarray) -> None:
        super().__init__(known.graph)
        self.states, self.removed = known.states, removed

    def run_node(self, node: fx.Node) -> Any:
        result = super().run_node(node)
        if isinstance(result, tuple) and self.normalises(node):
            fewer = self.again(node, None)
            over_channels = [part.shape for part in fewer] == [part.shape for part in result]
            return fewer if over_channels else result
        if node.op not in ("call_function", "call_module") or not isinstance(result, Tensor):
            return result
        masks = self.masks(node)
        if self.normalises(node):
            result = self.again(node, result.shape)
        for dim, mask in enumerate(masks):
            if mask is not None:
                shown = mask.view([-1 if d == dim else 1 for d in range(result.dim())])
                result = torch.where(shown, result, torch.zeros((), dtype=result.dtype))
        return result

    def masks(self, node: fx.Node) -> list[Tensor | None]:
        state = self.states[node]
        return [
            None if labels is None else torch.from_numpy(~np.isin(labels, self.removed))
            for labels in (state if isinstance(state, tuple) else ())
        ]

    def normalises(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            module = self.module.get_submodule(str(node.target))
            return hasattr(module, "normalized_shape") or hasattr(module, "num_groups")
        return str(node.target).split(".")[1:2] in ([name] for name in (*_REDUCTIONS, *_NORMS))

    def again(self, node: fx.Node, shape: torch.Size | None) -> Any:
        """The same over the channels that are left, put back in their places; several results are as they come."""
        small = {source: self.fewer(self.env[source], source) for source in node.all_input_nodes}
        if node.op == "call_module":
            module = copy.deepcopy(self.module.get_submodule(str(node.target)))
            self.shrink(module, node.all_input_nodes[0])
            result = module(*small.values())
        else:
            args: list[Any] = list(fx.map_arg(node.args, lambda n: small.get(n, self.env[n])))
            if str(node.target).split(".")[1] in ("layer_norm", "rms_norm"):
                args[1] = list(args[0].shape[-len(args[1]) :])
            kwargs: Any = fx.map_arg(node.kwargs, lambda n: small.get(n, self.env[n]))
            result = node.target(*args, **kwargs)  # type: ignore[operator]
        for dim, mask in enumerate(self.masks(node)):
            if shape is not None and mask is not None and result.shape[dim] < shape[dim]:
                wide = result.new_zeros([*result.shape[:dim], shape[dim], *result.shape[dim + 1 :]])
                result = wide.index_copy(dim, mask.nonzero().flatten(), result)
        return result

    def fewer(self, value: Any, node: fx.Node) -> Any:
        """A tensor without its removed channels."""
        for dim, mask in enumerate(self.masks(node)):
            if mask is not None:
                value = value.index_select(dim, mask.nonzero().flatten())
        return value

    def shrink(self, module: Any, source: fx.Node) -> None:
        """A norm layer for the channels that are left of its input."""
        mask = self.masks(source)[1 if hasattr(module, "num_groups") else -1]
        if mask is None or bool(mask.all()):
            return
        index = mask.nonzero().flatten()
        for name in ("weight", "bias"):
            if getattr(module, name, None) is not None:
                setattr(module, name, nn.Parameter(getattr(module, name)[index]))
        if hasattr(module, "num_groups"):
            module.num_groups = len(index) if module.num_groups == module.num_channels else module.num_groups
            module.num_channels = len(index)
        else:
            module.normalized_shape = (len(index),)
