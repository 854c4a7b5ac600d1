"""Product quantization: weights in short pieces, and each piece one of k.

Gong et al., "Compressing deep convolutional networks using vector quantization", arXiv:1412.6115, section 3.3, after
Jegou, Douze and Schmid, PAMI 2011: the columns of a matrix are cut into segments, and the rows' pieces of each segment
are clustered on their own. k-means starts by k-means++ (Arthur and Vassilvitskii, SODA 2007). Departures: all segments
may share one codebook, as in Stock et al., arXiv:1907.05686; errors may be weighted by importance; a cluster that lost
all its pieces takes the piece that is worst off.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tersenet.errors import SettingsError

# Distances that are held at once, in numbers.
AT_ONCE = 2**24


def product_codebooks(
    weight: Tensor,
    length: int,
    count: int,
    seed: int,
    shared: bool = False,
    importance: Tensor | None = None,
    rounds: int = 50,
) -> tuple[Tensor, Tensor]:
    """Clusters pieces of rows by k-means, minimising sum of importance (w - piece)^2.

    Args:
        weight: (O, I), finite.
        length: d, of a piece; divides I.
        count: k, at most the number of pieces that share a codebook.
        seed: of k-means++. The same seed gives the same result on the same device.
        shared: one codebook for all segments, so that less has to be stored.
        importance: >= 0, of a shape that broadcasts to weight.
        rounds: of Lloyd's algorithm at most; each lowers the error.
    Returns:
        codebooks (S, k, d) in the weight's type, with S = I / d segments or 1, and codes (O, I / d) int64.
    Raises:
        SettingsError: for other lengths or counts.
    Cost: O(rounds k O I).
    """
    outputs, inputs = weight.shape
    if length < 1 or inputs % length:
        raise SettingsError(f"the length of a piece must divide the {inputs} inputs, got {length}")
    segments = inputs // length
    pieces = outputs * segments if shared else outputs
    if not 1 <= count <= pieces:
        raise SettingsError(f"the pieces of a codebook must number 1 to {pieces}, as many as share it, got {count}")
    points = _cut(weight.detach().double(), length, shared)
    heavy = torch.ones_like(points)
    if importance is not None:
        heavy = _cut(importance.detach().double().expand_as(weight), length, shared)
    source = torch.Generator().manual_seed(seed)
    books, codes = [], []
    for own, weights in zip(points, heavy, strict=True):
        book, code = _cluster(own, weights, count, source, rounds)
        books.append(book)
        codes.append(code)
    found = codes[0].view(outputs, segments) if shared else torch.stack(codes, dim=1)
    return torch.stack(books).to(weight.dtype), found


def from_pieces(codebooks: Tensor, codes: Tensor) -> Tensor:
    """(O, I): the weight again. Its gradient reaches the codebooks as the sum over all that use a piece.

    Args:
        codebooks: (S, k, d), S being 1 or the number of segments.
        codes: (O, I / d).
    """
    segment = torch.arange(codes.shape[1], device=codes.device) % len(codebooks)
    return codebooks[segment, codes.long()].flatten(1)  # (O, I / d, d) -> (O, I)


def _cut(matrix: Tensor, length: int, shared: bool) -> Tensor:
    """(O, I) -> (S, O, d), or with one codebook (1, O S, d)."""
    pieces = matrix.unflatten(1, (-1, length))  # (O, S, d)
    return pieces.reshape(1, -1, length) if shared else pieces.movedim(1, 0)


def _cluster(points: Tensor, heavy: Tensor, count: int, source: torch.Generator, rounds: int) -> tuple[Tensor, Tensor]:
    """k-means of (M, d) points: centres (k, d) and codes (M,)."""
    centres = _spread_out(points, heavy, count, source)
    codes, error = _nearest(points, heavy, centres)
    for _ in range(rounds):
        centres = _means(points, heavy, codes, centres, error)
        moved, error = _nearest(points, heavy, centres)
        if torch.equal(moved, codes):
            break
        codes = moved
    return centres, codes


def _spread_out(points: Tensor, heavy: Tensor, count: int, source: torch.Generator) -> Tensor:
    """k-means++: each next centre is a point, drawn by its error so far."""
    error = heavy.sum(dim=1)
    centres = points.new_zeros(count, points.shape[1])
    for k in range(count):
        running = error.cpu().cumsum(0)
        draw = torch.rand((), generator=source, dtype=torch.float64) * running[-1]
        # Where all errors are 0 there are fewer distinct points than centres, and any will do.
        place = min(int(torch.searchsorted(running, draw, right=True)), len(points) - 1)
        centres[k] = points[place]
        own = (heavy * (points - centres[k]).square()).sum(dim=1)
        error = own if k == 0 else torch.minimum(error, own)
    return centres


def _nearest(points: Tensor, heavy: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """Code (M,) and weighted squared error (M,) of each point."""
    codes = torch.empty(len(points), dtype=torch.long, device=points.device)
    error = torch.empty(len(points), dtype=points.dtype, device=points.device)
    rows = max(1, AT_ONCE // len(centres))
    for start in range(0, len(points), rows):
        part, weight = points[start : start + rows], heavy[start : start + rows]
        # sum h (x - c)^2 without sum h x^2, which is the same for all centres
        distance = weight @ centres.square().T - 2 * (weight * part) @ centres.T  # (M, k)
        found = distance.argmin(dim=1)
        codes[start : start + rows] = found
        error[start : start + rows] = (weight * (part - centres[found]).square()).sum(dim=1)
    return codes, error


def _means(points: Tensor, heavy: Tensor, codes: Tensor, centres: Tensor, error: Tensor) -> Tensor:
    """Weighted means of the clusters; empty ones take the points of largest error."""
    order = torch.argsort(codes, stable=True)  # sums over sorted runs are the same each time, on a GPU as well
    sizes = torch.bincount(codes, minlength=len(centres))
    ends = sizes.cumsum(0)
    sums = _runs((heavy * points)[order], ends)
    weights = _runs(heavy[order], ends)
    moved = torch.where(weights > 1e-12 * weights.amax(), sums / weights.clamp(min=1e-300), centres)
    empty = (sizes == 0).nonzero().flatten()
    if len(empty):
        worst = torch.argsort(error, descending=True, stable=True)[: len(empty)]
        moved[empty] = points[worst]
    return moved


def _runs(rows: Tensor, ends: Tensor) -> Tensor:
    """(k, d): sums of consecutive rows up to each end."""
    sums = torch.cat([rows.new_zeros(1, rows.shape[1]), rows.cumsum(dim=0)])
    return sums[ends] - torch.cat([sums[:1], sums[ends[:-1]]])
