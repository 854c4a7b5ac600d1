"""Grids, codebooks and masks: found by themselves, and bit for bit what they were."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from tersenet.codec import tensors, values
from tersenet.codec.together import decoded


def coded(tensor: Tensor) -> tuple[str, bytes]:
    """The codec and the payload; decoded again and compared on the way."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    codec, payload = tensors.encode(dtype, tuple(tensor.shape), data)
    assert decoded(tensors.decode(dtype, tuple(tensor.shape), codec, payload)).tobytes() == data.tobytes()
    return codec, payload


def whole(shape: tuple[int, ...], largest: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-largest, largest + 1, shape, generator=generator).float()


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("step", [0.1, 1 / 3, 3e-39, 7.7e30])
def test_a_grid_of_any_bits_is_found(bits: int, step: float) -> None:
    codec, payload = coded(whole((40, 30), 2 ** (bits - 1) - 1) * step)
    assert codec == "grid"
    assert len(payload) < 1200 * bits / 8 + 64


def test_a_grid_without_its_smallest_multiple_is_found() -> None:
    q = whole((40, 30), 20)
    assert coded(torch.where(q.abs() == 1, 0, q) * 0.037)[0] == "grid"


def test_a_grid_per_row_is_found() -> None:
    steps = torch.rand(40, 1, generator=torch.Generator().manual_seed(1)) + 0.01
    weight = whole((40, 300), 7) * steps
    weight[3] = 0  # a pruned channel has no step
    codec, payload = coded(weight + 0.0)
    assert codec == "grid"
    assert len(payload) < 12000 * 4 / 8 + 4 * 40 + 64


def test_steps_of_rows_with_a_common_part_stay_apart() -> None:
    q = whole((32, 90), 3)
    steps = torch.tensor([8.0, 9.0, 10.0, 11.0, 12.0, 13.0, 14.0, 15.0]).repeat(4)[:, None] / 64
    apart, together = coded(q * steps + 0.0), coded(q * 0.125 + 0.0)
    assert apart[0] == together[0] == "grid"
    assert len(apart[1]) < len(together[1]) + 60  # 32 steps more


def test_rows_whose_numbers_are_never_one_apart_are_found() -> None:
    q = torch.tensor([0, 3, 5, 8, -5, -3]).repeat(2, 20).float()
    assert coded(q * torch.tensor([[0.037], [0.0411]]) + 0.0)[0] == "grid"


def test_a_large_grid_is_found() -> None:
    assert coded(whole((300, 400), 7) * 0.013)[0] == "grid"
    steps = torch.rand(300, 1, generator=torch.Generator().manual_seed(1)) + 0.01
    assert coded(whole((300, 400), 7) * steps + 0.0)[0] == "grid"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32])
def test_few_values_are_a_codebook(dtype: torch.dtype) -> None:
    book = torch.tensor([-913.7, -71.3, 0, 31.9, 207.1, 1013.3]).to(dtype)
    codec, payload = coded(book[torch.randint(0, 6, (50, 60), generator=torch.Generator().manual_seed(0))])
    assert codec == "codebook"
    assert len(payload) < 3000 * 2.6 / 8 + 8 * 6 + 32


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.uint8])
def test_weights_of_two_bits_kept_as_larger_whole_numbers_take_two_bits(dtype: torch.dtype) -> None:
    levels = torch.tensor([64, 128, 160, 192] if dtype is torch.uint8 else [-64, -32, 0, 32]).to(dtype)
    codec, payload = coded(levels[torch.randint(0, 4, (64, 32, 3, 3), generator=torch.Generator().manual_seed(0))])
    assert codec == "codebook"
    assert len(payload) < 1.02 * 64 * 32 * 9 * 2 / 8


def test_zeros_of_masked_weights_are_not_stored() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(100, 100, generator=generator) * (torch.rand(100, 100, generator=generator) > 0.9) + 0.0
    codec, payload = coded(weight)
    assert codec == "sparse"
    assert len(payload) < 1000 * 4 + 10_000 * 0.5 / 8


def test_ternary_and_binary_weights_take_their_entropy() -> None:
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (100, 100), generator=generator) * 2.0 - 1
    assert len(coded(signs * 0.3)[1]) < 1.06 * 10_000 / 8
    assert len(coded(torch.where(torch.rand(100, 100, generator=generator) > 0.5, 0, signs * 0.3))[1]) < 1.5 * 1250 + 64


def test_special_values_survive_in_a_codebook() -> None:
    bits = torch.tensor([0, -(2**31), 0x7F800000, 0x7FC00001, 1, -1], dtype=torch.int32)
    assert coded(bits[torch.randint(0, 6, (40, 50))].view(torch.float32))[0] == "codebook"


def test_noise_and_near_grids_are_no_grid() -> None:
    weight = whole((40, 30), 7) * 0.1
    weight[0, 0] = torch.nextafter(weight[0, 0] + 0.1, torch.tensor(9.0))
    assert values.encode_grid(weight.reshape(-1).numpy().view("<u4"), (40, 30))[0] is None
    assert coded(torch.randn(40, 30))[0] == "floats"


BROKEN = {
    "grid of nothing": ("float32", "grid", b""),
    "grid of kind 2": ("float32", "grid", bytes([2]) + bytes(12)),
    "steps beyond the end": ("float32", "grid", b"\1\xff\xff\xff\xff" + bytes(20)),
    "book of nothing": ("float32", "codebook", b""),
    "book cut off": ("float32", "codebook", b"\xff\0" + bytes(100)),
    "index beyond the book": ("float32", "codebook", b"\1\0" + bytes(8) + b"\1\2\0"),
    "index below the book": ("float32", "codebook", b"\1\0" + bytes(8) + b"\1\xff\xff"),
    "mask of nothing": ("float32", "sparse", b""),
    "mask beyond the end": ("float32", "sparse", b"\xff\0\0\0"),
    "mask of two": ("float32", "sparse", b"\3\0\0\0\1\2\0"),
    "number beyond int8": ("int8", "numbers", b"\1\xc8\0"),
    "number below uint8": ("uint8", "numbers", b"\1\xff\xff"),
    "number beyond all": ("int16", "numbers", b"\1\0\1"),
    "form 7": ("int8", "numbers", b"\7\0\0"),
}


@pytest.mark.parametrize(("dtype", "codec", "payload"), BROKEN.values(), ids=BROKEN.keys())
def test_a_malformed_payload_is_refused(dtype: str, codec: str, payload: bytes) -> None:
    with pytest.raises(ValueError, match=r"[a-z]"):
        decoded(tensors.decode(dtype, (2, 3), codec, payload))


def test_a_grid_of_any_step_raises_no_warning() -> None:
    payload = b"\0" + np.array([np.inf], "<f4").tobytes() + b"\1\0\0"
    assert len(decoded(tensors.decode("float32", (2, 3), "grid", payload))) == 24
