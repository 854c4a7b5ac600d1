from __future__ import annotations

import gc
import json
import os

import numpy as np
import pytest
import torch

from tersenet.deploy.measure import Contender, measure, measure_files
from tersenet.deploy.timings import Measurement, Ratio
from tersenet.deploy.warm import Warmed
from tersenet.errors import MissingExtra, SettingsError
from tersenet.numerics.intervals import bootstrap_median

X = np.zeros((1, 3), np.float32)
MS = 1_000_000


class Lab:
    """A clock that only contenders move: each call takes as long as its contender says."""

    def __init__(self) -> None:
        self.now = 0
        self.log: list[str] = []

    def clock(self) -> int:
        return self.now

    def contender(self, name: str, ms, runtime: str = "lab") -> Contender:
        calls = iter(range(10**9))

        def work(x):
            assert x is X
            self.log.append(name)
            self.now += round((ms(next(calls)) if callable(ms) else ms) * MS)

        return Contender(name, work, X, runtime)

    def measure(self, *contenders, **settings) -> Measurement:
        return measure(contenders, clock=self.clock, **settings)


def test_the_interval_is_over_openings_where_they_differ() -> None:
    """One opening of three came to lie badly: another one may, too, however many turns it had."""
    turns = {("a", ""): np.repeat([1.0, 1.0, 1.1], 20), ("b", ""): np.ones(60)}
    assert Measurement(turns).ratio("a", "b").high == 1.0
    assert Measurement(turns, openings=3).ratio("a", "b").high == pytest.approx(1.1)
    assert Measurement(turns, openings=3).latency("a")["high"] == pytest.approx(1.1)
    with pytest.raises(ValueError, match="60 values cannot be cut into 7 equal groups"):
        Measurement(turns, openings=7).ratio("a", "b")


def test_contenders_take_turns_with_calls_after_discarded_ones():
    lab = Lab()
    names = ("a", "b", "c")
    found = lab.measure(*(lab.contender(name, 1.0) for name in names), turns=21, calls=7, discard=3)
    log = lab.log[3 * 3 :]  # three probing calls each come first
    assert len(log) == 21 * 3 * (7 + 3)
    blocks = [log[start : start + 10] for start in range(0, len(log), 10)]
    assert all(len(set(block)) == 1 for block in blocks)
    rounds = [tuple(block[0] for block in blocks[start : start + 3]) for start in range(0, len(blocks), 3)]
    assert all(sorted(each) == sorted(names) for each in rounds)  # each contender once a round
    assert len(set(rounds)) > 3  # and the order is shuffled
    assert {key: len(values) for key, values in found.turns.items()} == {(name, "lab"): 21 for name in names}


def test_a_rough_one_may_have_fewer_turns_than_intervals_need():
    lab = Lab()
    found = lab.measure(lab.contender("a", 1.0), turns=3, rough=True)
    assert {key: len(values) for key, values in found.turns.items()} == {("a", "lab"): 3}
    for turns, rough, least in ((3, False, 20), (0, True, 1)):
        with pytest.raises(SettingsError, match=f"turns must be at least {least}"):
            lab.measure(lab.contender("a", 1.0), turns=turns, rough=rough)


def test_the_order_follows_the_seed():
    def order(seed):
        lab = Lab()
        lab.measure(lab.contender("a", 1), lab.contender("b", 1), seed=seed, calls=5, discard=0)
        return lab.log

    assert order(1) == order(1) != order(2)


def test_a_discarded_call_is_not_timed_and_the_median_of_a_turn_is():
    lab = Lab()
    # Within each turn of 2 discarded and 5 timed calls: 100, 100, then 1, 2, 3, 4, 50 ms; the median is 3.
    pattern = [100, 100, 1, 2, 3, 4, 50]
    slow_first = lab.contender("a", lambda i: 1 if i < 3 else pattern[(i - 3) % 7])
    found = lab.measure(slow_first, turns=20, calls=5, discard=2)
    assert found.turns["a", "lab"].tolist() == [3.0] * 20
    latency = found.latency("a")
    assert latency == {"median": 3.0, "low": 3.0, "high": 3.0, "threads": 1, "batch": 1}


def test_latency_and_ratio_are_bootstraps_over_turns():
    rng = np.random.default_rng(0)
    a, b = rng.uniform(1, 2, 25), rng.uniform(1, 2, 25)
    found = Measurement({("a", "r"): a, ("b", "r"): b})
    latency, ratio = found.latency("a"), found.ratio("a", "b")
    assert (latency["median"], latency["low"], latency["high"]) == bootstrap_median(a)
    assert (ratio.ratio, ratio.low, ratio.high) == bootstrap_median(a / b)


def test_drift_that_both_share_leaves_the_ratio_sharp():
    drift = np.linspace(1, 3, 20)  # the machine becomes three times slower meanwhile
    found = Measurement({("a", "r"): 2 * drift, ("b", "r"): drift})
    ratio = found.ratio("a", "b")
    assert (ratio.ratio, ratio.low, ratio.high) == pytest.approx((2, 2, 2))
    assert found.latency("a")["high"] / found.latency("a")["low"] > 1.2
    assert found.verdict == "differences above 1 % can be told apart"


def test_not_slower_asks_whether_the_interval_lies_above_two_percent():
    def slower_by(*shares):
        return Measurement({("a", ""): np.array(shares * 10), ("b", ""): np.ones(10 * len(shares))})

    assert slower_by(1.02, 1.02).not_slower("a", "b")
    assert not slower_by(1.021, 1.021).not_slower("a", "b")
    assert slower_by(0.9, 1.2).not_slower("a", "b")  # the interval runs from 0.9 to 1.2: not shown to be slower
    assert not slower_by(1.03, 1.2).not_slower("a", "b")


def test_a_difference_is_one_only_where_the_interval_leaves_one_out():
    assert [Ratio(1, *span).difference for span in ((0.9, 0.99), (1.01, 1.1), (0.9, 1.1), (0.9, 1.0))] == [
        "faster", "slower", "none shown", "none shown",
    ]  # fmt: skip


def test_a_contender_that_never_settled_is_named():
    found = Measurement({("a", ""): np.ones(20)}, warmed={("a", ""): Warmed(9, 1.0, False)})
    assert found.verdict == "differences above 1 % can be told apart, but the time of a had not settled"


def test_a_noisy_machine_says_so_in_words():
    values = np.array([1.0, 1.06] * 10)
    found = Measurement({("a", ""): values})
    latency = found.latency("a")
    assert found.noise == pytest.approx((latency["high"] - latency["low"]) / 2 / latency["median"])
    assert found.noise > 0.02
    assert found.verdict.startswith("this machine is too noisy to tell 3 %")


def test_slow_calls_get_fewer_calls_but_never_fewer_than_five():
    lab = Lab()
    lab.measure(lab.contender("fast", 1), lab.contender("slow", 25), lab.contender("slowest", 1000))
    timed_and_discarded = {name: (lab.log.count(name) - 3) / 20 for name in ("fast", "slow", "slowest")}
    assert timed_and_discarded == {"fast": 60, "slow": 10 + 2, "slowest": 5 + 1}


def test_a_budget_bounds_the_whole_and_keeps_the_least():
    lab = Lab()
    lab.measure(lab.contender("a", 1), lab.contender("b", 4), budget_s=2)
    assert lab.now <= 1.15 * 2000 * MS  # discarded calls round up
    assert lab.now >= 0.7 * 2000 * MS
    lab = Lab()
    lab.measure(lab.contender("a", 30), budget_s=0.001)
    assert len(lab.log) == 3 + 20 * (5 + 1)


def test_cold_alternates_single_calls():
    lab = Lab()
    found = lab.measure(lab.contender("a", 1), lab.contender("b", 2), turns=20, calls=10, cold=True)
    assert len(found.turns["a", "lab"]) == 200
    pairs = [set(lab.log[6 + i : 8 + i]) for i in range(0, 400, 2)]
    assert all(pair == {"a", "b"} for pair in pairs)
    assert found.ratio("b", "a").ratio == 2


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
@pytest.mark.parametrize("threads", [1, 2])
def test_everything_is_put_back_also_after_an_interrupt(error, threads):
    def state():
        cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
        return cores, torch.get_num_threads(), gc.isenabled()

    before = state()
    during = []

    def work(x):
        during.append(state())
        if len(during) > 9:
            raise error

    with pytest.raises(error):
        measure([Contender("a", work, X)], threads=threads)
    assert state() == before
    cores, torch_threads, collecting = during[-1]
    assert (torch_threads, collecting) == (threads, False)
    if hasattr(os, "sched_getaffinity"):
        assert cores == ({max(before[0])} if threads == 1 else before[0])


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system does not pin")
def test_nobody_is_pinned_beside_openvino_which_moves_its_thread_itself():
    before, seen = os.sched_getaffinity(0), []
    one = Contender("a", lambda x: seen.append(os.sched_getaffinity(0)), X, "onnxruntime")
    measure([one, Contender("a", lambda x: None, X, "openvino")], calls=5)
    assert all(cores == before for cores in seen)
    measure([one], calls=5)
    assert seen[-1] == {max(before)}


def test_wrong_use_is_refused():
    one = Contender("a", lambda x: x, X)
    for settings in ({"turns": 19}, {"calls": 4}, {"discard": -1}, {"threads": 0}):
        with pytest.raises(SettingsError, match="must be at least"):
            measure([one], **settings)
    with pytest.raises(SettingsError, match="nothing to measure"):
        measure([])
    with pytest.raises(SettingsError, match="same name and runtime"):
        measure([one, one])
    with pytest.raises(SettingsError, match="batch 1, the measurement 4"):
        measure([one], batch=4)
    found = Measurement({("a", "x"): np.ones(20), ("a", "y"): np.ones(20)})
    with pytest.raises(SettingsError, match="'a' names 2 contenders, must name one of a in x, a in y"):
        found.latency("a")
    assert found.ratio(("a", "x"), ("a", "y")).ratio == 1


def test_the_progress_bar_is_on_standard_error_only(capsys):
    lab = Lab()
    lab.measure(lab.contender("a", 1), calls=5, progress=True)
    said = capsys.readouterr()
    assert said.out == ""
    assert "measuring" in said.err


def test_files_are_measured_in_each_runtime_and_become_json(tiny_onnx, fixed_onnx):
    for runtime in ("onnxruntime", "openvino"):
        pytest.importorskip(runtime)
    settings = {"calls": 5, "discard": 1, "batch": 2}
    found = measure_files([tiny_onnx, fixed_onnx], ["onnxruntime", "openvino"], **settings)
    said = json.loads(json.dumps(found.to_json()))
    assert set(said["files"]) == {str(tiny_onnx), str(fixed_onnx)}
    for entry in said["files"].values():
        assert set(entry["latency_ms"]) == {"onnxruntime", "openvino"}
        for each in entry["latency_ms"].values():
            assert each["low"] <= each["median"] <= each["high"]
            assert (each["threads"], each["batch"]) == (1, 2)
        for runtime, each in entry["samples_per_s"].items():
            assert each["median"] == pytest.approx(2000 / entry["latency_ms"][runtime]["median"])
            assert each["low"] <= each["median"] <= each["high"]
            assert entry["warm_up"][runtime]["calls"] >= 20
            assert entry["energy"][runtime]["source"] in ("estimate", "counters")
        assert entry["load_ms"] > 0
        assert entry["first_ms"] > 0
        assert entry["peak_bytes"] > 0
        assert entry["footprint"]["onnxruntime"]["load_ms"] == entry["load_ms"]
    assert [(each["a"], each["b"], each["runtime"]) for each in said["ratios"]] == [
        (str(fixed_onnx), str(tiny_onnx), runtime) for runtime in ("onnxruntime", "openvino")
    ]
    for each in said["ratios"]:
        shown = "faster" if each["high"] < 1 else "slower" if each["low"] > 1 else "none shown"
        assert each["difference"] == shown
    assert said["machine"]["cpu"]


def test_real_inputs_are_used_and_files_that_cannot_be_measured_are_refused(tiny_onnx, fixed_onnx):
    pytest.importorskip("onnxruntime")
    x = np.ones((8, 3, 8, 8), np.float32)
    found = measure_files([tiny_onnx], x=x, batch=4, calls=5, discard=0)
    assert found.to_json()["files"][str(tiny_onnx)]["latency_ms"]["onnxruntime"]["batch"] == 4
    with pytest.raises(SettingsError, match="fixed batch of 2, so it cannot be measured with 1"):
        measure_files([fixed_onnx])
    with pytest.raises(SettingsError, match="as many inputs, got 8"):
        measure_files([tiny_onnx], x=x, batch=9)
    with pytest.raises(SettingsError, match=r"none of pytorch reads tiny\.onnx; onnxruntime does"):
        measure_files([tiny_onnx], ["pytorch"])
    with pytest.raises(SettingsError, match="no runtime 'tvm'"):
        measure_files([tiny_onnx], ["tvm"])


def test_the_memory_of_a_file_grows_with_its_weights(tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from onnx import TensorProto, helper

    def save(side: int):
        """x (N, side) -> x @ weight: `side` squared floats."""
        weight = helper.make_tensor(
            "w", TensorProto.FLOAT, (side, side), np.ones(side * side, "<f4").tobytes(), raw=True
        )
        shape = ["n", side]
        graph = helper.make_graph(
            [helper.make_node("MatMul", ["x", "w"], ["y"])],
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
            [weight],
        )
        path = tmp_path / f"{side}.onnx"
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
        return path

    found = measure_files([save(side) for side in (64, 2048)], calls=5, discard=0)
    small, large = found.footprints.values()
    if small.peak_bytes is None:
        pytest.skip("this system does not tell the memory of a process")
    weights = 4 * 2048 * 2048
    assert weights <= large.peak_bytes - small.peak_bytes <= 4 * weights
    assert small.peak_bytes < weights


def test_a_missing_runtime_is_named(tiny_onnx, tmp_path, monkeypatch):
    (tmp_path / "openvino.py").write_text("raise ModuleNotFoundError('no', name='openvino')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(MissingExtra, match=r"tersenet\[openvino\]"):
        measure_files([tiny_onnx], ["openvino"])
