"""A training that was cut goes on and ends with the same bits, or is refused with the reason."""

from __future__ import annotations

import copy
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tersenet.distill.soft_targets import SoftTargets
from tersenet.errors import RunError
from tersenet.step import Chain, Companion
from tersenet.task import Task
from tersenet.train import Train
from tersenet.train.checkpoint import Checkpoint

# What is trained, in these tests and in the processes that are killed: dropout, batch norm, momentum, a schedule, a
# shuffling loader whose augmentation draws at random, and a buffer that the state dict leaves out.
SUBJECT = '''
import sys, time
from pathlib import Path
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tersenet.task import Task
from tersenet.train import Train


class Noisy(Dataset):
    def __init__(self, pause=0.0):
        self.pause = pause
        self.x = torch.randn(48, 3, 6, 6, generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return 48

    def __getitem__(self, i):
        time.sleep(self.pause)
        return self.x[i] + 0.1 * torch.randn(3, 6, 6), i % 2


class Counting(nn.Module):
    """Scales by a running count that no state dict holds."""

    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(()), persistent=False)

    def forward(self, x):
        if self.training:
            self.count += 1
        return x * (1 + self.count / 100)


def net():
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), Counting(), nn.Dropout(0.3), nn.Flatten(), nn.Linear(64, 2)
    )


def data(pause=0.0):
    return DataLoader(Noisy(pause), batch_size=8, shuffle=True)


def step(**more):
    settings = dict(epochs=3, learning_rate=0.05, warmup=0.2, accelerator="cpu", save_every_s=0.0)
    return Train(**{**settings, **more})


if __name__ == "__main__":
    folder, out, optimizer = sys.argv[1:]
    torch.set_num_threads(1)
    model = net()
    task = Task(example=torch.zeros(2, 3, 6, 6), train=data(pause=0.01), folder=folder, quiet=True)
    step(optimizer=optimizer).fit(model, task)
    torch.save(model.state_dict(), out)
'''
_space: dict[str, Any] = {"__name__": "subject"}
exec(SUBJECT, _space)
net, data, step = _space["net"], _space["data"], _space["step"]


def task_of(folder: Path | None = None, **more: Any) -> Task:
    return Task(example=torch.zeros(2, 3, 6, 6), **{"train": CutAt(10**9), "folder": folder, "quiet": True, **more})


def numbers(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[key]) for key, value in a.items())


class Cut(Exception):
    """Stands for a power cut."""


class CutAt:
    """Data that is cut at its k-th batch, counted over all epochs."""

    def __init__(self, k: int) -> None:
        self.left, self.data = k, data()

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Any:
        for batch in self.data:
            if self.left == 0:
                raise Cut
            self.left -= 1
            yield batch


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_cut_at_any_batch_it_ends_with_the_same_bits(optimizer: str, tmp_path: Path) -> None:
    whole = net()
    step(optimizer=optimizer).fit(whole, task_of())
    for k in (1, 5, 6, 10, 17):
        folder = tmp_path / str(k)
        with pytest.raises(Cut):
            step(optimizer=optimizer).fit(net(), task_of(folder, train=CutAt(k)))
        model = net()
        step(optimizer=optimizer).fit(model, task_of(folder))
        assert equal(numbers(model), numbers(whole)), f"cut at batch {k}"


def test_data_that_can_start_anywhere_is_not_read_from_its_beginning(tmp_path: Path) -> None:
    class Indexed:
        """Batch i of epoch e is a function of (e, i)."""

        def __init__(self, cut: int = 99) -> None:
            self.asked: list[tuple[int, int]] = []
            self.cut = cut

        def __len__(self) -> int:
            return 6

        def __iter__(self) -> Any:
            return self.at(0)

        def at(self, epoch: int, start: int = 0) -> Any:
            for i in range(start, 6):
                if len(self.asked) == self.cut:
                    raise Cut
                self.asked.append((epoch, i))
                x = torch.full((4, 3, 6, 6), epoch + i / 6) + torch.randn(4, 3, 6, 6)
                if i == start:
                    torch.rand(5)  # opening the data draws too, and must not shift the dropout of that batch
                yield x, torch.arange(4) % 2

    whole = net()
    step().fit(whole, task_of(train=Indexed()))
    with pytest.raises(Cut):
        step().fit(net(), task_of(tmp_path, train=Indexed(cut=9)))
    model, rest = net(), Indexed()
    step().fit(model, task_of(tmp_path, train=rest))
    assert rest.asked[0] == (1, 3)
    assert equal(numbers(model), numbers(whole))


@pytest.mark.minutes
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_killed_at_random_moments_it_ends_with_the_same_bits(tmp_path: Path) -> None:
    script = tmp_path / "subject.py"
    script.write_text(SUBJECT, encoding="utf-8")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def start(folder: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, str(script), str(tmp_path / folder), str(tmp_path / f"{folder}.pt"), "sgd"]
        return subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)

    assert start("whole").wait(120) == 0
    chance, kills = random.Random(0), 0
    for _ in range(3):
        process = start("cut")
        # Waits for the process to write something of its own, then kills it a moment later.
        before = _stamp(tmp_path / "cut")
        while process.poll() is None and _stamp(tmp_path / "cut") == before:
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.2))
        process.kill()
        kills += process.wait(60) == -signal.SIGKILL
    assert kills >= 2, "the training was too short to be killed"
    assert start("cut").wait(120) == 0
    whole, cut = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("whole", "cut"))
    assert equal(whole, cut)


def _stamp(folder: Path) -> list[int]:
    return sorted(path.stat().st_mtime_ns for path in folder.glob("train-*.ckpt")) if folder.exists() else []


def test_a_finished_training_is_not_repeated_and_others_may_follow(tmp_path: Path) -> None:
    first, second = step(), step(learning_rate=0.01)
    whole, plan = Chain(steps=(first, second)).run(net(), task_of())
    with pytest.raises(Cut):  # 18 batches of the first, 5 of the second
        Chain(steps=(first, second)).run(net(), task_of(tmp_path, train=CutAt(23)))
    rest = CutAt(18 - 5 + 5)  # the loader is read again up to where the cut was, and the first training not at all
    model, _ = Chain(steps=(first, second)).run(net(), task_of(tmp_path, train=rest))
    assert plan == {}
    assert rest.left == 0
    assert equal(numbers(model), numbers(whole))
    assert len(list(tmp_path.glob("*.done.ckpt"))) == len(list(tmp_path.glob("*.ckpt"))) == 2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"learning_rate": 0.1}, r"learning_rate 0\.05 where it is now 0\.1"),
        ({"epochs": 4}, "epochs 3 where it is now 4"),
        ({"seed": 5}, "seed 0 where it is now 5"),
        ({"weights": True}, "a different value of 'starting weights'"),
        ({"original": True}, "a different value of 'original model'"),
        ({"companion": True}, r"companions \[\] where it is now \[companion \{\}\]"),
    ],
)
def test_another_training_is_refused_with_the_difference(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(Cut):
        step().fit(net(), task_of(tmp_path, train=CutAt(4)))
    model, settings = net(), {key: change[key] for key in ("learning_rate", "epochs") if key in change}
    if "weights" in change:
        model[6].bias.data += 1
    if "companion" in change:
        settings["companions"] = (Companion(),)
    more = {"original": net() if "original" in change else None, "seed": change.get("seed", 0)}
    with pytest.raises(RunError, match=said):
        step(**settings).fit(model, task_of(tmp_path, **more))


def test_a_name_that_stands_for_another_teacher_now_is_refused(tmp_path: Path) -> None:
    teachers, settings = {"a.terse": net()}, step(companions=(SoftTargets(teachers=("a.terse",)),))

    def task(**more: Any) -> Task:
        return task_of(tmp_path, open_model=lambda name: copy.deepcopy(teachers[name]), **more)

    with pytest.raises(Cut):
        settings.fit(net(), task(train=CutAt(4)))
    before = teachers["a.terse"]
    teachers["a.terse"] = net()
    teachers["a.terse"][6].bias.data += 1
    with pytest.raises(RunError, match=r"companions \[soft_targets \{.*teacher: .* where it is now "):
        settings.fit(net(), task())
    teachers["a.terse"] = before
    settings.fit(net(), task())


def test_what_is_only_watched_may_change(tmp_path: Path) -> None:
    with pytest.raises(Cut):
        step().fit(net(), task_of(tmp_path, train=CutAt(4)))
    rest = CutAt(18)
    step(save_every_s=60.0, logger="none").fit(net(), task_of(tmp_path, train=rest))
    assert rest.left == 0


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Cut):
        step().fit(net(), task_of(tmp_path, train=CutAt(4)))
    (path,) = tmp_path.glob("train-*.ckpt")
    whole = path.read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], b"x" * len(whole)):
        path.write_bytes(damaged)
        with pytest.raises(RunError, match=r"damaged.*delete it"):
            step().fit(net(), task_of(tmp_path))


def test_code_in_a_file_is_not_run(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return (Path(tmp_path / "sprung").touch, ())

    checkpoint = Checkpoint(tmp_path, {"a": "1"})
    torch.save({"fingerprint": {"a": "1"}, "trap": Trap()}, checkpoint.path)
    with pytest.raises(RunError, match="damaged"):
        checkpoint.read()
    assert not (tmp_path / "sprung").exists()


def test_a_write_that_fails_leaves_the_file_before_it(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path, {"a": "1"})
    checkpoint.write({"model": {}, "position": [0, 1]})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(OSError, match="large"):
            checkpoint.write({"model": {"w": torch.zeros(10000)}, "position": [0, 2]})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert checkpoint.read()["position"] == [0, 1]  # type: ignore[index]
    assert [path.name for path in tmp_path.iterdir()] == [checkpoint.path.name]


def test_without_a_folder_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Train(accelerator="cpu").fit(net(), task_of(None))
    assert not list(tmp_path.iterdir())
