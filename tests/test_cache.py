"""Where things are kept that can be made again."""

from __future__ import annotations

from pathlib import Path

import pytest

from tersenet.cache import cache_folder


@pytest.mark.parametrize(
    ("own", "shared", "wanted"),
    [("a", "b", "a"), ("", "b", "b/tersenet"), ("", "", "home/.cache/tersenet")],
)
def test_the_users_own_folder_comes_first(
    own: str, shared: str, wanted: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in (("TERSENET_CACHE", own), ("XDG_CACHE_HOME", shared), ("HOME", "home")):
        monkeypatch.setenv(name, str(tmp_path / value) if value else "")
    assert cache_folder() == tmp_path / wanted
