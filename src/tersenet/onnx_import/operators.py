"""All families of operators that the importer knows; importing them fills the table."""

from __future__ import annotations

from tersenet.onnx_import import (
    activations,
    arithmetic,
    convolutions,
    indexing,
    layouts,
    normalization,
    pools,
    products,
    reductions,
    resizing,
    shapes,
)

FAMILIES = (
    activations, arithmetic, convolutions, indexing, layouts, normalization, pools, products, reductions, resizing,
    shapes,
)  # fmt: skip
