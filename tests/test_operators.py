"""The operator table: nothing that torch lists is missing or wrong, the page is the log, and a sample is run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import operator_checks  # noqa: E402
import operator_list  # noqa: E402
import operators_page  # noqa: E402
from operators import CHECKS, RESULTS, is_wrong, missing  # noqa: E402

# Each of another kind: a layer with weights, one that is followed as operators, an activation, a pool with indices,
# a norm, attention; an alias, an in-place form, a write into a slice, a reduction, a product, a composite.
SAMPLE = (
    'nn.Conv2d(8, 6, 3, padding=1, padding_mode="reflect") @image', "nn.GLU(1) @image", "nn.Softshrink(0.3) @image",
    "nn.MaxUnpool1d(2 => f(*F.max_pool1d(x, 2, return_indices=True))) @sequence", "nn.GroupNorm(4, 8) @image",
    "torch.multiply(y) @image", "Tensor.atan_() @image",
    "Tensor.__setitem__(=(x, f(x, (Ellipsis, 0), y[..., 0]))[0]) @image",
    "torch.amax(1) @image", "torch.cosine_similarity(y, dim=1) @image", "torch.hstack(=f([x, y])) @image",
    "F.pixel_unshuffle(2) @image",
)  # fmt: skip
FILES = (SAMPLE[1], SAMPLE[4])  # of these the files, too, which take some seconds each


@pytest.fixture(scope="module")
def log() -> dict[str, Any]:
    return json.loads(RESULTS.read_text())


@pytest.fixture(scope="module")
def table() -> tuple[dict[str, str], list[operator_list.Setting]]:
    return operator_list.table()


def test_the_page_is_the_log(log: dict[str, Any]) -> None:
    assert (ROOT / "docs" / "operators.md").read_text() == operators_page.page(log)


def test_the_log_holds_all_that_torch_lists(log: dict[str, Any], table: Any) -> None:
    if torch.__version__.partition("+")[0] != log["torch"].partition("+")[0]:
        pytest.skip(f"the log is of torch {log['torch']}")
    left_out, settings = table
    assert {one.key for one in settings} == set(log["rows"])
    assert left_out == log["left_out"]
    names = {one.name for one in settings}
    assert names | set(left_out) == set(operator_list.names())


def test_nothing_is_wrong(log: dict[str, Any]) -> None:
    assert [key for key, row in log["rows"].items() if is_wrong(row)] == []


def test_every_row_is_run(log: dict[str, Any]) -> None:
    assert [key for key, row in log["rows"].items() if missing(row)] == []


def test_what_is_wrong_or_not_run_is_seen(log: dict[str, Any]) -> None:
    row = dict.fromkeys(CHECKS, "ok")
    assert not is_wrong(row)
    assert missing({**row, "int8": "ok"}) == []
    assert is_wrong({**row, "int8": {"onnxruntime": "ok", "openvino": "WRONG: off by 0.2"}})
    assert is_wrong({"left_out": "TypeError: f() takes no arguments"})
    assert missing({"captured": "ok"}) == list(CHECKS[1:])


@pytest.mark.parametrize("key", SAMPLE)
def test_a_sample_of_the_rows_is_what_the_log_says(key: str, log: dict[str, Any], table: Any) -> None:
    setting = next(one for one in table[1] if one.key == key)
    checks = list(CHECKS) if key in FILES else ["captured", "cut", "terse"]
    found: dict[str, Any] = {}
    operator_checks.row(setting, checks, {}, found.__setitem__)
    assert {check: found[check] for check in checks} == {check: log["rows"][key].get(check) for check in checks}
