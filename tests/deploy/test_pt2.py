from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from tersenet.bricks.shortcut import PadShortcut
from tersenet.deploy.pt2 import export_pt2, read_pt2
from tersenet.errors import FileError, TersenetError, TraceError


class WithBrick(nn.Module):
    """A model of our own bricks: none of it may be needed to load the file. (N, 2, 4, 4) -> (N, 6, 2, 2)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3, stride=2, padding=1)
        self.shortcut = PadShortcut(2, 2, 2)
        self.register_buffer("levels", torch.arange(6, dtype=torch.int8))

    def forward(self, x):
        return torch.relu(self.conv(x) + self.shortcut(x)) * self.levels.float().view(1, -1, 1, 1)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    torch.manual_seed(0)
    model = WithBrick()
    path = export_pt2(model, torch.randn(1, 2, 4, 4), tmp_path_factory.mktemp("pt2") / "a.pt2", {"labels": "cat dog"})
    return model.eval(), path


def test_plain_torch_loads_it_and_gives_equal_outputs(saved, tmp_path):
    model, path = saved
    x = torch.randn(3, 2, 4, 4)
    torch.save((x, model(x).detach()), tmp_path / "io.pt")
    code = """
import sys, torch
x, expected = torch.load(sys.argv[2])
program = torch.export.load(sys.argv[1])
module = program.module()
assert torch.equal(module(x), expected)
assert torch.allclose(module(x[:1]), expected[:1], atol=1e-6)
assert program.state_dict["levels"].dtype is torch.int8
assert not [name for name in sys.modules if name.split(".")[0] == "tersenet"]
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(path), str(tmp_path / "io.pt")], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_we_read_it_back_with_shape_and_metadata(saved):
    model, path = saved
    module, shape, metadata = read_pt2(path)
    assert shape == (None, 2, 4, 4)
    assert metadata == {"labels": "cat dog"}
    x = torch.randn(4, 2, 4, 4)
    assert torch.equal(module(x), model(x))
    assert torch.equal(module(x[:1]), model(x[:1]))


def test_the_example_is_not_in_the_file(tmp_path):
    example = torch.full((64, 2, 4, 4), 0.123456)
    path = export_pt2(WithBrick(), example, tmp_path / "a.pt2")
    with zipfile.ZipFile(path) as archive:
        assert not any(example.numpy().tobytes()[:64] in archive.read(name) for name in archive.namelist())
    assert list(tmp_path.iterdir()) == [path]  # and no temporary file beside it


def test_a_failed_export_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "a.pt2"
    path.write_bytes(b"old")

    class Branches(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(TraceError):
        export_pt2(Branches(), torch.ones(2, 3), path)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(TersenetError, match="disk is full"):
        export_pt2(WithBrick(), torch.ones(1, 2, 4, 4), path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_says_nothing_of_the_machine_that_wrote_it(saved, tmp_path):
    """The same model gives the same bytes under any name, without paths of source files."""
    model, x = WithBrick(), torch.zeros(1, 2, 4, 4)
    one, two = (export_pt2(model, x, tmp_path / name) for name in ("another name.pt2", "b.pt2"))
    assert one.read_bytes() == two.read_bytes()
    with zipfile.ZipFile(saved[1]) as archive:
        assert not [name for name in archive.namelist() if str(Path(__file__).parent).encode() in archive.read(name)]


def rewrite(source: Path, target: Path, change) -> Path:
    """The archive with its records changed: `change` takes and gives {name: bytes}. Names without the root folder."""
    with zipfile.ZipFile(source) as archive:
        root = archive.namelist()[0].partition("/")[0]
        records = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for name, data in change(records).items():
            archive.writestr(f"{root}/{name}", data)
    return target


class Bomb:
    def __reduce__(self):
        return (Path.touch, (Path("exploded"),))


def model_json(edit):
    def change(records):
        graph = json.loads(records["models/model.json"])
        edit(graph)
        return {**records, "models/model.json": json.dumps(graph).encode()}

    return change


def _call(graph, target):
    next(node for node in graph["graph_module"]["graph"]["nodes"] if "relu" in node["target"])["target"] = target


def _size(graph, expression):
    values = graph["graph_module"]["graph"]["tensor_values"]
    next(size for value in values.values() for size in value["sizes"] if "as_expr" in size)["as_expr"]["expr_str"] = (
        expression
    )


HOSTILE = {
    "sample inputs": lambda r: {**r, "data/sample_inputs/model.pt": pickle.dumps(Bomb())},
    "legacy weights": lambda r: {**r, "data/weights/model.pt": pickle.dumps(Bomb())},
    "opaque constant": lambda r: {**r, "data/constants/opaque_obj_0": pickle.dumps(Bomb())},
    "compiled library": lambda r: {**r, "data/aotinductor/model/a.so": b""},
    "pickled weight": lambda r: {
        **r,
        "data/weights/weight_0": pickle.dumps(Bomb()),
        "data/weights/model_weights_config.json": r["data/weights/model_weights_config.json"].replace(
            b'"use_pickle": false', b'"use_pickle": true', 1
        ),
    },
    "operator": model_json(lambda g: _call(g, "torch.os.system")),
    "reads a file": model_json(lambda g: _call(g, "torch.ops.aten.from_file.default")),
    "size": model_json(lambda g: _size(g, "__import__('pathlib').Path('exploded').touch()")),
    "size without quotes": model_json(lambda g: _size(g, "exec(chr(112)+chr(97)+chr(115)+chr(115))")),
    "argument name": model_json(
        lambda g: g["graph_module"]["module_call_graph"][0]["signature"].update(
            forward_arg_names=["x=__import__('pathlib').Path('exploded').touch()"]
        )
    ),
}  # fmt: skip


@pytest.mark.parametrize("attack", HOSTILE)
def test_a_file_that_could_run_code_is_refused(saved, tmp_path, monkeypatch, attack):
    monkeypatch.chdir(tmp_path)
    path = rewrite(saved[1], tmp_path / "bad.pt2", HOSTILE[attack])
    with pytest.raises(FileError, match="is refused"):
        read_pt2(path)
    assert not Path("exploded").exists()


def test_code_in_the_guards_is_never_run(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    edit = model_json(lambda g: g.update(guards_code=["__import__('pathlib').Path('exploded').touch() or True"]))
    module, _, _ = read_pt2(rewrite(saved[1], tmp_path / "guards.pt2", edit))
    module(torch.zeros(2, 2, 4, 4))
    assert not Path("exploded").exists()


def test_an_untouched_rewrite_still_loads(saved, tmp_path):
    """The attacks above are refused for what they change, not for having been rewritten."""
    module, shape, _ = read_pt2(rewrite(saved[1], tmp_path / "same.pt2", lambda records: records))
    assert module(torch.zeros(1, *shape[1:])).shape[0] == 1


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_a_truncated_file_is_one_sentence(saved, tmp_path, share):
    data = saved[1].read_bytes()
    path = tmp_path / "cut.pt2"
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(FileError, match=r"cut\.pt2 is not a readable"):
        read_pt2(path)
    with pytest.raises(FileError, match="check the path"):
        read_pt2(tmp_path / "none.pt2")
