"""The operator table: every layer, function and tensor method of torch that can stand in a network, in a small one.

operator_list.py makes the list from torch itself. Each setting stands between a convolution and a small head, and then:

    captured    the graph computes what the network does, at another batch size
    cut         half of the channels before it go: equal to the uncut graph with zeros in their places, or why not
    .terse .pt2 written and read again: equal, or the sentence that refuses it
    ONNX        the file in ONNX Runtime and OpenVINO: equal, or the sentence
    int8        the file in both: equal to its simulation, the operator left in float, or the sentence

    python benchmarks/operators.py                    what is missing in benchmarks/results/operators.json
    python benchmarks/operators.py --only '*pad*'     these again
    python benchmarks/operators.py --wrong            those that are wrong, again
    python benchmarks/operators.py --checks captured,cut

Writes docs/operators.md from all results, old and new. A row runs in a process of its own kind (operator_checks.py):
an operator that ends it becomes a row that says so, and the next rows get a new process.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import re
import select
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from operator_list import Setting, table
from operators_page import page

from tersenet.deploy.machine import machine

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "operators.json"
CHECKS = ("captured", "cut", "terse", "pt2", "onnx", "int8")
LIMIT = 300  # seconds without an answer
FRESH = 150  # rows of one process, whose memory grows


class Worker:
    """The process of the rows."""

    def __init__(self, memory: dict[str, dict[str, Any]]) -> None:
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the process
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("operator_checks.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            bufsize=0,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        self.rows = 0
        self._say(memory)

    def _say(self, value: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write((json.dumps(value) + "\n").encode())

    def row(self, key: str, checks: list[str]) -> tuple[dict[str, Any], str | None]:
        """The results, and how the process ended, if it did."""
        found: dict[str, Any] = {}
        self.rows += 1
        try:
            self._say({"key": key, "checks": checks})
        except BrokenPipeError:
            return found, self.ended()
        while True:
            answer = self._answer()
            if answer is None:
                return found, self.ended()
            if answer[0] == "done":
                return found, None
            found[answer[0]] = answer[1]

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], LIMIT)
        line = self.process.stdout.readline() if ready else b""
        return json.loads(line) if line else None

    def ended(self) -> str:
        """Why the process is gone."""
        try:
            code = self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self.close()
            return f"no answer within {LIMIT} seconds"
        self.errors.seek(0)
        lines = self.errors.read().decode(errors="replace").strip().splitlines()
        said = re.sub(r"0x[0-9a-f]+|/\S*/", "", lines[-1])[:120] if lines else "nothing"
        return f"the interpreter ended with {code}, saying {said}"

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.errors):
            assert pipe is not None
            pipe.close()


class Log:
    """benchmarks/results/operators.json, one line per row."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.content: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        self.rows: dict[str, dict[str, Any]] = self.content.setdefault("rows", {})

    def write(self) -> None:
        about = {**self.content, "rows": None, "left_out": None}
        parts = [json.dumps(about, indent=1).removesuffix("\n}").replace(',\n "rows": null', "")]
        parts[0] = parts[0].replace('\n "rows": null,', "").replace(',\n "left_out": null', "")
        for name in ("left_out", "rows"):
            lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in self.content[name].items()]
            parts.append(f' "{name}": {{\n' + ",\n".join(lines) + "\n }")
        temporary = self.path.with_suffix(".new")
        temporary.write_text(",\n".join(parts) + "\n}\n")
        temporary.replace(self.path)

    def memory(self, without: set[str]) -> dict[str, dict[str, Any]]:
        """graph -> results that need not be had again."""
        found: dict[str, dict[str, Any]] = {}
        for key, row in self.rows.items():
            if key not in without and "graph" in row:
                found.setdefault(row["graph"], {}).update({check: row[check] for check in CHECKS if check in row})
        return found

    def share(self, found: dict[str, Any]) -> None:
        """What is new of a graph holds for all rows of that graph."""
        for row in self.rows.values():
            if "graph" in found and row.get("graph") == found["graph"]:
                row.update({check: found[check] for check in found if check != "captured"})


def run(tried: list[Setting], log: Log, checks: tuple[str, ...], again: bool) -> None:
    """Runs rows in processes of their own, and writes the log as it goes.

    Args:
        again: whether rows that are there already are run, too.
    """
    worker: Worker | None = None
    start, saved = time.monotonic(), time.monotonic()
    waiting = {one.key for one in tried}
    for number, one in enumerate(tried, 1):
        known = log.rows.get(one.key, {})
        if not again and ("left_out" in known or all(check in known for check in checks)):
            continue  # another row of the same graph was run
        for attempt in range(2):  # what an earlier row spoiled is not held against this one
            if worker is None:
                worker = Worker(log.memory(waiting))
            found, ended = worker.row(one.key, list(checks))
            if ended is None and worker.rows < FRESH:
                break
            worker.close()
            worker = None
            if ended is None:
                break
            missing = next((check for check in checks if check not in found), checks[-1])
            if attempt == 1:
                found |= {missing: f"WRONG: {ended}"} if "graph" in found else {"left_out": f"CRASH: {ended}"}
        same = "left_out" not in found and known.get("graph") == found.get("graph")
        kept = {check: known[check] for check in CHECKS if same and check in known}
        log.rows[one.key] = {**kept, **found}
        log.share(found)
        waiting.discard(one.key)
        pace = (time.monotonic() - start) / number
        left = pace * (len(tried) - number) / 60
        print(f"[{number}/{len(tried)}, {pace:.1f} s a row, {left:.0f} min left] {one.key}: {_told(found)}", flush=True)
        if time.monotonic() - saved > 20:
            log.write()
            saved = time.monotonic()
    for key, row in log.rows.items():  # graphs that were known before their rows
        known = log.memory({key}).get(row.get("graph", ""), {})
        row.update({check: known[check] for check in known if check not in row and check != "captured"})
    if worker is not None:
        worker.close()


def _told(found: dict[str, Any]) -> str:
    return json.dumps({key: value for key, value in found.items() if value not in ("ok", _ALL_OK) and key != "graph"})


_ALL_OK = {"onnxruntime": "ok", "openvino": "ok"}


def is_wrong(row: dict[str, Any]) -> bool:
    """Whether something in a row is neither right nor refused in a sentence."""
    return any(word in json.dumps(row) for word in ("WRONG", "CRASH", "Error:"))


def missing(row: dict[str, Any]) -> list[str]:
    """Checks that a row lacks."""
    return [] if "left_out" in row else [check for check in CHECKS if check not in row]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", help="settings that match this pattern, also those there already")
    parser.add_argument("--wrong", action="store_true", help="those that are wrong, again")
    parser.add_argument("--said", help="those with a result that matches this regular expression, again")
    parser.add_argument("--all", action="store_true", help="all, again")
    parser.add_argument("--checks", default=",".join(CHECKS))
    parser.add_argument("--page", action="store_true", help="only write the page")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "operators.md")
    arguments = parser.parse_args()
    log = Log(arguments.results)
    checks = tuple(arguments.checks.split(","))
    out, tried = table()
    order = {one.key: log.rows.get(one.key) for one in tried}
    log.content["rows"] = log.rows = {key: row for key, row in order.items() if row is not None}
    log.content.update(machine=machine(), threads=1, torch=torch.__version__, left_out=out)
    if not arguments.page:
        chosen, picked = [], bool(arguments.only or arguments.wrong or arguments.said)
        for one in tried:
            row = log.rows.get(one.key, {})
            again = any(fnmatch.fnmatch(one.key, pattern) for pattern in arguments.only or ())
            again |= arguments.wrong and is_wrong(row)
            again |= bool(arguments.said and re.search(arguments.said, json.dumps(row)))
            missing_here = "left_out" not in row and any(check not in row for check in checks)
            if again or arguments.all or (not picked and missing_here):
                chosen.append(one)
        run(chosen, log, checks, picked or arguments.all)
    log.content["rows"] = log.rows = {one.key: log.rows[one.key] for one in tried if one.key in log.rows}
    log.write()
    arguments.out.write_text(page(log.content))


if __name__ == "__main__":
    main()
