"""Constants that follow from other constants, by ONNX's own reference implementation (numpy)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np


def compute(node: Any, version: int, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The outputs of one operator.

    Args:
        node: its NodeProto.
        version: of the operator set.
        arrays: its inputs, without those that are left out.
    """
    from onnx import helper
    from onnx.reference import ReferenceEvaluator

    names = [name for name in node.input if name]
    unique = dict(zip(names, arrays, strict=True))
    graph = helper.make_graph(
        [node],
        "constant",
        [helper.make_value_info(name, helper.make_tensor_type_proto(_type(array), array.shape))
         for name, array in unique.items()],
        [helper.make_empty_tensor_value_info(name) for name in node.output if name],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", version)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy's own, on infinities and the like
        outputs = ReferenceEvaluator(model).run(None, unique)
    return [np.asarray(each) for each in outputs]


def _type(array: np.ndarray) -> int:
    from onnx import helper

    return int(helper.np_dtype_to_tensor_dtype(array.dtype))
