from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tersenet.deploy import apart, worker
from tersenet.deploy.apart import Entry, Worker, cores_for, measure_apart
from tersenet.deploy.machine import usable_cores
from tersenet.errors import DataError, FileError, SettingsError

pins = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system does not pin")
FEW = {"calls": 5, "discard": 0}


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.fixture
def entry(tiny_onnx: Path) -> Entry:
    pytest.importorskip("onnxruntime")
    return Entry("tiny", tiny_onnx, "onnxruntime")


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Worker]:
    """The workers that were started."""
    found = []
    enter = Worker.__enter__
    monkeypatch.setattr(Worker, "__enter__", lambda self: found.append(self) or enter(self))
    return found


def test_files_take_turns_in_processes_that_are_gone_afterwards(entry: Entry, started: list[Worker]) -> None:
    other = entry._replace(name="again")
    found = measure_apart([entry, other], turns=21, **FEW)
    assert {key: len(values) for key, values in found.turns.items()} == {entry.key: 21, other.key: 21}
    assert all((values > 0).all() for values in found.turns.values())
    assert set(found.footprints) == set(found.warmed) == set(found.energies) == {entry.key, other.key}
    assert len({each.process.pid for each in started}) == 2
    assert all(gone(each.process.pid) for each in started)


def test_turns_are_shared_out_over_openings_in_new_processes(entry: Entry, started: list[Worker]) -> None:
    other = entry._replace(name="again")
    found = measure_apart([entry, other], turns=20, openings=3, **FEW)
    assert {key: len(values) for key, values in found.turns.items()} == {entry.key: 21, other.key: 21}
    assert len({each.process.pid for each in started}) == 6
    assert list(found.turns) == [entry.key, other.key]
    assert found.openings == found.to_json()["openings"] == 3
    for wrong in (0, 11):
        with pytest.raises(SettingsError, match=r"openings must lie in 1\.\.10"):
            measure_apart([entry], turns=20, openings=wrong)


def test_only_one_works_at_a_time_and_the_order_is_shuffled(entry: Entry, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    ask = Worker.ask

    def noted(self: Worker, do: str, **more: object) -> object:
        asked.append((self.entry.name, do))
        answer = ask(self, do, **more)
        asked.append((self.entry.name, "answered"))
        return answer

    monkeypatch.setattr(Worker, "ask", noted)
    names = ("a", "b", "c")
    measure_apart([entry._replace(name=name) for name in names], **FEW)
    assert all(
        said == "answered" and who == before for (before, _), (who, said) in zip(asked[::2], asked[1::2], strict=True)
    )
    turns = [name for name, do in asked if do == "turn"]
    rounds = [tuple(turns[i : i + 3]) for i in range(0, len(turns), 3)]
    assert len(rounds) == 20
    assert all(sorted(each) == list(names) for each in rounds)
    assert len(set(rounds)) > 2


@pins
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_worker_and_its_threads_keep_to_the_cores(entry: Entry, runtime: str) -> None:
    pytest.importorskip(runtime)
    before = os.sched_getaffinity(0)
    cores = cores_for(1)
    assert cores == (max(before),)
    with Worker(entry._replace(runtime=runtime), cores) as opened:
        opened.ask("open", path=str(entry.path), runtime=runtime, threads=1)
        threads = [int(each) for each in os.listdir(f"/proc/{opened.process.pid}/task")]
        assert {frozenset(os.sched_getaffinity(each)) for each in threads} == {frozenset(cores)}
    assert os.sched_getaffinity(0) == before


@pins
def test_the_cores_are_taken_before_anything_of_ours_or_a_runtime_is_imported() -> None:
    code = (
        "import os, sys, tersenet.deploy.worker as w\n"
        "def pin(*_):\n"
        "    print(sorted({'numpy', 'torch', 'onnxruntime', 'openvino'} & set(sys.modules))); sys.exit()\n"
        "os.sched_setaffinity = pin; sys.argv = ['w', '0']; w.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_more_threads_than_cores_are_refused_before_anything_starts(entry: Entry, started: list[Worker]) -> None:
    cores = usable_cores()
    with pytest.raises(
        SettingsError, match=rf"^{cores + 1} threads were asked for, but this process may use {cores} c"
    ):
        measure_apart([entry], threads=cores + 1)
    assert started == []
    assert len(cores_for(cores)) in (0, cores)


def test_a_process_that_is_killed_is_one_sentence(
    entry: Entry, started: list[Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = Worker.ask

    def killed(self: Worker, do: str, **more: object) -> object:
        if do == "turn":
            os.kill(self.process.pid, signal.SIGKILL)
        return ask(self, do, **more)

    monkeypatch.setattr(Worker, "ask", killed)
    with pytest.raises(
        FileError, match=r"tiny\.onnx in onnxruntime was killed by SIGKILL .*enough memory\?$"
    ) as caught:
        measure_apart([entry, entry._replace(name="b")], **FEW)
    assert "\n" not in str(caught.value)
    assert all(gone(each.process.pid) for each in started)


def test_what_a_dying_process_said_last_is_told(entry: Entry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "onnxruntime.py").write_text("import os, sys; print('out of luck', file=sys.stderr); os._exit(3)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(FileError, match=r"ended with code 3 while it was opened \(it said last: out of luck\)"):
        measure_apart([entry])


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_interrupt_leaves_no_process(
    entry: Entry, started: list[Worker], monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(apart, "play", stop)
    with pytest.raises(error):
        measure_apart([entry, entry._replace(name="b")])
    assert len(started) == 2
    assert all(gone(each.process.pid) for each in started)


def test_a_worker_ends_when_nobody_is_left_to_ask(entry: Entry) -> None:
    """Also when its parent was killed and could tidy nothing."""
    code = (
        "import os, sys; from pathlib import Path; from tersenet.deploy.apart import Entry, Worker\n"
        "w = Worker(Entry('a', Path('a.onnx'), 'onnxruntime'), ()).__enter__()\n"
        "print(w.process.pid, flush=True); os._exit(0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    pid, until = int(done.stdout), time.monotonic() + 30
    while not gone(pid) and time.monotonic() < until:
        if Path(f"/proc/{pid}/stat").exists() and Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z":
            break  # ended; whoever adopted it has not looked yet
        time.sleep(0.05)
    else:
        assert gone(pid)


def test_errors_keep_their_class_and_their_sentence(entry: Entry, tmp_path: Path) -> None:
    with pytest.raises(FileError, match="there is no file"):
        measure_apart([entry._replace(path=tmp_path / "none.onnx")])
    with pytest.raises(DataError, match="must be Nx3x8x8, got 1x2x8x8"):
        measure_apart([entry], x=np.zeros((1, 2, 8, 8), np.float32))
    with pytest.raises(SettingsError, match="nothing to measure"):
        measure_apart([])
    with pytest.raises(SettingsError, match="same name and runtime"):
        measure_apart([entry, entry])
    with pytest.raises(SettingsError, match="must be at least"):
        measure_apart([entry], turns=3)


def test_the_protocol_is_lines_of_json_and_survives_an_error(entry: Entry, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros((2, 3, 8, 8), np.float32))
    requests = [
        {"do": "open", "path": str(tmp_path / "none.onnx"), "runtime": "onnxruntime", "threads": 1},
        {"do": "open", "path": str(entry.path), "runtime": "onnxruntime", "threads": 1},
        {"do": "input", "file": str(tmp_path / "x.npy")},
        {"do": "turn", "discard": 1, "calls": 4},
    ]
    answers = io.StringIO()
    worker.serve(io.StringIO("".join(json.dumps(each) + "\n" for each in requests)), answers)
    wrong, opened, first, turn = map(json.loads, answers.getvalue().splitlines())
    assert wrong["error"] == "FileError"
    assert [shape for _, shape, _ in opened["inputs"]] == [[None, 3, 8, 8]]
    assert first["first_ms"] > 0
    assert len(turn["ns"]) == 4
    assert min(turn["ns"]) > 0


def test_energy_is_that_of_the_counters_where_they_can_be_read(entry: Entry, monkeypatch: pytest.MonkeyPatch) -> None:
    ask = Worker.ask

    def counted(self: Worker, do: str, **more: object) -> dict[str, object]:
        answer = ask(self, do, **more)
        return {**answer, **{"input": {"counted": True}, "turn": {"joules": 0.25}}.get(do, {})}

    monkeypatch.setattr(Worker, "ask", counted)
    energy = measure_apart([entry], **FEW).energies[entry.key]
    assert (energy.joules, energy.low, energy.high, energy.source) == (0.25, 0.25, 0.25, "counters")
