"""Which operators are left in float where it is not known what a runtime computes wrong."""

from __future__ import annotations

import pytest

from tersenet.deploy.checked import _narrowed


@pytest.mark.parametrize("guilty", "abcdefgh")
def test_the_one_that_suffices_is_found_in_three_files(guilty: str) -> None:
    asked: list[list[str]] = []

    def is_right(some: list[str]) -> bool:
        asked.append(some)
        return guilty in some

    assert _narrowed(list("abcdefgh"), is_right) == [guilty]
    assert len(asked) == 3
