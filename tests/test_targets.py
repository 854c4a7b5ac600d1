"""From a target to a recipe, what a run folder keeps of a search, and whether a target was met."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from residual_net import residual_net, residual_task
from tersenet.errors import RunError, SettingsError
from tersenet.recipe import Recipe
from tersenet.report.headline import missed_by
from tersenet.search.search import Search
from tersenet.step import Step
from tersenet.targets import Target, judged, keep_search, recipe_of, searched, share

pytest.importorskip("scipy")


def test_one_target() -> None:
    assert not Target().given
    assert Target(bytes="0.1x").given
    with pytest.raises(SettingsError, match="give one target, got latency and bytes"):
        Target(latency="1ms", bytes="0.1x")


@pytest.mark.parametrize("text", ["0.5", "2x", "-1ms", "abc"])
def test_bad_latencies(text: str) -> None:
    with pytest.raises(SettingsError, match=r"latency must be a share such as 0\.5x, or an amount such as 3ms"):
        Target(latency=text)


@pytest.mark.parametrize("text", ["2x", "-1", "abc", "0", "0.5"])
def test_bad_sizes(text: str) -> None:
    for kind in ("bytes", "macs"):
        with pytest.raises(SettingsError, match=rf"{kind} must be a share such as 0\.5x"):
            Target(**{kind: text})


def test_shares() -> None:
    assert share("0.5x") == share("0.5") == share(0.5) == 0.5
    for bad in ("0x", "1.1x", "-0.5x", "nan"):
        with pytest.raises(SettingsError, match="share to keep must be in"):
            share(bad)
    with pytest.raises(SettingsError, match="'half' is no share"):
        share("half")


def test_a_recipe_or_a_target(tmp_path: Path) -> None:
    for arguments in ((None, Target()), (tmp_path / "a.yaml", Target(macs="0.5x"))):
        with pytest.raises(SettingsError, match="give either a recipe"):
            recipe_of(*arguments)
    path = tmp_path / "a.yaml"
    path.write_text("steps: [quantize]\n", encoding="utf-8")
    assert recipe_of(path) == Recipe.read(path)


@pytest.mark.parametrize("target", [Target(latency="0.25x"), Target(bytes="200000"), Target(macs="0.5x")])
@pytest.mark.parametrize("data", ["digits", "random:3x8x8"])
def test_recipes_of_targets(target: Target, data: str) -> None:
    recipe = recipe_of(target=target, epochs=3, data=data, runtime="openvino", threads=2, batch=4, table=Path("t.json"))
    assert Recipe.parse(recipe.dump()) == recipe
    steps: tuple[Step, ...] = recipe.steps
    if isinstance(steps[0], Search):
        search = steps[0]
        assert (search.latency, search.bytes) == (target.latency, target.bytes)
        assert (search.runtime, search.threads, search.batch, search.table) == ("openvino", 2, 4, "t.json")
        assert (search.images == 0) == data.startswith("random")
        steps = search.steps
    names = [step.name for step in steps]
    assert names[-2:] == ["fold_batch_norm", "quantize"]
    assert ("train" in names) == (data == "digits")  # nothing is learned from noise
    assert "train" not in [step.name for step in recipe_of(target=target, epochs=0, data=data).steps]
    if data.startswith("random"):
        assert all(step.data_needed() != "labels" for step in recipe.steps)


ROWS: list[dict[str, Any]] = [
    {"macs": 100, "latency_ms": {"r": {"median": 2.0}}, "file_bytes": {"onnx": 1000, "terse": 900}},
    {"macs": 10, "latency_ms": {"r": {"median": 0.1}}, "file_bytes": {"onnx": 10, "terse": 10}},
    {"macs": 40, "latency_ms": {"r": {"median": 0.5}}, "file_bytes": {"onnx": 500, "terse": 250}},
]


@pytest.mark.parametrize(
    ("target", "got", "met"),
    [
        (Target(latency="0.25x"), "0.250x", True),
        (Target(latency="0.24x"), "0.250x", False),
        (Target(latency="0.5ms"), "0.500ms", True),
        (Target(latency="0.4ms"), "0.500ms", False),
        (Target(bytes="0.25x"), "0.250x", True),
        (Target(bytes="249"), "250", False),
        (Target(macs="0.4x"), "0.400x", True),
        (Target(macs="0.3x"), "0.400x", False),
    ],
)
def test_judged(target: Target, got: str, met: bool) -> None:
    (found,) = judged(target, ROWS, "r")
    assert (found["got"], found["met"]) == (got, met)
    assert judged(Target(), ROWS, "r") == []


@pytest.mark.parametrize(
    ("ms", "got"), [(0.5002, "0.2501x"), (0.500002, "0.250001x"), (0.50000002, "0.25000001x"), (0.6, "0.300x")]
)
def test_a_small_miss_is_no_miss_by_nothing(ms: float, got: str) -> None:
    rows = [ROWS[0], {**ROWS[2], "latency_ms": {"r": {"median": ms}}}]
    (found,) = judged(Target(latency="0.25x"), rows, "r")
    assert (found["got"], found["met"]) == (got, False)
    assert missed_by(found) not in ("0x", None)


def test_multiply_adds_are_a_share_or_an_amount() -> None:
    """A share is cut everywhere alike; an amount is spent by a search."""
    (search,) = recipe_of(target=Target(macs="40000000"), data="random:3x8x8").steps
    assert isinstance(search, Search)
    assert search.budget == ("macs", 40e6, False)
    assert not any(isinstance(step, Search) for step in recipe_of(target=Target(macs="0.5x"), data="digits").steps)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TERSENET_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "run"
    out.mkdir()
    return out


@pytest.mark.minutes
def test_a_search_in_a_run_folder_is_not_repeated(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    model = residual_net()
    task = residual_task(model)
    recipe = recipe_of(target=Target(bytes="0.6x"), epochs=0, data="random:3x8x8")
    steps, said = searched(recipe.steps, model, task, folder)
    assert said is not None
    assert keep_search(said, folder) == said["said"]
    assert [path.name for path in folder.iterdir()] == ["search.json"]
    monkeypatch.setattr(Search, "solve", None)
    again, kept = searched(recipe.steps, model, task, folder)
    assert again == steps
    assert kept == said["said"] or kept == said
    other = recipe_of(target=Target(bytes="0.7x"), epochs=0, data="random:3x8x8")
    with pytest.raises(RunError, match="holds a run with another target"):
        searched(other.steps, model, task, folder)
    for damaged in (b"{", b"[]", b"\xff", b"{}", b'{"picks": 1, "asked": "", "said": {}}'):
        (folder / "search.json").write_bytes(damaged)
        with pytest.raises(RunError, match="is damaged and cannot be read"):
            searched(recipe.steps, model, task, folder)


def test_steps_without_a_search(folder: Path) -> None:
    recipe = recipe_of(target=Target(macs="0.5x"), data="random:3x8x8")
    model = residual_net()
    assert searched(recipe.steps, model, residual_task(model), folder) == (recipe.steps, None)
    assert searched((), model, residual_task(model), folder) == ((), None)
    assert keep_search(None, folder) is None


def test_a_miss_is_never_hidden_by_rounding() -> None:
    rows = [{"latency_ms": {"r": {"median": 2.0}}}, {"latency_ms": {"r": {"median": 0.5002}}}]
    (found,) = judged(Target(latency="0.25x"), rows, "r")
    assert (found["got"], found["met"]) == ("0.2501x", False)
    rows[1]["latency_ms"]["r"]["median"] = 0.4998
    (found,) = judged(Target(latency="0.25x"), rows, "r")
    assert (found["got"], found["met"]) == ("0.250x", True)
