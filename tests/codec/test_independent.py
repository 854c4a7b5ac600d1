"""examples/read_terse.py, which shares no code with tersenet, reads the golden files to the same bits."""

from __future__ import annotations

import hashlib
import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tersenet.codec import container, contexts, numbers, predicted

ROOT = Path(__file__).parents[2]
DECODER = ROOT / "examples" / "read_terse.py"
READ = runpy.run_path(str(DECODER))


def numpy_bits(array: np.ndarray, dtype: str) -> bytes:
    if dtype == "bfloat16":
        return (array.view("<u4") >> 16).astype("<u2").tobytes()
    return array.tobytes()


@pytest.mark.parametrize("path", sorted((ROOT / "tests" / "golden").glob("*.terse")), ids=lambda path: path.stem)
def test_the_golden_files_read_the_same(path: Path) -> None:
    expected = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    manifest, arrays = READ["read"](path)
    assert manifest == expected["manifest"]
    assert list(arrays) == list(expected["tensors"])
    for name, (dtype, shape, digest) in expected["tensors"].items():
        assert list(arrays[name].shape) == shape
        assert hashlib.sha256(numpy_bits(arrays[name], dtype)).hexdigest() == digest, name


@pytest.mark.parametrize("shape", [(9,), (1, 2), (20, 30), (5, 3, 7, 7), (3, 2, 2, 2), (70, 11, 3, 3), (40, 1, 5, 5)])
@pytest.mark.parametrize("low", [-40, 0, 3], ids=["signed", "positive", "above"])
def test_contexts_of_every_layout_read_the_same(shape: tuple[int, ...], low: int) -> None:
    chance = np.random.default_rng(0)
    scales = chance.gamma(1, 4, (shape[0], *[1] * (len(shape) - 1)))
    q = np.clip(np.rint(chance.laplace(0, 1, shape) * scales), low, 200).astype(np.int32).reshape(-1)
    q[0], q[-1] = low, 200
    stream = contexts.encode(q, shape, (1,))
    assert np.array_equal(contexts.decode([stream], shape)[0], q)
    assert np.array_equal(READ["contexts"](stream, list(shape)), q)


@pytest.mark.parametrize("strength", [0, 2])
@pytest.mark.parametrize(
    ("shape", "scale", "distance"),
    [((20, 9, 3, 3), 2, 1), ((9, 3, 5, 5), 1, 2), ((5, 4, 7), 40, 1), ((40, 1, 2, 2), 0.3, 1), ((3, 3, 4, 6), 90, 2),
     ((2, 2, 2, 2, 3), 9, 0), ((30, 10, 3, 3), 0.05, 1), ((1, 1, 8, 8), 3, 1), ((64, 1, 1, 9), 3, 2),
     ((130, 130, 3, 3), 1, 1)],  # several blocks in the last phase
)  # fmt: skip
def test_predictions_of_every_layout_read_the_same(
    shape: tuple[int, ...], scale: float, distance: int, strength: int
) -> None:
    q = np.random.default_rng(0).laplace(0, scale, shape)
    q = np.rint(q + np.roll(q, 1, -1)).clip(-255, 255).astype(np.int32).reshape(-1)
    q[0] = 1
    stream = predicted.encode(q, shape, (strength,), distance)
    assert np.array_equal(predicted.decode([stream], shape)[0], q)
    assert np.array_equal(READ["predicted"](stream, list(shape)), q)


def test_many_long_blocks_read_the_same() -> None:
    """More numbers than the longest block has."""
    q = np.random.default_rng(0).integers(-1, 2, 200_000).astype(np.int32)
    for shape in ((200_000,), (2000, 100)):
        stream = numbers.encode(q, shape, ("contexts",))
        assert np.array_equal(READ["numbers"](stream, list(shape)), q)


def test_it_needs_numpy_alone(tmp_path: Path) -> None:
    path, out = tmp_path / "m.terse", tmp_path / "m.npz"
    weight = torch.randn(4, 5)
    container.write(path, {}, {"weight": weight})
    hide = "import sys; sys.modules.update(dict.fromkeys(['torch', 'constriction', 'tersenet']));"
    run = f"import runpy; sys.argv[1:] = {[str(path), str(out)]}; runpy.run_path({str(DECODER)!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", hide + run], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("weight float32 (4, 5)")
    with np.load(out) as arrays:
        assert np.array_equal(arrays["weight"], weight.numpy())


def test_it_refuses_damage(tmp_path: Path) -> None:
    data = bytearray((ROOT / "tests" / "golden" / "sample.terse").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "x.terse").write_bytes(data)
    with pytest.raises(ValueError, match="damaged"):
        READ["read"](tmp_path / "x.terse")


def test_it_is_short() -> None:
    lines: list[Any] = DECODER.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 300
