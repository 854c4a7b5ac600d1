"""docs/operators.md from the results of operators.py: what is right everywhere in one list, the rest by reason."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

Row = dict[str, Any]
CHECKS = {
    "captured": "captured", "cut": "channels cut", "terse": "`.terse`", "pt2": "`.pt2`", "onnx": "ONNX", "int8": "int8",
}  # fmt: skip
RUNTIMES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
GROUPS = {
    "Layers: torch.nn": r"nn\.", "Functions: torch.nn.functional": r"F\.", "Functions: torch": r"torch\.\w+$",
    "Linear algebra, special functions, transforms": r"torch\.\w+\.", "Methods and operators of tensors": r"Tensor\.",
}  # fmt: skip
_HEAD = """# Operators

What each operator of PyTorch becomes: captured, pruned, quantized to int8 and exported. The list is PyTorch's own (the
classes of `torch.nn`, the functions of `torch.nn.functional`, and what `torch.overrides` says can be overridden).
Each stands with several settings of its arguments in a small network, between a convolution and a head:

- **captured**: the graph computes what the network does, at another batch size;
- **channels cut**: half of the channels before it are removed, and the network computes what the uncut one does with
  zeros in their places; or they are left alone, and the report says why;
- **`.terse`, `.pt2`, ONNX**: the file gives the network's outputs, ONNX in ONNX Runtime and in OpenVINO;
- **int8**: the ONNX file of the quantized network gives the outputs of its simulation in both runtimes.

Whatever is not right is refused in one sentence, and no such file is written. Measured with PyTorch {torch}, by
`python benchmarks/operators.py`; the log is `benchmarks/results/operators.json`.
"""


def page(log: dict[str, Any]) -> str:
    """The whole page."""
    rows: dict[str, Row] = log["rows"]
    tried = {key: row for key, row in rows.items() if "left_out" not in row}
    lines = [_HEAD.format(torch=log["torch"].partition("+")[0]), *_summary(tried)]
    for title, pattern in GROUPS.items():
        own = {key: row for key, row in tried.items() if re.match(pattern, name(key))}
        if own:
            lines += ["", f"## {title}", "", *_group(own)]
    lines += ["", "## Not tried", "", "| why | operators |", "|---|---|"]
    reasons = [*log["left_out"].items(), *((name(k), row["left_out"]) for k, row in rows.items() if "left_out" in row)]
    lines += [f"| {_cell(why)} | {_names(names)} |" for why, names in _by(reasons).items()]
    return "\n".join(lines) + "\n"


def name(key: str) -> str:
    """ "nn.Conv2d" of "nn.Conv2d(8, 6, 3) @image"."""
    return key.partition("(")[0]


def _summary(tried: dict[str, Row]) -> list[str]:
    lines = [f"| of {len(tried)} networks | right | left alone or refused | not run yet |", "|---|---|---|---|"]
    for check, title in CHECKS.items():
        done = [row[check] for row in tried.values() if check in row]
        right = sum(not _reasons(check, result) for result in done)
        lines.append(f"| {title} | {right} | {len(done) - right} | {len(tried) - len(done)} |")
    return lines


def _group(rows: dict[str, Row]) -> list[str]:
    found: list[tuple[str, str]] = []
    for key, row in rows.items():
        said = [(title, why) for check, title in CHECKS.items() for why in _reasons(check, row.get(check, "ok"))]
        same = {why for title, why in said if title == "captured"}
        found += [(key, f"{title} | {why}") for title, why in said if title == "captured" or why not in same]
    other = {key for key, _ in found}
    right = [one for one in dict.fromkeys(map(name, rows)) if not any(name(key) == one for key in other)]
    run = "everything" if all(check in row for row in rows.values() for check in CHECKS) else "all that has been run"
    lines = [f"Right in {run}, with all settings ({len(right)}): {_names(right)}.", ""]
    if found:
        lines += ["| | why | operators |", "|---|---|---|"]
        by_reason = _by([(_shown(key, rows), why) for key, why in found])
        order = [f"{title} |" for title in CHECKS.values()]
        for why in sorted(by_reason, key=lambda why: order.index(why.partition("|")[0] + "|")):
            title, _, reason = why.partition(" | ")
            lines.append(f"| {title} | {_cell(reason)} | {_names(by_reason[why])} |")
    return lines


def _shown(key: str, rows: dict[str, Row]) -> str:
    """The name, with its setting where there are several."""
    several = sum(name(other) == name(key) for other in rows) > 1
    return key.rpartition(" @")[0] if several else name(key)


def _reasons(check: str, result: Any) -> list[str]:
    """Why a result is not simply right."""
    if isinstance(result, dict):
        parts = {runtime: why for runtime, said in result.items() for why in _reasons(check, said)}
        if len(set(parts.values())) == 1 and len(parts) == len(RUNTIMES):
            return list(set(parts.values()))
        return [f"{RUNTIMES[runtime]}: {why}" for runtime, why in parts.items()]
    if result == "ok" or result.startswith("ok: off by"):
        return []
    return [_plain(result.removeprefix("ok: "))]


def _plain(said: str) -> str:
    """A sentence without the operator, line and figures, so that the same reason reads the same."""
    said = re.sub(r"^(left alone|refused): (quantize: )?", "", said)
    if found := re.search(
        r"runs, and its captured graph does not|fixes the batch|makes a tensor whose size depends", said
    ):
        return {"fixes": "the forward fixes the batch", "makes": "makes a tensor whose size depends on values"}.get(
            found.group().split()[0], "cannot be captured"
        )
    if "cannot be captured" in said:
        return "cannot be captured: " + said.rpartition(": ")[2]
    if "is not one that a .terse file may hold" in said or "a .terse file does not know" in said:
        return "is not one that a `.terse` file may hold"
    if found := re.search(r"does not agree with the model", said):
        return "the file would not agree with the model"
    if found := re.search(
        r"(could not be written as ONNX|was written as ONNX that does not hold to ONNX's rules)", said
    ):
        return "cannot be written as ONNX"
    if found := re.match(r"openvino cannot open|onnxruntime cannot open", said):
        return "the runtime cannot open the file"
    said = re.sub(r"^\S+ in (the model's own forward|\S+)( \(.*\))? ", "", said)
    return said.replace("is not known to the coupling", "channels are not followed through it")


def _by(pairs: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """reason -> names."""
    found: dict[str, list[str]] = {}
    for one, why in pairs:
        found.setdefault(why, []).append(one)
    return found


def _names(names: Iterable[str]) -> str:
    return ", ".join(f"`{_cell(one)}`" for one in dict.fromkeys(names))


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
