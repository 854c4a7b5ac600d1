"""Weights that stay coded until somebody looks at them, layer by layer.

A module keeps its tensors in two dictionaries. Here these decode the whole layer at the first touch of any of its
numbers (a forward, `state_dict`, `parameters`, `to`, a copy), then give way to plain ones, so that nothing of this
stays behind in a layer that was used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


class CodedTensors(dict[str, Any]):
    """The parameters or the buffers of a layer, on the meta device until `decode` has been called."""

    def __init__(self, held: dict[str, Any], decode: Callable[[], None]) -> None:
        super().__init__(held)
        self.decode = decode
        self.plain: dict[str, Any] = {}  # what takes its place in the layer; whoever still holds this one changes both

    def __getitem__(self, name: str) -> Any:
        self.decode()
        return super().__getitem__(name)

    def __setitem__(self, name: str, value: Any) -> None:
        self.decode()
        super().__setitem__(name, value)
        self.plain[name] = value

    def __delitem__(self, name: str) -> None:
        self.decode()
        super().__delitem__(name)
        del self.plain[name]

    def get(self, name: str, default: Any = None) -> Any:
        self.decode()
        return super().get(name, default)

    def pop(self, *arguments: Any) -> Any:
        self.decode()
        super().pop(*arguments)
        return self.plain.pop(*arguments)

    def update(self, *arguments: Any, **named: Any) -> None:
        self.decode()
        super().update(*arguments, **named)
        self.plain.update(*arguments, **named)

    def items(self) -> Any:
        self.decode()
        return super().items()

    def values(self) -> Any:
        self.decode()
        return super().values()

    def copy(self) -> dict[str, Any]:
        return dict(self.items())

    def __reduce__(self) -> Any:  # copies and pickles are plain
        return dict, (dict(self.items()),)


def keep_coded(module: nn.Module, tensor_of: Callable[[str], Tensor]) -> None:
    """Gives a module whose tensors are on the meta device its numbers, each layer's when it is first touched.

    Args:
        tensor_of: the numbers of a name in the state dict, as an independent tensor.
    """
    made: dict[int, Tensor] = {}  # one tensor under several names stays one
    for path, layer in list(module.named_modules()):
        if layer._parameters or layer._buffers:
            _keep_layer(layer, f"{path}." if path else "", tensor_of, made)


def _keep_layer(layer: nn.Module, prefix: str, tensor_of: Callable[[str], Tensor], made: dict[int, Tensor]) -> None:
    parameters, buffers = layer._parameters, layer._buffers

    def decode() -> None:
        if not isinstance(layer.__dict__["_parameters"], CodedTensors):
            return
        plain: list[dict[str, Any]] = [dict(parameters), dict(buffers)]
        for held in plain:
            for name, empty in held.items():
                if empty is not None and id(empty) not in made:
                    tensor = tensor_of(prefix + name)
                    is_parameter = isinstance(empty, nn.Parameter)
                    made[id(empty)] = nn.Parameter(tensor, empty.requires_grad) if is_parameter else tensor
                held[name] = None if empty is None else made[id(empty)]
        # Only now, for a damaged payload raises before.
        for coded, held in zip((layer.__dict__["_parameters"], layer.__dict__["_buffers"]), plain, strict=True):
            for name, value in held.items():
                dict.__setitem__(coded, name, value)
            coded.plain = held
        layer.__dict__["_parameters"], layer.__dict__["_buffers"] = plain

    layer.__dict__["_parameters"] = CodedTensors(parameters, decode)
    layer.__dict__["_buffers"] = CodedTensors(buffers, decode)
