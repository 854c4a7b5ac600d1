"""The paths of docs/first-steps.md, typed exactly as they stand there: files verified, scores as the page says.

Another processor trains another network in the last digits, so scores may be some points from the page's; the first row
must be the score that the user's own code gives, and int8 must keep it.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

PAGE = (Path(__file__).parents[1] / "docs" / "first-steps.md").read_text(encoding="utf-8")
SHARED = Path(__file__).parents[2] / "shared" / "data"
MAIN = "from tersenet.cli import main; main()"
SCORE = re.compile(r"(\d+\.\d+) %")


def section(title: str) -> str:
    """The text under a heading of the page."""
    return re.split(r"^## ", PAGE.split(f"## {title}", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def typed(line: str, folder: Path) -> str:
    """What a command line, or Python code of several lines, prints on both channels; its warnings come first."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TERSENET_CACHE": str(folder / "cache"), "COLUMNS": "100"}
    command = line.split()[0]
    if command == "tersenet":
        arguments = [sys.executable, "-c", MAIN, *shlex.split(line)[1:]]
    elif command == "python":
        arguments = [sys.executable, *shlex.split(line)[1:]]
    else:
        arguments = [sys.executable, "-c", line]
    done = subprocess.run(arguments, cwd=folder, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stderr + done.stdout


def compared(shown: str, printed: str, points: float) -> list[float]:
    """Holds what is printed to what the page shows, line by line: "..." stands for anything, sizes are within a tenth
    and percentages within so many points. The percentages that were printed, in the order of the page."""
    left, scores, anywhere = printed.splitlines(), [], False
    for line in shown.splitlines():
        if line == "...":
            anywhere = True
            continue
        matched = [_agrees(line, real, points) for real in (left if anywhere else left[:1])]
        at = next((at for at, found in enumerate(matched) if found is not None), None)
        assert at is not None, f"the page says {line!r}, and nothing like it is printed here:\n" + "\n".join(left)
        scores += matched[at] or []
        left, anywhere = left[at + 1 :], False
    return scores


def _agrees(line: str, real: str, points: float) -> list[float] | None:
    pattern = r"\s+".join(re.escape(word) for word in line.split())
    pattern = pattern.replace(re.escape("..."), ".*")
    pattern = re.sub(r"(\d+)\\\.(\d+)\\s\+%", r"(\\d+\\.\\d+)\\s+%", pattern)
    pattern = re.sub(r"[\d,]+\\s\+bytes", r"([\\d,]+)\\s+bytes", pattern)
    match = re.fullmatch(pattern, real.strip())
    if match is None:
        return None
    wanted = [float(value) for value in SCORE.findall(line)]
    scores = [float(value) for value in match.groups() if "." in value]
    sizes = [int(value.replace(",", "")) for value in match.groups() if "." not in value]
    size = [int(value.replace(",", "")) for value in re.findall(r"([\d,]+) bytes", line)]
    near = all(abs(a - b) <= points for a, b in zip(wanted, scores, strict=True))
    return scores if near and all(abs(a - b) <= 0.1 * a for a, b in zip(size, sizes, strict=True)) else None


def follow(title: str, folder: Path, points: float) -> list[float]:
    """Types the lines of a section's console blocks and compares what they print; the scores that were printed."""
    scores = []
    for block in blocks(section(title), "console"):
        lines = re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", block, re.MULTILINE)
        assert 1 <= len(lines) <= 6
        for line, shown in lines:
            scores += compared(shown, typed(line, folder), points)
    return scores


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the user of the page has: images, and a network with its script."""
    folder = tmp_path_factory.mktemp("first steps")
    typed(blocks(PAGE, "python")[0], folder)
    network, script = blocks(section("Your PyTorch model"), "python")
    (folder / "mynet.py").write_text(network, encoding="utf-8")
    (folder / "train.py").write_text(script, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def trained(folder: Path) -> tuple[Path, float]:
    """The folder, and the score that the user's own script prints."""
    return folder, float(SCORE.findall(typed("python train.py", folder))[0])


def test_the_comparison_finds_what_differs() -> None:
    shown = "...\noriginal  98.33 % ...\n...\nmodel.onnx: 34,000 bytes, error ...\n"
    printed = "x\noriginal   97.50 %  1.2 M\n 96-98\nmodel.onnx: 34,043 bytes, error 1e-6\n"
    assert compared(shown, printed, 1.0) == [97.5]
    for other in (printed.replace("97.50", "90.00"), printed.replace("34,043", "90,043"), printed.replace("or", "er")):
        with pytest.raises(AssertionError, match="the page says"):
            compared(shown, other, 1.0)
    with pytest.raises(AssertionError, match="the page says 'a'"):
        compared("a\n", "b\na\n", 1.0)


@pytest.mark.minutes
def test_an_own_model_and_an_image_folder(folder: Path) -> None:
    own, original, int8, _ = follow("Your PyTorch model", folder, points=2.0)
    assert original == own
    assert abs(int8 - original) <= 1.0


@pytest.mark.minutes
def test_an_onnx_file_of_somebody_else(trained: tuple[Path, float]) -> None:
    folder, own = trained
    typed(
        'import torch, mynet\nnet = mynet.Net()\nnet.load_state_dict(torch.load("mynet.pth"))\n'
        'torch.onnx.export(net.eval(), (torch.zeros(1, 1, 8, 8),), "theirs.onnx", dynamo=True)\n',
        folder,
    )
    original, int8, theirs, ours = follow("An ONNX file of somebody else", folder, points=2.0)
    assert original == theirs == own
    assert ours == int8
    assert abs(int8 - original) <= 1.0


@pytest.mark.minutes
def test_own_data_loop_and_metric_in_python(trained: tuple[Path, float]) -> None:
    folder, own = trained
    text = section("Your own Dataset")
    work, lines = blocks(text, "python")
    (folder / "mywork.py").write_text(work, encoding="utf-8")
    assert len([line for line in lines.splitlines() if line.strip()]) <= 6
    (shown,) = blocks(text, "console")
    scores = compared(shown, typed(lines, folder).splitlines()[-1] + "\n", points=3.0)
    assert abs(scores[0] - own) < 1.0  # macro F1 of classes of one size is near the accuracy
    assert min(scores[2:]) > scores[0] - 2.0


@pytest.mark.slow
@pytest.mark.skipif(find_spec("timm") is None, reason="timm is not installed")
def test_a_network_of_timm(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERSENET_CACHE", str(folder / "cache"))
    own = train_timm(folder)
    original, int8 = follow("A network of timm", folder, points=8.0)
    assert abs(original - own) <= 0.3  # of 360 images one may be judged otherwise by another order of sums
    assert abs(int8 - original) <= 2.0


def train_timm(folder: Path) -> float:
    """Trains the network of the page on its images for a minute; its score by a plain loop."""
    import dataclasses

    import tersenet

    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the images are grey
        torch.manual_seed(0)
        net, preparation = tersenet.open_model("timm:mobilenetv3_small_100")
        net.reset_classifier(10)  # type: ignore[operator]
        prepared = dataclasses.replace(preparation, size=(32, 32))
        task = tersenet.open_task(net, prepared, f"folder:{folder / 'digit_images'}", quiet=True)
        optimizer = torch.optim.AdamW(net.parameters(), 3e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=120)
        batches = [batch for epoch in range(10) for batch in tersenet.task.batches_at(task.train, epoch)]
        for x, y in batches[:120]:
            optimizer.zero_grad()
            nn.functional.cross_entropy(net.train()(x), y).backward()
            optimizer.step()
            schedule.step()
        save_file(net.state_dict(), folder / "mobilenetv3.safetensors")
        net.eval()
        with torch.no_grad():
            right = torch.cat([net(x).argmax(1) == y for x, y in task.test])
    return 100 * float(right.float().mean())


@pytest.mark.slow
@pytest.mark.skipif(find_spec("timm") is None, reason="timm is not installed")
def test_efficientnet_lite0(tmp_path: Path) -> None:
    weights, images = SHARED / "weights" / "imagenet_efficientnet_lite0.safetensors", SHARED / "imagenet1000"
    if not weights.exists() or not images.exists():
        pytest.skip(f"the weights and images of the page are not in {SHARED}")
    shutil.copy(weights, tmp_path)
    shutil.copytree(images, tmp_path / "imagenet1000")
    original, int8 = follow("EfficientNet-Lite0", tmp_path, points=0.6)
    assert abs(original - 91.71) <= 0.15
    assert int8 >= 91.86 - 0.3  # ONNX Runtime's own quantizer has 91.86 %
