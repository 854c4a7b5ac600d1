"""What can be typed on the command line: the options that several commands share, and how their texts are read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tersenet.errors import SettingsError

if TYPE_CHECKING:
    from tersenet.preparations import Preparing

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="a name (resnet56), timm:NAME, torchvision:NAME, package.module:factory, FILE.pt2, FILE.terse or "
        "FILE.onnx (float)",
        show_default=False,
    ),
]
Weights = Annotated[
    Path | None,
    typer.Option(
        help="weights: .safetensors, .pt, .pth, .ckpt or .bin, read without running code; FILE#NAME takes one of "
        "several sets in it"
    ),
]
Data = Annotated[
    str | None, typer.Option(help="digits, parquet:DIR, folder:DIR, hf:NAME (downloads) or random:3x224x224")
]
Validate = Annotated[str | None, typer.Option(help="a held-out set to choose by, in the form of --data")]
RecipeFile = Annotated[Path | None, typer.Option("--recipe", help="a YAML file with the steps, or int8")]
Device = Annotated[str, typer.Option(help="where a target trains: auto, cpu, cuda or mps")]
MaxHours = Annotated[
    float | None, typer.Option(help="refuse a training that would take longer (the estimate is printed)")
]
Macs = Annotated[str | None, typer.Option(help="target: this share of the multiply-adds, such as 0.5x")]
Latency = Annotated[
    str | None,
    typer.Option(help="target: 0.25x of the original's float file in this runtime, or 3ms"),
]
Bytes = Annotated[str | None, typer.Option("--bytes", help="target: 0.1x of the original's float file, or 200000")]
Memory = Annotated[
    str | None, typer.Option(help="target: 0.5x of the memory that running the original's float file takes, or bytes")
]
TableFile = Annotated[
    Path | None, typer.Option("--table", help="a latency table filled on another device (tersenet table)")
]
MaxDrop = Annotated[float | None, typer.Option(help="target: at most this many points of score lost")]
Runtime = Annotated[
    str, typer.Option(help="onnxruntime, openvino or pytorch; several with commas, the first one counts")
]
Threads = Annotated[int, typer.Option(min=1, help="threads of the runtime")]
Batch = Annotated[int, typer.Option(min=1, help="batch for latency")]
Out = Annotated[Path, typer.Option(help="the run folder")]
Resume = Annotated[bool, typer.Option("--resume", help="refuse to start anew: there must be a run to go on with")]
Seed = Annotated[int, typer.Option(help="of everything that draws at random")]
Epochs = Annotated[int, typer.Option(min=0, help="training epochs that a target may use")]
Mean = Annotated[str | None, typer.Option(help="per channel, such as 0.485,0.456,0.406 (default: the model's)")]
Std = Annotated[str | None, typer.Option(help="per channel (default: the model's)")]
Resolutions = Annotated[
    str | None, typer.Option(help="sizes of inputs that a target may take instead of the model's, such as 192,160")
]
Interpolation = Annotated[
    str | None,
    typer.Option(help="how images are resized: nearest, bilinear, bicubic or lanczos (default: the model's)"),
]
Crop = Annotated[
    float | None,
    typer.Option(help="share of the resized image that is cut out as the input, such as 0.875 (default: the model's)"),
]
ImageSize = Annotated[str | None, typer.Option(help="such as 224 or 180x240 (default: the model's)")]
Columns = Annotated[str | None, typer.Option(help="image and label column, such as img,label (default: found)")]
OnBadImage = Annotated[str, typer.Option(help="skip or stop at an image that cannot be read")]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object on standard output")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="no progress on standard error")]


def names_in(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def pair_of(columns: str | None) -> tuple[str, str] | None:
    if columns is None:
        return None
    found = names_in(columns)
    if len(found) != 2:
        raise SettingsError(f"--columns is {columns!r}; give the image and the label column, such as img,label")
    return found[0], found[1]


def numbers_in(option: str, text: str | None) -> tuple[float, ...] | None:
    try:
        return None if text is None else tuple(float(part) for part in text.split(","))
    except ValueError:
        raise SettingsError(f"{option} is {text!r}; give numbers with commas, one per channel") from None


def preparing_of(
    mean: str | None = None,
    std: str | None = None,
    size: str | None = None,
    interpolation: str | None = None,
    crop: float | None = None,
) -> Preparing:
    """What was typed about how images become inputs."""
    from tersenet.preparations import Preparing

    return Preparing(numbers_in("--mean", mean), numbers_in("--std", std), size_of(size), interpolation, crop)


def size_of(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    parts = text.lower().split("x")
    if len(parts) not in (1, 2) or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise SettingsError(f"--image-size is {text!r}; give a size such as 224, or height x width such as 180x240")
    return int(parts[0]), int(parts[-1])
