"""Made inputs, where there is a file and no data: of the shapes and types that the file itself says it takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import numpy as np

from tersenet.deploy.runner import Array, Input
from tersenet.errors import SettingsError

if TYPE_CHECKING:
    from torch import Tensor, fx


def made_inputs(
    name: str,
    expected: Sequence[Input],
    batch: int,
    limits: Mapping[str, int] | None = None,
    size: tuple[int, int] | None = None,
) -> tuple[Array, ...]:
    """Normal noise for floats, either value for booleans; the same at each call.

    Args:
        name: of the file, for what is said.
        expected: all its inputs by order.
        batch: N of each.
        limits: input -> integers are drawn below this. Integers are mostly places in a table whose size no signature
            tells, so they are not guessed.
        size: (height, width) of images (N, C, H, W) whose size is open.
    Returns:
        arrays (N, ...) of the inputs' own types.
    Raises:
        SettingsError: on an input of open sizes, or of integers without a limit.
    """
    generator = np.random.default_rng(0)
    return tuple(_made(name, of_size(each, size), batch, generator, (limits or {}).get(each.name)) for each in expected)


def of_size(each: Input, size: tuple[int, int] | None) -> Input:
    """An input with its open height and width closed; any other, and one of another fixed size, as it is."""
    if size is None or len(each.shape) != 4:
        return each
    sides = tuple(own if own is not None else side for own, side in zip(each.shape[2:], size, strict=True))
    return replace(each, shape=(*each.shape[:2], *sides))


def _made(name: str, each: Input, batch: int, generator: np.random.Generator, limit: int | None) -> Array:
    sizes = [size for size in each.shape[1:] if size is not None]
    if len(sizes) < len(each.shape[1:]):
        raise SettingsError(
            f"{name} takes inputs of any size ({each.name} is {each.said}); give the size of images with --image-size, "
            "or measure it in Python with inputs of yours, measure_files(..., x=)"
        )
    dtype = np.dtype(np.float32 if each.dtype is None else each.dtype)
    if dtype.kind in "iu" and limit is None:
        raise SettingsError(
            f"{name} takes {dtype} as {each.name}, and a file does not say which integers are allowed; measure it in "
            "Python with inputs of yours, measure_files(..., x=)"
        )
    if dtype.kind in "iub":
        return generator.integers(0, 2 if limit is None else limit, (batch, *sizes)).astype(dtype)
    return generator.standard_normal((batch, *sizes), dtype=np.float32).astype(dtype, copy=False)


def made_example(model: Any, name: str) -> Tensor | tuple[Tensor, ...]:
    """Two samples for a model that was read from a file, as it is called: one input alone, several as a tuple.

    Integers are places in the smallest table that is looked up with them. Where none is, they are all 0: the first
    place of any table.

    Args:
        model: of `load_terse` or `read_pt2`, which have `inputs`.
    """
    import torch

    places = [node for node in model.graph.nodes if node.op == "placeholder"]
    limits = {each.name: _table_rows(model, node) for each, node in zip(model.inputs, places, strict=True)}
    made = tuple(map(torch.from_numpy, made_inputs(name, model.inputs, 2, limits)))
    return made if len(made) > 1 else made[0]


def _table_rows(graph: fx.GraphModule, places: fx.Node) -> int:
    """Rows of the smallest embedding that is looked up with an input; 1 where none is."""
    return min((rows for user in places.users if (rows := _rows_of(graph, user, places)) is not None), default=1)


def _rows_of(graph: fx.GraphModule, user: fx.Node, places: fx.Node) -> int | None:
    if user.op == "call_module":
        rows = getattr(graph.get_submodule(str(user.target)), "num_embeddings", None)
        return rows if isinstance(rows, int) else None
    table = user.args[0] if user.args else None
    if "embedding" in str(user.target) and places in user.args[1:2] and getattr(table, "op", "") == "get_attr":
        return int(attrgetter(str(table.target))(graph).shape[0])  # type: ignore[union-attr]
    return None
