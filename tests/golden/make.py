"""Writes the golden files anew. Run it when the version of the format is raised or the writer chooses otherwise, and
keep what sample.terse was under another name: it must be readable for ever.

sample.terse is what the writer chooses by itself; the files form-*.terse hold a tensor that was coded in one form
alone; version-2.terse is what version 2 wrote, before-books.terse what version 3 wrote while whole numbers with gaps
between them had no codebook. The .json files hold the manifest and the SHA-256 of each tensor.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from torch import Tensor

from tersenet.codec import container, numbers

HERE = Path(__file__).parent
MANIFEST = {"name": "golden sample", "numbers": [1, 2.5, None, True], "text": "größe"}


def sample() -> dict[str, Tensor]:
    """Every dtype, and values of every kind that the codecs tell apart."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 4, 3, 3, generator=generator)
    tensors = {}
    for name, dtype in container.DTYPES.items():
        scaled = weight * 0.1 if dtype.is_floating_point else weight * 30 + (100 if name == "uint8" else 0)
        tensors[f"tensor.{name}"] = weight.reshape(-1) > 1 if name == "bool" else scaled.to(dtype)
    tensors["again"] = tensors["tensor.float32"].clone()
    bits = torch.tensor([0, -(2**31), 0x7F800000, 0x7FC00001, 1, -1], dtype=torch.int32)
    tensors["special"] = bits.view(torch.float32)
    tensors["scalar"] = torch.tensor(7)
    tensors["empty"] = torch.zeros(0, 3)
    tensors["constant"] = torch.ones(50)
    tensors["long"] = (torch.randn(3000, generator=generator) * 20).to(torch.int8)
    tensors["two"] = (torch.rand(500, generator=generator) > 0.9).to(torch.int8) * 127
    conv = torch.randn(16, 8, 3, 3, generator=generator) * torch.rand(16, 1, 1, 1, generator=generator)
    tensors["grid"] = (conv * 5).round() * 0.03 + 0.0
    tensors["grid.rows"] = (conv * 5).round() * (0.01 + torch.rand(16, 1, 1, 1, generator=generator)) + 0.0
    tensors["book"] = torch.tensor([-0.31, -0.12, 0.0, 0.11, 0.3])[(conv * 2).round().clamp(-2, 2).long() + 2]
    tensors["half.book"] = tensors["book"].half()
    tensors["ternary"] = torch.sign(conv) * (conv.abs() > 0.4) * 0.07 + 0.0
    tensors["binary"] = torch.where(torch.randn(30, 50, generator=generator) > 0, 0.05, -0.05)
    tensors["masked"] = torch.randn(40, 21, generator=generator) * (torch.rand(40, 21, generator=generator) > 0.8) + 0.0
    return tensors


def grids(generator: torch.Generator) -> Tensor:
    """Whole numbers, three quarters of them 0."""
    numbers_f = torch.randn(12, 5, 3, 3, generator=generator) * 3
    return (numbers_f * (torch.rand(numbers_f.shape, generator=generator) > 0.75)).to(torch.int8)


def raw(value: Tensor) -> bytes:
    return value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b""


def write(name: str, data: bytes) -> None:
    (HERE / f"{name}.terse").write_bytes(data)
    manifest, tensors = container.read(HERE / f"{name}.terse")
    found = {
        key: [str(value.dtype).removeprefix("torch."), list(value.shape), hashlib.sha256(raw(value)).hexdigest()]
        for key, value in tensors.items()
    }
    lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in found.items())
    text = f'{{"manifest": {json.dumps(manifest, ensure_ascii=False)},\n "tensors": {{\n{lines}}}}}\n'
    (HERE / f"{name}.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write("sample", container.pack(MANIFEST, sample()))
    for form in numbers.FORMS:
        if form != "constant":
            write(f"form-{form}", container.pack({}, {form: grids(torch.Generator().manual_seed(1))}, forms=(form,)))
