"""Product quantization against pieces that are known, against Lloyd's conditions, and against scikit-learn."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tersenet.errors import SettingsError
from tersenet.numerics.product_quantization import from_pieces, product_codebooks


def weight(outputs: int = 60, inputs: int = 12) -> Tensor:
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shared", [False, True])
def test_pieces_that_were_put_in_are_found(shared: bool) -> None:
    source = torch.Generator().manual_seed(1)
    books = torch.randn(1 if shared else 3, 5, 4, generator=source)
    codes = torch.randint(0, 5, (40, 3), generator=source)
    made = from_pieces(books, codes)
    for o in range(40):
        for s in range(3):
            assert torch.equal(made[o, 4 * s : 4 * s + 4], books[0 if shared else s, codes[o, s]])
    found, own = product_codebooks(made, 4, 5, seed=0, shared=shared)
    torch.testing.assert_close(from_pieces(found, own), made)


@pytest.mark.parametrize("shared", [False, True])
def test_each_piece_has_the_nearest_code_and_each_code_is_a_mean(shared: bool) -> None:
    x, heavy = weight(), torch.rand(60, 12, generator=torch.Generator().manual_seed(2)) + 0.1
    books, codes = product_codebooks(x, 3, 8, seed=0, shared=shared, importance=heavy)
    assert books.shape == (1 if shared else 4, 8, 3)
    for s in range(4):
        own, h = x[:, 3 * s : 3 * s + 3], heavy[:, 3 * s : 3 * s + 3]
        book = books[0 if shared else s]
        distance = (h[:, None] * (own[:, None] - book).square()).sum(dim=2)
        assert torch.equal(distance.argmin(dim=1), codes[:, s])
        if not shared:
            for k in range(8):
                mine = codes[:, s] == k
                assert bool(mine.any())
                torch.testing.assert_close(book[k], (h * own)[mine].sum(0) / h[mine].sum(0), rtol=1e-4, atol=1e-5)


def test_as_good_as_another_k_means() -> None:
    cluster = pytest.importorskip("sklearn.cluster")
    x = weight(200, 4)
    books, codes = product_codebooks(x, 4, 16, seed=0)
    mine = float((from_pieces(books, codes) - x).square().sum())
    theirs = cluster.KMeans(16, n_init=1, random_state=0).fit(x.numpy()).inertia_
    assert mine <= 1.1 * theirs


def test_the_seed_decides() -> None:
    first, again, other = (product_codebooks(weight(), 4, 6, seed=seed)[0] for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_fewer_distinct_pieces_than_codes() -> None:
    x = torch.tensor([[1.0, 2.0]]).repeat(6, 1)
    x[3:] = -x[3:]
    books, codes = product_codebooks(x, 2, 5, seed=0)
    assert torch.equal(from_pieces(books, codes), x)
    assert torch.equal(from_pieces(*product_codebooks(torch.zeros(4, 4), 2, 3, seed=0)), torch.zeros(4, 4))


def test_the_gradient_reaches_the_pieces() -> None:
    books, codes = product_codebooks(weight(), 4, 6, seed=0)
    books.requires_grad_()
    from_pieces(books, codes).sum().backward()
    assert books.grad is not None
    for s in range(3):
        torch.testing.assert_close(books.grad[s, :, 0], torch.bincount(codes[:, s], minlength=6).float())


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(SettingsError, match="got 5"):
        product_codebooks(weight(), 5, 4, seed=0)
    with pytest.raises(SettingsError, match="1 to 60, as many as share it, got 61"):
        product_codebooks(weight(), 4, 61, seed=0)
