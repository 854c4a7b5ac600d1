"""What machine this is and what it can do, in words: stands beside every measurement, and is what `doctor` prints.

Nothing that names the machine or its owner is read: no host name, no user, no path.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tersenet.report.words import bytes_text

if TYPE_CHECKING:
    from rich.console import Group

# What decides how fast small integers and short floats are; /proc/cpuinfo's spelling, and macOS' beside it.
_FLAGS = {
    "avx2": "avx2",
    "avx_vnni": "avx_vnni",
    "avx512f": "avx512f",
    "avx512_vnni": "avx512_vnni",
    "avx512_bf16": "avx512_bf16",
    "amx_int8": "amx_int8",
    "amx_bf16": "amx_bf16",
    "asimd": "neon",
    "neon": "neon",
    "asimddp": "dotprod",
    "i8mm": "i8mm",
    "hw.optional.arm.FEAT_DotProd": "dotprod",
    "hw.optional.arm.FEAT_I8MM": "i8mm",
    "hw.optional.neon": "neon",
    "hw.optional.avx2_0": "avx2",
    "hw.optional.avx512f": "avx512f",
}
_PACKAGES = ("tersenet", "torch", "numpy", "onnx", "onnxscript", "onnxruntime", "openvino")
_NOT_FOR_USERS = ("test", "dev", "bench")


def machine() -> dict[str, Any]:
    """The machine as JSON: `cpu`, `cores` (usable by this process), `flags`, `virtual`, `memory_bytes`, `os`, `python`,
    and `packages` (version, or None where not installed)."""
    said = _cpuinfo()
    flags = sorted({_FLAGS[flag] for flag in said["flags"] if flag in _FLAGS})
    return {
        "cpu": said["model"] or platform.processor() or platform.machine(),
        "architecture": platform.machine(),
        "cores": usable_cores(),
        "flags": flags,
        "virtual": "hypervisor" in said["flags"],
        "memory_bytes": _memory(),
        "os": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
    }


def usable_cores() -> int:
    """How many cores this process may use, which in a container is fewer than the machine has."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


def doctor() -> dict[str, Any]:
    """The machine, verdicts in words on what pays on it, and each extra with the command that installs it.

    `extras` maps a name to {"installed": bool, "packages": {name: version or None}, "install": command or None}.
    """
    here = machine()
    extras = {name: _extra(packages) for name, packages in _extras().items()}
    for name, entry in extras.items():
        entry["install"] = None if entry["installed"] else f'pip install "tersenet[{name}]"'
    missing = [name for name, entry in extras.items() if not entry["installed"]]
    verdicts = [*_verdicts(here)]
    if missing:
        verdicts.append(f"Not installed: {', '.join(missing)}; what needs one of them says so.")
    else:
        verdicts.append("Every extra is installed.")
    return {"machine": here, "verdicts": verdicts, "extras": extras}


def doctor_table(found: dict[str, Any]) -> Group:
    """The same for a terminal; with the figures of `tersenet.deploy.causes.figures` where `roofline` has them."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    here = found["machine"]
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for title in ("extra", "packages", "install with"):
        table.add_column(title)
    for name, entry in found["extras"].items():
        packages = ", ".join(f"{package} {version or 'missing'}" for package, version in entry["packages"].items())
        table.add_row(name, packages, Text(entry["install"] or "installed"))  # Text: brackets are no markup here
    core = ", ".join(f"{name} {here['packages'][name]}" for name in ("tersenet", "torch", "numpy"))
    lines = [f"{here['cpu']}, {here['os']}, Python {here['python']}", core, *found["verdicts"]]
    if "roofline" in found:
        lines.append(f"{roofline_line(found['roofline'])}.")
    return Group(*(Text(line) for line in [*lines, ""]), table)


def roofline_line(figures: dict[str, Any]) -> str:
    """The measured roofline in a sentence."""
    peaks = " and ".join(f"{value:,.0f} in {name}" for name, value in figures["peak_gflops"].items())
    threads = f"{figures['threads']} thread{'s' if figures['threads'] > 1 else ''}"
    return (
        f"Measured roof with {threads}: {peaks} (GFLOP/s); {figures['memory_gb_s']:.0f} GB/s from memory, "
        f"{figures['cache_gb_s']:.0f} from the {bytes_text(figures['cache_bytes'])} cache"
    )


def _verdicts(here: dict[str, Any]) -> list[str]:
    """What the instruction set means for a compressed model.

    The figures come from one core of a Xeon with AVX-512 VNNI and no AMX; another machine must be measured.
    """
    flags = set(here["flags"])
    said = []
    if "amx_int8" in flags:
        said.append("int8 pays: the CPU has AMX tiles for it; convolutions gain most, small layers less.")
    elif flags & {"avx512_vnni", "avx_vnni"}:
        said.append("int8 pays: the CPU has VNNI, with which small networks ran 2 to 4 times faster than in float32.")
    elif flags & {"dotprod", "i8mm"}:
        said.append("int8 pays: the CPU has int8 dot products.")
    elif "avx2" in flags:
        said.append(
            "int8 pays little and needs care: AVX2 without VNNI sums pairs of products in 16 bits, which can overflow; "
            "compare the score in the runtime."
        )
    else:
        said.append("int8 saves bytes; no int8 instructions were found, so measure before counting on speed.")
    if "amx_bf16" in flags:
        said.append("bfloat16 pays: the CPU has AMX tiles for it.")
    elif "avx512_bf16" in flags:
        said.append("bfloat16 without AMX can be slower than float32 (1.7 to 2.2 times on one Xeon): measure it first.")
    said.append(f"{here['cores']} {'core' if here['cores'] == 1 else 'cores'} can be used.")
    if here["virtual"]:
        said.append("This is a virtual machine: its neighbours can disturb timings, so read their intervals.")
    return said


def _cpuinfo() -> dict[str, Any]:
    """{"model": name of the CPU, "flags": set of words}."""
    system = platform.system()
    if system == "Linux":
        try:
            text = Path("/proc/cpuinfo").read_text(errors="replace")
        except OSError:
            text = ""
        return _parse_cpuinfo(text)
    if system == "Darwin":
        text = _output(["sysctl", "machdep.cpu.brand_string", "hw.optional"])
        pairs = dict(line.split(": ", 1) for line in text.splitlines() if ": " in line)
        flags = {name for name, value in pairs.items() if value.strip() == "1"}
        return {"model": pairs.get("machdep.cpu.brand_string", ""), "flags": flags}
    return {"model": "", "flags": set()}


def _parse_cpuinfo(text: str) -> dict[str, Any]:
    model = re.search(r"^(?:model name|Model|Hardware)\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    return {"model": model[1].strip() if model else "", "flags": set(flags[1].split()) if flags else set()}


def _memory() -> int | None:
    if platform.system() == "Darwin":
        text = _output(["sysctl", "-n", "hw.memsize"]).strip()
        return int(text) if text.isdigit() else None
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=False).stdout
    except OSError:
        return ""


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _extras() -> dict[str, list[str]]:
    """Extra -> the packages that it installs, read from the installed tersenet, so that it cannot drift from it."""
    direct: dict[str, list[str]] = {}
    nested: dict[str, list[str]] = {}
    for line in metadata.requires("tersenet") or []:
        match = re.match(r"([\w.-]+)(?:\[([\w, -]+)\])?.*\bextra == ['\"]([\w-]+)['\"]", line)
        if not match:
            continue
        package, inner, extra = match[1], match[2], match[3]
        if package == "tersenet":
            nested.setdefault(extra, []).extend(name.strip() for name in (inner or "").split(","))
        else:
            direct.setdefault(extra, []).append(package)

    def packages(extra: str) -> list[str]:
        return [*direct.get(extra, []), *(name for inner in nested.get(extra, []) for name in packages(inner))]

    return {name: packages(name) for name in sorted({*direct, *nested}) if name not in _NOT_FOR_USERS}


def _extra(packages: list[str]) -> dict[str, Any]:
    versions = {name: _version(name) for name in packages}
    return {"installed": all(versions.values()), "packages": versions}
