"""The values of an imported network: tensors, and what is known on the host while the forward runs.

What is known are the constants of the file and the sizes of tensors. Sizes are integers, or symbols of torch.export
where the batch is left open; arrays that hold symbols have the data type `object`, and numpy computes with them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

# ONNX's numbers of data types, as torch has them.
DTYPES = {
    1: torch.float32, 2: torch.uint8, 3: torch.int8, 4: torch.uint16, 5: torch.int16, 6: torch.int32, 7: torch.int64,
    9: torch.bool, 10: torch.float16, 11: torch.float64, 12: torch.uint32, 13: torch.uint64, 16: torch.bfloat16,
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Host:
    """An array that is known while the forward runs.

    Args:
        array: of any shape; with the data type `object` where an entry is a symbol.
        name: of the value in the file.
        learned: whether it comes from the file's own floating point numbers, and so is a parameter of the model.
    """

    array: np.ndarray
    name: str = ""
    learned: bool = False

    @property
    def symbolic(self) -> bool:
        return self.array.dtype == object


Value = Tensor | Host | None


def objects(values: Iterable[Any]) -> np.ndarray:
    """(n,) an array of sizes, plain where all are plain."""
    values = list(values)
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return settled(array)


def settled(array: np.ndarray) -> np.ndarray:
    """The array with a plain data type where no entry is a symbol."""
    if array.dtype != object:
        return array
    if not array.size:
        return array.astype(np.int64)
    kinds = {bool if isinstance(entry, bool | np.bool_) else type(entry) for entry in array.flat}
    for plain, dtype in ((bool, np.bool_), (int, np.int64), (float, np.float32)):
        if kinds <= {plain, *((np.int64, np.int32) if plain is int else ())}:
            return array.astype(dtype)
    return array


def as_tensor(array: np.ndarray) -> Tensor:
    """The numbers as a tensor of their own; symbols become a tensor of int64 or float32."""
    if array.dtype == object:
        return torch.stack([torch.as_tensor(entry) for entry in array.flat]).reshape(array.shape)
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.astype(np.float32)).bfloat16()
    return torch.from_numpy(np.array(array))  # a copy: the file's own memory cannot be written


def scalar(array: np.ndarray) -> Any:
    """The only entry, as Python's own number or as a symbol."""
    entry = array.reshape(-1)[0]
    return entry.item() if isinstance(entry, np.generic) else entry
