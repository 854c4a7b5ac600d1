"""Two processes train as one: the gradients are those of the whole batch, and both end with equal numbers."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from tersenet.task import Task
from tersenet.train import Train
from tersenet.train.batches import split

# Batches of 5, 4 and 1 samples: shares of unequal size, and a process without any.
SUBJECT = """
import os, sys
import torch
from torch import nn
from tersenet.task import Task
from tersenet.train import Train

torch.set_num_threads(1)
generator = torch.Generator().manual_seed(0)
x, y = torch.randn(10, 6, generator=generator), torch.randint(0, 3, (10,), generator=generator)
data = [(x[:5], y[:5]), (x[5:9], y[5:9]), (x[9:], y[9:])]


def net(norm=False):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8) if norm else nn.Tanh(), nn.Linear(8, 3))


def trained(norm, batches, **more):
    model = net(norm)
    task = Task(example=x[:2], train=batches, quiet=True, folder=more.pop("folder", None))
    Train(epochs=3, learning_rate=0.1, accelerator="cpu", clip=1.0, **more).fit(model, task)
    return model.state_dict()


if __name__ == "__main__":
    more = dict(devices=2, strategy="ddp", folder=sys.argv[1] + "/state")
    plain = trained(False, data, **more)
    # Only batches in which each process has two samples: a norm over one sample is an error.
    normed = trained(True, data[1:2], **more)
    torch.save([plain, normed], f"{sys.argv[1]}/rank{os.environ['LOCAL_RANK']}.pt")
"""


@pytest.mark.minutes
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs torch with gloo")
@pytest.mark.parametrize("launcher", ["torchrun", pytest.param("the script itself", marks=pytest.mark.slow)])
def test_two_processes_train_as_one(launcher: str, tmp_path: Path) -> None:
    script = tmp_path / "subject.py"
    script.write_text(SUBJECT, encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    start = [sys.executable]
    if launcher == "torchrun":
        start += [
            "-m",
            "torch.distributed.run",
            "--nproc-per-node=2",
            "--master-addr=127.0.0.1",
            f"--master-port={port}",
        ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    done = subprocess.run(
        [*start, str(script), str(tmp_path)], env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    for a, b in zip(first, second, strict=True):
        assert all(torch.equal(a[key], b[key]) for key in a), "both processes hold equal numbers, buffers too"

    space: dict = {"__name__": "subject"}
    exec(SUBJECT, space)
    one = space["trained"](False, space["data"])
    for key, value in one.items():
        assert torch.allclose(first[0][key], value, atol=1e-6), f"{key} differs from one process on whole batches"
    assert done.stderr.count("epoch 3/3") == 2, "only the first process writes"
    assert len(list((tmp_path / "state").glob("*.done.ckpt"))) == 2


def test_shares_are_disjoint_and_complete() -> None:
    x = torch.arange(5)
    boxes = [{"box": i} for i in range(5)]
    parts = [split((x, {"y": x * 2, "boxes": boxes, "size": torch.tensor(7)}), 5, rank, 2) for rank in (0, 1)]
    assert [part[0][0].tolist() for part in parts] == [[0, 2, 4], [1, 3]]
    assert [part[0][1]["y"].tolist() for part in parts] == [[0, 4, 8], [2, 6]]
    assert [[b["box"] for b in part[0][1]["boxes"]] for part in parts] == [[0, 2, 4], [1, 3]]
    assert all(part[0][1]["size"] == 7 for part in parts)
    assert [weight for _, weight in parts] == [3 * 2 / 5, 2 * 2 / 5]
    alone, weight = split([x[:1], x[:1]], 1, 1, 2)
    assert alone[0].tolist() == [0], "a process without samples works on one that counts for nothing"
    assert weight == 0


def test_one_process_is_not_wrapped_and_the_model_stays_itself() -> None:
    model = nn.Linear(4, 2)
    weight = model.weight
    data = [(torch.randn(3, 4), torch.tensor([0, 1, 0]))]
    Train(accelerator="cpu").fit(model, Task(example=data[0][0], train=data, quiet=True))
    assert model.weight is weight
    assert type(model) is nn.Linear
