"""ONNX's own tests of its operators, run through the importer.

Each is run twice: with its first input computed and the others constant, as weights are; and with all inputs computed.
One of both must give what ONNX says, and none may give anything else: the other may only be refused. Tests that are
out of reach stand in out_of_reach.json by reason. The list may only shrink: what passes must be taken off it.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tersenet.errors import ModelError
from tersenet.onnx_import.network import Network
from tersenet.onnx_import.registry import HANDLERS
from tersenet.onnx_import.values import as_tensor

onnx = pytest.importorskip("onnx")
LISTED = Path(__file__).with_name("out_of_reach.json")
TYPES = {
    "float16", "bfloat16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32",
    "uint64", "bool",
}  # fmt: skip
RELATIVE = {"float16": 1e-3, "bfloat16": 2e-2}


def array_of(value: Any) -> np.ndarray | None:
    """A test's number as an array; None for sequences, strings and types that torch does not have."""
    if isinstance(value, onnx.TensorProto):
        value = onnx.numpy_helper.to_array(value)
    if value is None or isinstance(value, list | dict):
        return None
    array = np.asarray(value)
    return array if array.dtype.name in TYPES else None


def check(case: Any, inputs: list[np.ndarray], outputs: list[np.ndarray], computed: int) -> None:
    """Runs a test with so many computed inputs; raises AssertionError on other outputs, ModelError on a refusal."""
    from onnx.inliner import inline_local_functions

    proto = onnx.ModelProto()
    proto.CopyFrom(case.model)
    for value, array in list(zip(proto.graph.input, inputs, strict=True))[computed:]:
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, value.name))
    network = Network(inline_local_functions(proto), case.name)
    with torch.no_grad():
        given = network(*map(as_tensor, inputs[:computed]))
    given = list(given.values()) if isinstance(given, dict) else [given]
    for own, wanted in zip(given, outputs, strict=True):
        name = wanted.dtype.name
        assert (tuple(own.shape), str(own.dtype)) == (wanted.shape, f"torch.{name}")
        floats = own.is_floating_point()
        np.testing.assert_allclose(
            own.double().numpy() if floats else own.numpy(),
            wanted.astype(np.float64) if floats else wanted,
            rtol=max(case.rtol, RELATIVE.get(name, 0)),
            atol=max(case.atol, 1e-6 if name not in RELATIVE else 1e-2 if name == "bfloat16" else 1e-3),
        )


def unknown(case: Any) -> set[str]:
    """Operators of a test that the importer does not take."""
    from onnx.inliner import inline_local_functions

    proto = inline_local_functions(case.model)
    return {
        node.op_type for node in proto.graph.node if node.domain or node.op_type not in {*HANDLERS, "Constant", "If"}
    }


@pytest.mark.minutes
def test_operators_compute_what_onnx_says() -> None:
    from onnx.backend.test.loader import load_model_tests

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy's own, on infinities, while onnx makes its tests
        cases = load_model_tests(kind="node")
    reasons = json.loads(LISTED.read_text(encoding="utf-8"))
    listed = {name for names in reasons.values() for name in names}
    passed, refused, wrong = set(), {}, {}
    for case in cases:
        inputs, outputs = ([array_of(value) for value in values] for values in case.data_sets[0])
        if unknown(case) or any(array is None for array in (*inputs, *outputs)):
            continue
        count = len(case.model.graph.input)
        for computed in sorted({min(1, count), count}):
            try:
                check(case, inputs, outputs, computed)  # type: ignore[arg-type]
                passed.add(case.name)
            except ModelError as error:
                refused[case.name] = str(error)
            except Exception as error:  # noqa: BLE001 - each is told with its test
                wrong[case.name] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    assert {name: said for name, said in wrong.items() if name not in listed} == {}
    assert {name: said for name, said in refused.items() if name not in passed | listed} == {}
    assert sorted((listed & passed) - wrong.keys()) == [], "these pass now: take them off the list"
    assert len(passed) > 900


@pytest.mark.minutes
def test_each_operator_of_the_table_has_a_test_that_passes() -> None:
    """Of onnx, or one of this folder's."""
    from onnx.backend.test.loader import load_model_tests

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cases = load_model_tests(kind="node")
    listed = {name for names in json.loads(LISTED.read_text(encoding="utf-8")).values() for name in names}
    tested = {
        node.op_type
        for case in cases
        if not unknown(case) and case.name not in listed
        for node in case.model.graph.node
    }
    refusing = {"Unique", "Compress", "NonZero", "NonMaxSuppression"}
    assert set(HANDLERS) - tested - refusing == {"GlobalLpPool"}
