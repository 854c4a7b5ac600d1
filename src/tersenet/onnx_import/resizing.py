"""Maps of another size: what torch interpolates in the same way; anything else is refused."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from torch import Tensor
from torch.nn import functional as F

from tersenet.onnx_import.call import Call
from tersenet.onnx_import.registry import operator
from tersenet.onnx_import.values import Host

_LINEAR = {1: "linear", 2: "bilinear", 3: "trilinear"}


@operator("Upsample")
def upsample(call: Call) -> Tensor:
    x, mode = call.tensor(0), call.attribute("mode", "nearest")
    scales = [float(each) for each in (call.attribute("scales") or call.host(1, "scales"))]
    return _resized(call, x, mode, list(range(x.dim())), scales, None, "asymmetric", "floor")


@operator("Resize")
def resize(call: Call) -> Tensor:
    x, mode = call.tensor(0), call.one_of("mode", ("nearest", "linear", "cubic"), "nearest")
    place = call.attribute("coordinate_transformation_mode", "half_pixel" if call.version > 10 else "asymmetric")
    nearest = call.attribute("nearest_mode", "round_prefer_floor" if call.version > 10 else "floor")
    if call.version == 10:
        nearest = "floor"
    for name, only in (("antialias", 0), ("exclude_outside", 0), ("extrapolation_value", 0.0)):
        if call.attribute(name, only) != only and place != "tf_crop_and_resize":
            call.refuse(f"has {name}={call.attribute(name)!r}, which torch does not compute in the same way")
    axes = [axis % x.dim() for axis in call.attribute("axes") or range(x.dim())]
    at_scales = 1 if call.version == 10 else 2
    policy = call.one_of("keep_aspect_ratio_policy", ("stretch", "not_larger", "not_smaller"), "stretch")
    has_scales = call.has(at_scales) and call.host(at_scales, "scales").size
    scales = [float(each) for each in call.host(at_scales, "scales").reshape(-1)] if has_scales else None
    sizes = call.ints(3, "sizes") if not has_scales else None
    if sizes is not None and policy != "stretch":
        ratios = [size / x.shape[axis] for size, axis in zip(sizes, axes, strict=True)]
        ratio = min(ratios) if policy == "not_larger" else max(ratios)
        scales, sizes = [ratio] * len(axes), [math.floor(x.shape[axis] * ratio + 0.5) for axis in axes]
    a = call.attribute("cubic_coeff_a", -0.75)
    if mode == "cubic" and a != -0.75:
        call.refuse(f"has cubic_coeff_a={a}; torch has -0.75")
    return _resized(call, x, mode, axes, scales, sizes, place, nearest)


def _resized(
    call: Call,
    x: Tensor,
    mode: str,
    axes: list[int],
    scales: list[float] | None,
    sizes: list[Any] | None,
    place: str,
    nearest: str,
) -> Tensor:
    """Resizes along the axes whose size changes; the others come first, as torch wants them."""
    changes = _changes(call, x, axes, scales, sizes)
    if not changes:
        return x
    if mode == "nearest":
        return _nearest(call, x, changes, place, nearest)
    if x.dim() in (4, 5) and set(changes) <= set(range(2, x.dim())):
        moved = list(range(2, x.dim()))
    else:
        moved = sorted(changes)
    others = [axis for axis in range(x.dim()) if axis not in moved]
    order = [*others, *moved]
    y = x.permute(order) if order != list(range(x.dim())) else x
    lead = [x.shape[axis] for axis in others]
    maps = [x.shape[axis] for axis in moved]
    if len(others) != 2:
        y = y.reshape([lead[0] if lead else 1, -1, *maps] if len(others) != 1 else [lead[0], 1, *maps])
    out = [changes[axis][0] if axis in changes else x.shape[axis] for axis in moved]
    y = _interpolated(call, y, mode, out, [changes.get(axis, (0, 1.0))[1] for axis in moved], place)
    y = y.reshape([*lead, *out]) if len(others) != 2 else y
    back = [order.index(axis) for axis in range(x.dim())]
    return y.permute(back) if back != list(range(x.dim())) else y


def _changes(
    call: Call, x: Tensor, axes: list[int], scales: list[float] | None, sizes: list[Any] | None
) -> dict[int, tuple[int, float | None]]:
    """axis -> (its new size, the scale that was given) where it changes."""
    changes: dict[int, tuple[int, float | None]] = {}
    recorded = call.recorded_shape(0)
    for i, axis in enumerate(axes):
        now, scale = x.shape[axis], None if scales is None else scales[i]
        size = sizes[i] if sizes is not None else now if scale == 1 else math.floor(int(now) * (scale or 1))
        batch = sizes is not None and axis == 0 and recorded is not None and size == recorded[0]
        if not batch and (size is not now) and (size != now or scale not in (None, 1.0)):
            changes[axis] = (int(size), scale)
    return changes


def _interpolated(call: Call, y: Tensor, mode: str, out: list[int], scales: list[float | None], place: str) -> Tensor:
    """Linear or cubic interpolation of (N, C, H, W, ...)."""
    k = len(out)
    if k > 3 or (mode == "cubic" and k != 2):
        call.refuse(f"resizes {k} dimensions by mode={mode!r}, which torch does not have")
    if place == "pytorch_half_pixel" and 1 not in out:
        place = "half_pixel"
    if place not in ("half_pixel", "align_corners"):
        call.refuse(
            f"has coordinate_transformation_mode={place!r} with mode={mode!r}; supported are 'half_pixel' and "
            "'align_corners'"
        )
    kind = "bicubic" if mode == "cubic" else _LINEAR[k]
    corners = place == "align_corners"
    sizes = y.shape[2:]
    exact = all(scale is None or math.isclose(scale * size, each, rel_tol=1e-6)
                for scale, size, each in zip(scales, sizes, out, strict=True))  # fmt: skip
    if exact:
        return F.interpolate(y, out, mode=kind, align_corners=corners)
    if corners:
        call.refuse("aligns corners and has scales that give no whole sizes, which torch does not have")
    factors = [each / size if scale is None else scale for scale, size, each in zip(scales, sizes, out, strict=True)]
    return F.interpolate(y, scale_factor=factors, mode=kind, align_corners=False, recompute_scale_factor=False)


def _nearest(call: Call, x: Tensor, changes: dict[int, tuple[int, float | None]], place: str, nearest: str) -> Tensor:
    """By F.interpolate where it takes the same entries, else by their places."""
    places = {axis: _places(call, int(x.shape[axis]), *each, place, nearest) for axis, each in changes.items()}
    if x.dim() in (3, 4, 5) and set(changes) <= set(range(2, x.dim())):
        out = [changes[axis][0] if axis in changes else x.shape[axis] for axis in range(2, x.dim())]
        for mode, shift in (("nearest", 0.0), ("nearest-exact", 0.5)):
            own = {axis: np.floor((np.arange(n) + shift) * np.float32(x.shape[axis] / n)).astype(int)
                   for axis, (n, _) in changes.items()}  # fmt: skip
            if all(np.array_equal(own[axis], places[axis]) for axis in changes):
                return F.interpolate(x, out, mode=mode)
    for axis, index in places.items():
        name = f"{call.step.outputs[0]}/places_{axis}"
        x = x.index_select(axis, call.network.constant(call.step, Host(index.astype(np.int64), name)))
    return x


def _places(call: Call, size: int, out: int, scale: float | None, place: str, nearest: str) -> np.ndarray:
    """(out,) which entry each output takes."""
    scale = out / size if scale is None else scale
    at = np.arange(out, dtype=np.float64)
    if place == "half_pixel" or (place == "pytorch_half_pixel" and out > 1):
        at = (at + 0.5) / scale - 0.5
    elif place == "half_pixel_symmetric":
        adjusted = out / (scale * size)
        at = size / 2 * (1 - adjusted) + (at + 0.5) / scale - 0.5
    elif place == "asymmetric":
        at = at / scale
    elif place == "align_corners":
        at = at * (size - 1) / (out - 1) if out > 1 else np.zeros(1)
    elif place == "pytorch_half_pixel":
        at = np.zeros(1)
    else:
        call.refuse(f"has coordinate_transformation_mode={place!r}, which is not supported")
    rounded = {
        "round_prefer_floor": np.ceil(at - 0.5),
        "round_prefer_ceil": np.floor(at + 0.5),
        "floor": np.floor(at),
        "ceil": np.ceil(at),
    }
    if nearest not in rounded:
        call.refuse(f"has nearest_mode={nearest!r}, which is not known")
    return np.clip(rounded[nearest], 0, size - 1).astype(int)


@operator("GridSample")
def grid_sample(call: Call) -> Tensor:
    modes = {
        "bilinear": "bilinear",
        "linear": "bilinear",
        "nearest": "nearest",
        "bicubic": "bicubic",
        "cubic": "bicubic",
    }
    mode = modes[call.one_of("mode", tuple(modes), "linear")]
    padding = call.one_of("padding_mode", ("zeros", "border", "reflection"), "zeros")
    return F.grid_sample(
        call.tensor(0), call.tensor(1), mode=mode, padding_mode=padding,
        align_corners=bool(call.attribute("align_corners", 0)),
    )  # fmt: skip
