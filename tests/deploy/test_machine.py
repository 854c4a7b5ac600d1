from __future__ import annotations

import getpass
import json
import platform
import socket
from importlib import metadata
from pathlib import Path

import pytest
from rich.console import Console

from tersenet.deploy import machine as room
from tersenet.deploy.machine import _parse_cpuinfo, _verdicts, doctor, doctor_table, machine, usable_cores


def test_the_machine_is_described_and_not_named():
    found = machine()
    said = json.dumps(found)
    assert found["cpu"]
    assert found["cores"] == usable_cores() >= 1
    assert found["python"] == platform.python_version()
    assert found["packages"]["torch"] == metadata.version("torch")
    assert found["memory_bytes"] is None or found["memory_bytes"] > 2**28
    assert socket.gethostname() not in said
    assert str(Path.home()) not in said
    user = getpass.getuser()
    assert len(user) < 4 or user not in said


INTEL = "model name\t: Intel(R) Xeon(R)\nflags\t\t: fpu avx2 avx512f avx512_vnni amx_int8 amx_bf16 hypervisor\n"
ARM = "processor\t: 0\nFeatures\t: fp asimd asimddp i8mm\nCPU part\t: 0xd0c\n"


def test_cpuinfo_of_two_architectures():
    assert _parse_cpuinfo(INTEL)["model"] == "Intel(R) Xeon(R)"
    assert {"amx_int8", "hypervisor"} <= _parse_cpuinfo(INTEL)["flags"]
    assert _parse_cpuinfo(ARM) == {"model": "", "flags": {"fp", "asimd", "asimddp", "i8mm"}}
    assert _parse_cpuinfo("") == {"model": "", "flags": set()}


def test_flags_are_translated_to_one_spelling(monkeypatch):
    monkeypatch.setattr(room, "_cpuinfo", lambda: _parse_cpuinfo(ARM))
    assert machine()["flags"] == ["dotprod", "i8mm", "neon"]
    monkeypatch.setattr(room, "_cpuinfo", lambda: _parse_cpuinfo(INTEL))
    found = machine()
    assert found["flags"] == ["amx_bf16", "amx_int8", "avx2", "avx512_vnni", "avx512f"]
    assert found["virtual"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["amx_int8", "avx512_vnni"], "int8 pays: the CPU has AMX"),
        (["avx512_vnni", "avx2"], "int8 pays: the CPU has VNNI"),
        (["neon", "dotprod"], "int8 pays: the CPU has int8 dot products"),
        (["avx2"], "int8 pays little and needs care"),
        ([], "int8 saves bytes"),
        (["avx512_bf16", "avx512_vnni"], "bfloat16 without AMX can be slower"),
        (["amx_bf16", "avx512_bf16"], "bfloat16 pays"),
    ],
)
def test_what_the_instructions_mean_in_words(flags, said):
    verdicts = _verdicts({"flags": flags, "cores": 1, "virtual": False})
    assert any(each.startswith(said) for each in verdicts)
    assert "1 core can be used." in verdicts
    assert not any("virtual" in each for each in verdicts)
    assert any("virtual" in each for each in _verdicts({"flags": flags, "cores": 2, "virtual": True}))


def test_doctor_names_the_missing_extras_and_how_to_install_them(monkeypatch):
    requires = [
        "torch>=2.9",
        'onnx>=1.18; extra == "onnx"',
        'onnxruntime>=1.22; python_version > "3" and extra == "onnx"',
        'kornia>=0.8; extra == "data"',
        'tersenet[onnx,data]; extra == "demo"',
        'scikit-learn>=1.4; extra == "demo"',
        'pytest>=8; extra == "test"',
    ]
    monkeypatch.setattr(room.metadata, "requires", lambda name: requires)
    monkeypatch.setattr(room, "_version", lambda name: None if name == "kornia" else "1.0")
    found = doctor()
    assert set(found["extras"]) == {"onnx", "data", "demo"}
    assert found["extras"]["onnx"] == {
        "installed": True, "packages": {"onnx": "1.0", "onnxruntime": "1.0"}, "install": None,
    }  # fmt: skip
    assert set(found["extras"]["demo"]["packages"]) == {"scikit-learn", "onnx", "onnxruntime", "kornia"}
    assert found["extras"]["data"]["install"] == 'pip install "tersenet[data]"'
    assert found["extras"]["demo"]["install"] == 'pip install "tersenet[demo]"'
    assert found["verdicts"][-1].startswith("Not installed: data, demo;")


def test_the_table_keeps_the_brackets_of_the_command(capsys, monkeypatch):
    monkeypatch.setattr(room, "_version", lambda name: None if name == "openvino" else "1.0")
    Console(width=200).print(doctor_table(doctor()))
    said = capsys.readouterr().out
    assert 'pip install "tersenet[openvino]"' in said
    assert "openvino missing" in said


def test_doctor_here_is_json_and_knows_the_real_extras():
    found = json.loads(json.dumps(doctor()))
    assert {"onnx", "openvino", "search", "data"} <= set(found["extras"])
    assert not {"test", "dev"} & set(found["extras"])
