"""A run killed with SIGKILL at random moments, steps and training included, ends with the same bits."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

CODE = """
import sys, warnings
warnings.simplefilter("ignore")
from pathlib import Path
import torch
torch.set_num_threads(1)
from tersenet import models
from tersenet.job import compress
from tersenet.recipe import Recipe
from tersenet.sources import open_task
torch.manual_seed(0)
model = models.build("digits").eval()
task = open_task(model, models.REFERENCES["digits"].preparation, "digits", batch_size=64, quiet=True)
recipe = Recipe.parse('''
steps:
- train: {epochs: 2, save_every_s: 0.2, learning_rate: 0.05}
- prune_channels: {sparsity: 0.5, multiple_of: 16}
- train: {epochs: 2, save_every_s: 0.2, with: [{soft_targets: {}}]}
- fold_batch_norm
- quantize
''')
print("started", flush=True)
compress(model, task, recipe, out=Path(sys.argv[1]))
"""


def start(folder: Path) -> subprocess.Popen:
    process = subprocess.Popen([sys.executable, "-c", CODE, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process.stdout as said:
        assert said.readline() == "started\n"
    return process


def same(a: Path, b: Path) -> bool:
    expected, got = (load_file(folder / "05-quantize.safetensors") for folder in (a, b))
    return expected.keys() == got.keys() and all(torch.equal(expected[key], got[key]) for key in expected)


@pytest.mark.minutes
def test_killed_at_ten_random_moments(tmp_path: Path) -> None:
    began = time.monotonic()
    assert start(tmp_path / "whole").wait() == 0
    whole = time.monotonic() - began
    chance = random.Random(2026)
    kills, runs = 0, 0
    while kills < 10:
        process = start(tmp_path / f"cut{runs}")
        try:
            # A share of the whole run's time, so that the kills fall into steps, trainings and exports alike.
            process.wait(timeout=chance.uniform(0.02, 0.25) * whole)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
        else:
            assert process.returncode == 0
            assert same(tmp_path / "whole", tmp_path / f"cut{runs}"), "the final weights differ"
            runs += 1
    assert start(tmp_path / f"cut{runs}").wait() == 0
    assert same(tmp_path / "whole", tmp_path / f"cut{runs}"), "the final weights differ"
