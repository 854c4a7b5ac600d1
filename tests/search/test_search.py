"""Searches end to end on a tiny net: budgets of multiply-adds, bytes and (made up) milliseconds."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from residual_net import residual_net, residual_task
from tersenet.deploy.onnx import export_onnx
from tersenet.errors import FileError, RecipeError, SettingsError
from tersenet.graph.costs import totals
from tersenet.numerics.sparse_bytes import foretold
from tersenet.pruning.drop_blocks import DropBlocks
from tersenet.pruning.prune_channels import PruneChannels
from tersenet.pruning.prune_weights import PruneWeights
from tersenet.pruning.worth import worth
from tersenet.quantization.quantize import Quantize
from tersenet.recipe import Recipe
from tersenet.rewrite.fold_batch_norm import FoldBatchNorm
from tersenet.search.bench import Bench, memory_line
from tersenet.search.search import Found, Search, amount
from tersenet.search.sites import Picks, find_sites
from tersenet.search.table import Table
from tersenet.search.weigh import memory_bytes
from tersenet.step import Chain, Step
from tersenet.task import Task

pytest.importorskip("onnxruntime")
pytest.importorskip("scipy")
pytestmark = pytest.mark.minutes

STEPS: tuple[Step, ...] = (DropBlocks(), PruneChannels(), FoldBatchNorm())


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TERSENET_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module", autouse=True)
def exports(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Each network is exported once for all tests, because an export takes seconds; and the cache is elsewhere."""
    kept: dict[str, bytes] = {}

    def export(model: torch.nn.Module, example: torch.Tensor, path: Path, pack: bool = True) -> Path:
        digest = hashlib.sha256(f"{model!r} {pack}".encode())
        for value in model.state_dict().values():
            digest.update(value.numpy().tobytes())
        key = digest.hexdigest()
        if key not in kept:
            kept[key] = export_onnx(model, example, path, pack=pack).read_bytes()
        path.write_bytes(kept[key])
        return path

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TERSENET_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr("tersenet.search.bench.export_onnx", export)
        yield


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    one, two = a.state_dict(), b.state_dict()
    return one.keys() == two.keys() and all(torch.equal(value, two[key]) for key, value in one.items())


@pytest.fixture(scope="module")
def solved() -> tuple[Search, Task, torch.nn.Module, Found]:
    model = residual_net()
    task = residual_task(model)
    search = Search(steps=STEPS, macs="0.5x", images=32)
    return search, task, model, search.solve(model, task)


def test_a_budget_of_multiply_adds(solved: tuple[Search, Task, torch.nn.Module, Found]) -> None:
    _, task, model, found = solved
    assert same(model, residual_net())  # left as it was
    assert found.met
    made, _ = Chain(steps=found.steps).run(copy.deepcopy(model), task)
    whole, left = totals(model, task.example).macs, totals(made, task.example).macs
    assert found.said["original"] == found.said["unchanged"] == whole
    assert found.said["target"] == {"kind": "macs", "asked": "0.5x", "budget": whole / 2, "unit": "multiply-adds"}
    assert left == found.said["picked"]["measured"]  # what was weighed is what is made
    assert 0.4 * whole < left <= 0.5 * whole
    assert found.said["met"] is True
    assert found.said["note"] == ""
    names = [each["name"] for each in found.said["proposals"]]
    assert "uniform" in names  # always reported beside
    best = min((e for e in found.said["proposals"] if e["measured"] <= whole / 2), key=lambda e: e["divergence"])
    assert found.said["picked"] == best
    assert json.loads(json.dumps(found.said, allow_nan=False)) == found.said
    assert [step.name for step in found.steps][-1] == "fold_batch_norm"


def test_what_was_found_is_a_recipe(solved: tuple[Search, Task, torch.nn.Module, Found]) -> None:
    *_, found = solved
    recipe = Recipe(found.steps)
    assert Recipe.parse(recipe.dump()) == recipe


def test_plan_apply_and_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan survives JSON and makes the same structure out of a fresh model; numbers then load and give the same."""
    model = residual_net()
    task = residual_task(model)
    search = Search(steps=STEPS, macs="0.6x", images=32)
    made, plan = search.run(copy.deepcopy(model), task)
    assert set(plan) == {"picks", "left_out", "plan"}
    assert json.loads(json.dumps(plan)) == plan
    monkeypatch.setattr(Search, "solve", None)  # replaying searches for nothing
    torch.manual_seed(7)
    again = search.apply(residual_net(seed=5), json.loads(json.dumps(plan)))
    again.load_state_dict(made.state_dict())
    x = torch.randn(3, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(x), made.eval()(x))
    assert totals(again, task.example).macs <= 0.6 * totals(model, task.example).macs
    fresh = residual_net()
    assert search.apply(fresh, {}) is fresh


def test_a_plan_leaves_the_model_as_it_was() -> None:
    model = residual_net()
    plan = Search(steps=(PruneChannels(),), macs="0.7x", images=0).plan(model, residual_task(model))
    assert same(model, residual_net())
    assert plan["plan"]["steps"][0]["step"] == "prune_channels"


def test_a_budget_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read off the files, put onto a line through what was measured of the whole network and the float file."""
    model = residual_net()
    task = residual_task(model)
    asked: list[float] = []

    def memories(bench: Bench) -> list[tuple[float, float]]:
        asked[:] = [memory_bytes(path.read_bytes(), bench.x.shape) for path in (bench.base_path, bench.float_path)]
        return [(said, 1e5 + 1.5 * said) for said in asked]

    monkeypatch.setattr(Bench, "memories", memories)
    found = Search(steps=(DropBlocks(), PruneChannels(), Quantize()), memory="0.53x", images=0).solve(model, task)
    assert asked[0] < asked[1]  # int8 and float
    assert found.said["original"] == pytest.approx(1e5 + 1.5 * asked[1])
    assert found.said["unchanged"] == pytest.approx(1e5 + 1.5 * asked[0])
    assert found.said["target"]["budget"] == pytest.approx(0.53 * found.said["original"])
    assert found.met
    assert found.said["picked"]["measured"] <= found.said["target"]["budget"] < found.said["unchanged"]


def test_places_that_cannot_be_timed_stay(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    model = residual_net()
    task = dataclasses.replace(residual_task(model), quiet=False)
    search = Search(steps=(PruneChannels(),), macs="0.8x", images=0)
    whole = search.solve(model, task)
    place = next(iter(whole.picks[0]))
    monkeypatch.setattr(Bench, "able", lambda self, site: site.place != place)
    found = search.solve(model, task)
    assert place not in found.picks[0]
    assert found.said["places"] == whole.said["places"] - 1
    assert f"1 places cannot be timed by changing a file, such as {place}" in capfd.readouterr().err
    monkeypatch.setattr(Bench, "able", lambda self, site: False)
    with pytest.raises(SettingsError, match="no choice of the search can be timed by changing a file"):
        search.solve(model, task)


def test_what_a_runtime_cannot_run_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = residual_net()
    task = residual_task(model)
    sites = find_sites(STEPS, model, task)
    bench = Bench(STEPS, sites, model, task, runtime="onnxruntime", threads=1, batch=1, folder=tmp_path)
    assert all(bench.able(site) for site in sites)
    half = {"first.conv2": {"out": [0, 1, 2]}}  # and what it is added to still has all
    monkeypatch.setattr(bench, "plan", lambda site, index: {"kept": half})
    site = next(site for site in sites if site.step == 1)
    assert not bench.able(site)


def test_the_line_of_memory() -> None:
    assert memory_line([]) == (0.0, 1.0)
    assert memory_line([(100.0, 1200.0), (200.0, 1400.0)]) == pytest.approx((1000.0, 2.0))
    assert memory_line([(100.0, 1200.0), (200.0, 9400.0)])[1] == 3.0  # no line through noise


def test_memory_measured_for_real() -> None:
    model = residual_net()
    found = Search(steps=(PruneChannels(),), memory="1.0x", images=0).solve(model, residual_task(model))
    assert found.said["original"] > 0


def test_a_budget_of_bytes(tmp_path: Path) -> None:
    """Of the ONNX file, int8, as a share of the float file; held against the file of the steps that were found."""
    model = residual_net()
    task = residual_task(model)
    found = Search(steps=(DropBlocks(), PruneChannels(), Quantize()), bytes="0.4x", images=32).solve(model, task)
    assert found.met
    original = export_onnx(model, task.example, tmp_path / "a.onnx").stat().st_size
    assert found.said["original"] == pytest.approx(original, rel=0.01)
    made, _ = Chain(steps=found.steps).run(copy.deepcopy(model), task)
    shipped = export_onnx(made.eval(), task.example, tmp_path / "b.onnx").stat().st_size
    assert shipped == pytest.approx(found.said["picked"]["measured"], rel=0.1)
    assert found.said["target"]["budget"] == pytest.approx(0.4 * original, rel=0.01)
    # An amount says the same as the share that it is.
    same_amount = Search(
        steps=(DropBlocks(), PruneChannels(), Quantize()), bytes=str(int(found.said["target"]["budget"])), images=32
    ).solve(model, task)
    assert same_amount.picks == found.picks


def test_a_budget_of_bytes_spends_zeros_too() -> None:
    """Zeros are no fewer bytes of an ONNX file, but of a coded one; for another budget they are worth nothing."""
    model = residual_net()
    task = residual_task(model)
    search = Search(steps=(PruneWeights(), Quantize()), bytes="0.25x", images=32, widen=False)
    found = search.solve(model, task)
    assert found.met
    zeros = found.picks[0]
    assert zeros
    made, _ = Chain(steps=found.steps).run(copy.deepcopy(model), task)
    rows = {row.layer: row for row in worth(made)}
    saved = sum(rows[path].weights - rows[path].bytes["int8 bound"] for path in zeros)
    said = found.said["unchanged"] - found.said["picked"]["measured"]
    assert 0.8 * saved < said < 1.2 * saved  # what no code can beat, of the weights as they became
    with pytest.raises(SettingsError, match="has a choice in this model"):
        Search(steps=(PruneWeights(),), macs="0.5x", images=0).solve(model, task)


def test_a_thinner_layer_saves_less_by_zeros(tmp_path: Path) -> None:
    model = residual_net()
    task = residual_task(model)
    steps = (PruneChannels(), PruneWeights(), Quantize())
    bench = Bench(
        steps, find_sites(steps, model, task), model, task, runtime="onnxruntime", threads=1, batch=1, folder=tmp_path
    )
    width, zeros = {0: {"down.conv1": 16}}, {1: {"down.conv1": "0.8"}}
    whole, thin = bench.weight({}, "bytes"), bench.weight(width, "bytes")
    share = 1 - foretold(1, 8, 0.8, 1)
    assert whole - bench.weight(zeros, "bytes") == pytest.approx(share * 32 * 16 * 9)
    assert thin - bench.weight({**width, **zeros}, "bytes") == pytest.approx(share * 16 * 16 * 9)
    assert bench.weight(zeros, "macs") == bench.weight({}, "macs")


def test_a_budget_that_cannot_be_met() -> None:
    """The best that was found comes back, with how much is missing and why."""
    model = residual_net()
    task = residual_task(model)
    found = Search(steps=STEPS, macs="0.01x", images=32, widen=False).solve(model, task)
    assert not found.met
    said = found.said
    assert said["met"] is False
    budget, got = said["target"]["budget"], said["picked"]["measured"]
    assert f"{100 * (got / budget - 1):.0f} % above the budget of" in said["note"]
    made, _ = Chain(steps=found.steps).run(copy.deepcopy(model), task)
    assert totals(made, task.example).macs == got
    # Nothing is smaller: both blocks gone, and the third as thin as it goes.
    assert found.picks == {0: {"first": "drop", "last": "drop"}, 1: {"down.conv1": 4}}
    assert "every choice is used up" in said["note"] or "could give no more" in said["note"]
    assert min(each["measured"] for each in said["proposals"]) == got


def test_choices_that_steps_keep_back_are_taken_where_the_others_do_not_reach() -> None:
    """Channels that pass through residual additions: without them at least 0.15 of the multiply-adds stay."""
    model = residual_net()
    task = residual_task(model)
    least = Search(steps=STEPS, macs="0.01x", images=0, widen=False).solve(model, task).said["picked"]["measured"]
    whole = totals(model, task.example).macs
    search = Search(steps=STEPS, macs=f"{0.8 * least / whole:.4f}x", images=0)
    found = search.solve(model, task)
    assert found.met
    assert found.wider
    assert "the ordinary choices of prune_channels do not reach the budget" in found.said["note"]
    made, plan = search.run(copy.deepcopy(model), task)
    assert 0.5 * least < totals(made, task.example).macs <= 0.8 * least
    assert plan["wider"] is True
    again = search.apply(residual_net(seed=5), json.loads(json.dumps(plan)))
    again.load_state_dict(made.state_dict())
    # What the ordinary choices reach is left to them.
    assert not Search(steps=STEPS, macs="0.9x", images=0).solve(model, task).wider


def test_nested_steps_and_settings_through_yaml() -> None:
    search = Search(
        steps=(DropBlocks(only=("a.*",)), Chain(steps=(FoldBatchNorm(), Quantize())), PruneChannels(multiple_of=8)),
        latency="3ms", threads=2, images=64, skip=("linear",),
    )  # fmt: skip
    recipe = Recipe((search,))
    assert Recipe.parse(recipe.dump()) == recipe
    typed = "steps:\n- search: {latency: 0.5x, steps: [drop_blocks, {prune_channels: {multiple_of: 16}}]}\n"
    parsed = Recipe.parse(typed).steps[0]
    assert parsed == Search(latency="0.5x", steps=(DropBlocks(), PruneChannels(multiple_of=16)))
    with pytest.raises(RecipeError, match="give one budget of latency, bytes, macs and memory, got none"):
        Recipe.parse("steps:\n- search: {steps: [drop_blocks]}\n")


def test_only_and_skip_hold_for_the_steps_with_choices() -> None:
    model = residual_net()
    found = Search(steps=STEPS, macs="0.9x", images=0, skip=("first", "first.*")).solve(model, residual_task(model))
    assert all(not place.startswith("first") for places in found.picks.values() for place in places)
    with pytest.raises(SettingsError, match="no step of the search has a choice in this model"):
        Search(steps=STEPS, macs="0.9x", only=("BatchNorm2d",)).solve(model, residual_task(model))
    with pytest.raises(SettingsError, match=r"search: only names 'nothing\.\*', and no layer"):
        Search(steps=STEPS, macs="0.9x", only=("nothing.*",)).solve(model, residual_task(model))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "give one budget of latency, bytes, macs and memory, got none"),
        ({"macs": "0.5x", "latency": "1ms"}, "give one budget of latency, bytes, macs and memory, got latency, macs"),
        ({"macs": "0.5x", "steps": ()}, "a search needs a step with choices"),
        ({"macs": "0.5x", "steps": (FoldBatchNorm(),)}, "a search needs a step with choices"),
        ({"latency": "1ms", "threads": 0}, "threads must be at least 1, got 0"),
        ({"latency": "1ms", "batch": -1}, "batch must be at least 1, got -1"),
    ],
)
def test_bad_settings(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        Search(**{"steps": STEPS, **settings})


@pytest.mark.parametrize(
    ("kind", "text", "wanted"),
    [
        ("latency", "0.25x", (0.25, True)),
        ("latency", "3ms", (3.0, False)),
        ("latency", "1x", (1.0, True)),
        ("bytes", "200000", (200000.0, False)),
        ("macs", "4e7", (4e7, False)),
        ("bytes", "0.1x", (0.1, True)),
    ],
)
def test_amounts(kind: str, text: str, wanted: tuple[float, bool]) -> None:
    assert amount(kind, text) == wanted


BAD = [
    ("latency", "0.5"), ("latency", "2x"), ("latency", "-1ms"), ("latency", "abc"), ("latency", "0ms"),
    ("latency", "nanms"), ("latency", "3"), ("latency", ""), ("latency", "x"), ("latency", "ms"), ("latency", "3s"),
    ("bytes", "2x"), ("bytes", "-1"), ("bytes", "abc"), ("bytes", "3ms"), ("bytes", "0"),
    ("bytes", "nan"), ("macs", "0x"), ("macs", "1.01x"), ("macs", "infx"),
    # Half a byte is a share without its x, and what is not finite makes no strict JSON.
    ("latency", "infms"), ("bytes", "inf"), ("bytes", "1e400"), ("bytes", "0.5"), ("macs", "0.5"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "text"), BAD)
def test_bad_amounts(kind: str, text: str) -> None:
    with pytest.raises(SettingsError, match=f"{kind} must be a share such as 0.5x, or an amount such as") as refused:
        amount(kind, text)
    assert repr(text) in str(refused.value)
    with pytest.raises(SettingsError):
        Search(steps=STEPS, **{kind: text})  # type: ignore[arg-type]


class Clock:
    """Milliseconds that are multiply-adds in disguise, so that nothing depends on how busy the machine is."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, slow_int8: bool = False, drift: float = 1.0) -> None:
        self.calls: list[tuple[str, int]] = []

        def one(bench: Bench, picks: Picks) -> float:
            rounded = any(step.family == "quantize" for step in bench.steps)
            return (0.1 + bench.weight(picks, "macs") * 1e-6) * ((1.3 if slow_int8 else 0.5) if rounded else 1.0)

        def times(bench: Bench, candidates: Sequence[Picks], said: str, keep: Any = None) -> list[tuple[float, float]]:
            if candidates:
                self.calls.append((said, len(candidates)))
            return [(one(bench, picks), one(bench, picks) / one(bench, {})) for picks in candidates]

        def base_times(bench: Bench) -> tuple[float, float]:
            self.calls.append(("unchanged", 1))
            plain = 0.1 + bench.weight({}, "macs") * 1e-6
            return one(bench, {}), plain

        def share_of_float(bench: Bench, picks: Picks) -> float:
            self.calls.append(("confirming", 1))
            return drift * one(bench, picks) / base_times(bench)[1]

        monkeypatch.setattr(Bench, "share_of_float", share_of_float)
        monkeypatch.setattr(Bench, "times", times)
        monkeypatch.setattr(Bench, "base_times", base_times)


FAST = (DropBlocks(), PruneChannels(), Quantize())


def test_a_budget_of_latency(cache: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    clock = Clock(monkeypatch)
    model = residual_net()
    task = residual_task(model)
    search = Search(steps=FAST, latency="0.3x", images=32)
    found = search.solve(model, task)
    assert found.met
    said = found.said
    assert said["checks"]["candidates"] == 20
    assert said["checks"]["error"] < 0.02
    assert said["original"] == pytest.approx(2 * said["unchanged"])
    assert said["target"]["budget"] == pytest.approx(0.3 * said["original"])
    assert 0.9 * said["target"]["budget"] < said["picked"]["measured"] <= said["target"]["budget"]
    assert said["picked"]["predicted"] == pytest.approx(said["picked"]["measured"], rel=0.03)
    tables = list((cache / "tables").iterdir())
    assert len(tables) == 1
    assert Table.read(tables[0]).device["runtime"] == "onnxruntime"
    # A full cache: nothing but the best few is timed again, and the answer is the same.
    clock.calls.clear()
    again = search.solve(model, task)
    assert again.picks == found.picks
    assert clock.calls == []  # everything is kept, the answers' times too
    # A damaged table is filled anew, and said.
    tables[0].write_text("{", encoding="utf-8")
    assert search.solve(model, task).picks == found.picks
    out, err = capfd.readouterr()
    assert out == ""
    assert "is damaged (it is no JSON); the table is filled anew" in err
    assert err.count("\n") == 1


def test_an_answer_that_is_slower_on_its_own_is_aimed_at_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone, every file takes 8 % longer than among the others: the answer is one that fits then."""
    Clock(monkeypatch, drift=1.08)
    model = residual_net()
    found = Search(steps=FAST, latency="0.35x", images=0).solve(model, residual_task(model))
    budget, picked = found.said["target"]["budget"], found.said["picked"]
    assert found.met
    assert 0.85 * budget < picked["measured"] <= budget
    among = [1.08 * each["measured"] for each in found.said["proposals"]]
    assert any(picked["measured"] == pytest.approx(each) for each in among)
    assert any(each > budget for each in among)  # what looked as if it would fit


def test_a_table_from_elsewhere(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    model = residual_net()
    task = residual_task(model)
    search = Search(steps=FAST, latency="0.3x", images=0)
    table, costs, _ = search.fill(model, task)
    own = tmp_path / "device.json"
    table.write(own)
    here = search.solve(model, task)
    clock.calls.clear()
    there = dataclasses.replace(search, table=str(own))
    found = there.solve(model, task)
    assert clock.calls == []  # predicted only
    assert found.said["checks"]["candidates"] == 20
    assert found.said["target"]["budget"] == pytest.approx(here.said["target"]["budget"])
    assert found.said["picked"]["measured"] == pytest.approx(found.said["picked"]["predicted"])
    assert costs.error is not None
    for settings in ({"threads": 2}, {"batch": 8}, {"runtime": "openvino"}):
        with pytest.raises(SettingsError, match="is of onnxruntime with 1 threads and batch 1, the search of") as bad:
            dataclasses.replace(there, **settings).solve(model, task)
        assert "\n" not in str(bad.value)
    with pytest.raises(SettingsError, match="does not know this model"):
        dataclasses.replace(there, steps=(PruneChannels(), FoldBatchNorm())).solve(model, task)
    short = Table.read(own)
    short.changes.pop(next(iter(short.changes)))
    short.write(own)
    with pytest.raises(SettingsError, match="lacks 1 of"):
        there.solve(model, task)
    with pytest.raises(FileError, match="cannot be read"):
        dataclasses.replace(there, table=str(tmp_path / "none.json")).solve(model, task)


def test_int8_that_is_slower_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch, slow_int8=True)
    model = residual_net()
    task = residual_task(model)
    search = Search(steps=FAST, latency="0.5x", images=0)
    made, plan = search.run(copy.deepcopy(model), task)
    found = search.solve(model, task)
    assert found.met
    assert [step.name for step in found.steps if step.family == "quantize"] == []
    assert found.said["note"] == "quantize makes the network 1.30x slower than float here: left out"
    assert plan["left_out"] == ["quantize"]
    # The plan replays what was found, which has no rounding either.
    again = search.apply(residual_net(seed=3), json.loads(json.dumps(plan)))
    again.load_state_dict(made.state_dict())


def test_checks_are_of_the_sites_they_were_measured_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random candidates of other sites are other candidates, so that their kept times must not be compared."""
    Clock(monkeypatch)
    model = residual_net()
    task = residual_task(model)
    first = Search(steps=FAST, latency="0.3x", images=0).solve(model, task)
    assert first.said["checks"]["error"] < 0.02
    fewer = Search(steps=FAST, latency="0.4x", images=0, skip=("first", "first.*")).solve(model, task)
    assert fewer.said["checks"]["error"] < 0.02
