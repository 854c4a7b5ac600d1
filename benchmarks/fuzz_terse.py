"""Throws damaged and hostile .terse files at the readers, and says what came of it.

    python benchmarks/fuzz_terse.py [--files 100000] [--seed 0] [--add LOG.json] [--out LOG.json]

Small files of every codec, every form of numbers and one model are mutated: bits flipped, bytes set, pieces cut out,
doubled or copied from another file, numbers in the head replaced, and every truncation of one file. Most of them get
checksums and lengths that fit again, so that the decoders behind the checksums are reached. Each must load to exactly
the original weights or raise FileError, within a second of processor time, and take no more memory than 8 MiB and four
times the bytes that the file declares, an element counting as at least four: small integers are coded as the wider
numbers that models and arithmetic need. Anything else counts as a failure and is kept, base64, in the log. The work is
done in a process of its own: should it die, the log says at which file.
"""

from __future__ import annotations

import argparse
import base64
import collections
import hashlib
import json
import random
import resource
import struct
import subprocess
import sys
import tempfile
import time
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tersenet.codec import container, numbers
from tersenet.deploy.artifact import load_terse, save_terse
from tersenet.errors import FileError

SECONDS = 1.0
FLOOR = 8 << 20
TIMES = 4
_HEADER, _DIGEST = container.HEADER.size, 32


def corpus(folder: Path) -> dict[str, bytes]:
    """Small good files."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 6, 3, 3, generator=generator)
    smooth = (weight + weight.roll(1, -1)) / 1.4
    mixed: dict[str, Tensor] = {
        "float32": weight[:2], "float16": weight[0].half(), "bfloat16": weight[0].bfloat16(),
        "float64": weight[0, :2].double(), "int64": (weight[0] * 1000).long(), "int8": (weight * 30).to(torch.int8),
        "bool": weight > 0, "count": torch.tensor(7), "empty": torch.zeros(0, 3), "zeros": torch.zeros(50),
        "again": weight[:2].clone(), "grid": (smooth * 2).round() * 0.1 + 0.0,
        "rows": (smooth * 2).round() * torch.rand(8, 1, 1, 1, generator=generator) + 0.0,
        "book": torch.where(weight > 1, 0.3137, torch.where(weight < -1, -0.2111, 0.0)),
        "masked": weight.relu(), "linear": (torch.randn(20, 30, generator=generator) * 2).round(),
    }  # fmt: skip
    files = {"mixed": container.pack({"kind": "mixed"}, mixed)}
    sparse = (smooth * 3).round() * (torch.rand(weight.shape, generator=generator) > 0.7)
    for form in numbers.FORMS:
        if form != "constant":
            files[form] = container.pack({}, {"w": sparse.to(torch.int8), "l": mixed["linear"]}, forms=(form,))
    # Tensors of one shape, which are decoded side by side.
    for form, its in (("predicted", smooth), ("contexts", mixed["linear"])):
        alike = {f"w{i}": (its.roll(i, 0) * (0.5 + i)).round() for i in range(5)}
        files[f"{form}, side by side"] = container.pack({}, alike, forms=(form,))
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    )
    path = folder / "net.terse"
    save_terse(net.eval(), torch.zeros(2, 3, 8, 8), path)
    files["model"] = path.read_bytes()
    return files


def mutated(files: dict[str, bytes], chance: random.Random) -> tuple[str, str, bytes]:
    """(file, mutation, bytes)."""
    name = chance.choice(list(files))
    data = bytearray(files[name])
    kind = chance.choice(("bits", "bytes", "cut", "double", "splice", "head", "payload"))
    if kind == "head":
        return name, kind, _with_head(files[name], chance)
    for _ in range(chance.choice((1, 1, 1, 2, 4, 16))):
        start = 0 if kind != "payload" else _HEADER + int.from_bytes(files[name][16:20], "little")
        at = chance.randrange(start, len(data)) if chance.random() < 0.9 else chance.randrange(min(40, len(data)))
        length = chance.choice((1, 2, 4, 8, 64))
        if kind in ("bits", "payload"):
            data[at] ^= 1 << chance.randrange(8)
        elif kind == "bytes":
            data[at] = chance.choice((0, 1, 127, 128, 255, chance.randrange(256)))
        elif kind == "cut":
            del data[at : at + length]
        elif kind == "double":
            data[at:at] = data[at : at + length]
        else:
            other = files[chance.choice(list(files))]
            begin = chance.randrange(len(other))
            data[at : at + length] = other[begin : begin + length]
        if len(data) < 41:
            break
    if kind == "payload" or chance.random() < 0.6:
        return name, kind + ", resealed", resealed(bytes(data))
    return name, kind, bytes(data)


def _with_head(data: bytes, chance: random.Random) -> bytes:
    """Another number, word or character in the head, deflated and sealed again."""
    stored = int.from_bytes(data[16:20], "little")
    head = data[_HEADER : _HEADER + stored]
    text = zlib.decompress(head) if data[6] else head
    for _ in range(chance.choice((1, 1, 2, 3))):
        at = chance.randrange(len(text))
        if chance.random() < 0.7:  # the blobs and names, not the graph alone
            at = chance.randrange(min(len(text), 600))
        piece = chance.choice(
            (b"0", b"1", b"9", b"-", b"99", b"1000", b"65536", b"4294967296", b'"', b"[", b"]", b",", b"null", b"true",
             b"1e9", b'"raw"', b'"grid"', b'"numbers"', b'"codebook"', b'"floats"', bytes([chance.randrange(256)]))
        )  # fmt: skip
        text = text[:at] + piece + text[at + chance.choice((0, 1, 1, len(piece))) :]
    deflated = zlib.compress(text, 9)
    body = bytearray(data[:_HEADER]) + deflated + data[_HEADER + stored : -_DIGEST]
    body[6] = 1
    struct.pack_into("<II", body, 16, len(deflated), len(text))
    return resealed(bytes(body) + bytes(_DIGEST))


def resealed(data: bytes) -> bytes:
    """The same with lengths and checksums that fit."""
    if len(data) < _HEADER + _DIGEST:
        return data
    body = bytearray(data[:-_DIGEST])
    struct.pack_into("<Q", body, 8, len(data))
    (stored,) = struct.unpack_from("<I", body, 16)
    struct.pack_into("<I", body, 24, zlib.crc32(bytes(body[_HEADER : _HEADER + stored])))
    return bytes(body) + hashlib.sha256(body).digest()


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def tried(path: Path, data: bytes, model: bool, known: set[bytes]) -> tuple[str, float, int]:
    """What came of a file: "refused", "unchanged" or what is wrong; processor seconds; bytes at the peak."""
    path.write_bytes(data)
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    start = time.process_time()
    declared = 0
    try:
        if model:
            tensors = dict(load_terse(path).state_dict())
        else:
            tensors = container.read(path)[1]
        what = "unchanged" if all(bits(tensor) in known for tensor in tensors.values()) else "other weights"
    except FileError:
        what = "refused"
    except BaseException as error:  # noqa: BLE001  any other error is what this looks for
        what = f"{type(error).__name__}: {str(error)[:200]}"
    spent = time.process_time() - start
    peak = tracemalloc.get_traced_memory()[1] - before
    if spent > SECONDS:
        what = f"took {spent:.2f} s ({what})"
    elif peak > FLOOR:
        try:
            declared = sum(blob.count * max(4, blob.itemsize) for blob in container.inspect(path).blobs)
        except FileError:
            declared = 0
        if peak > FLOOR + TIMES * declared:
            what = f"took {peak} bytes for {declared} declared ({what})"
    return what, spent, peak


def work(files: int, seed: int, progress: Path) -> dict[str, Any]:
    counts: collections.Counter[str] = collections.Counter()
    kinds: collections.Counter[str] = collections.Counter()
    failures: list[dict[str, Any]] = []
    slowest, largest = 0.0, 0
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "x.terse"
        good = corpus(Path(scratch))
        known = {}
        for name, data in good.items():
            path.write_bytes(data)
            known[name] = {bits(tensor) for tensor in container.read(path)[1].values()}
            if name == "model":
                load_terse(path)
        chance = random.Random(seed)
        cuts = [("model", "truncated", good["model"][:i]) for i in range(len(good["model"]))]
        cuts += [
            ("mixed", "truncated, resealed", resealed(good["mixed"][:i])) for i in range(60, len(good["mixed"]), 3)
        ]
        tracemalloc.start()
        for index in range(files):
            name, kind, data = cuts[index] if seed == 0 and index < len(cuts) else mutated(good, chance)
            if index % 100 == 0:
                progress.write_text(str(index), encoding="utf-8")
            if data == good[name]:
                counts["not changed by the mutation"] += 1
                continue
            what, spent, peak = tried(path, data, name == "model", known[name])
            slowest, largest = max(slowest, spent), max(largest, peak)
            kinds[kind] += 1
            if what in ("refused", "unchanged"):
                counts[what] += 1
            else:
                counts["failures"] += 1
                failures.append({"file": name, "mutation": kind, "what": what, "data": base64.b64encode(data).decode()})
    return {
        "files": files, "seeds": [seed], "counts": dict(counts), "mutations": dict(sorted(kinds.items())),
        "slowest_s": round(slowest, 3), "largest_peak_bytes": largest,
        "resident_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "failures": failures,
    }  # fmt: skip


def together(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """Two runs as one."""
    joined = {key: a[key] + b[key] for key in ("files", "seeds", "failures")}
    for key in ("counts", "mutations"):
        joined[key] = {name: a[key].get(name, 0) + b[key].get(name, 0) for name in sorted({*a[key], *b[key]})}
    return joined | {key: max(a[key], b[key]) for key in ("slowest_s", "largest_peak_bytes", "resident_bytes")}


def fuzz(files: int, seed: int) -> dict[str, Any]:
    """`work` in a process of its own."""
    with tempfile.TemporaryDirectory() as scratch:
        progress, out = Path(scratch) / "progress", Path(scratch) / "out"
        command = [
            sys.executable,
            __file__,
            "--files",
            str(files),
            "--seed",
            str(seed),
            "--worker",
            str(progress),
            str(out),
        ]
        done = subprocess.run(command, check=False)
        if done.returncode:
            at = progress.read_text(encoding="utf-8") if progress.exists() else "the start"
            raise SystemExit(f"the reader's process ended with {done.returncode} soon after file {at} of seed {seed}")
        found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
        return found


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--add", type=Path, help="a log that this run is added to")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", nargs=2, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.worker is not None:
        found = work(options.files, options.seed, options.worker[0])
        options.worker[1].write_text(json.dumps(found), encoding="utf-8")
        return 0
    found = fuzz(options.files, options.seed)
    if options.add is not None and options.add.exists():
        found = together(json.loads(options.add.read_text(encoding="utf-8")), found)
    text = json.dumps(found, indent=1)
    if options.out is not None:
        options.out.write_text(text + "\n", encoding="utf-8")
    print(text)
    return 1 if found["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
