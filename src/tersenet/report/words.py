"""How quantities are written for people, in one place, so that table, page, card and verdict say the same.

KiB = 1024 bytes, MiB = 1024 KiB. A gain is written both ways: "2.8x" (how many times less) and "0.36" (what is left).
"""

from __future__ import annotations

from typing import Any

RUNTIMES = {
    "pytorch": "PyTorch",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
    "litert": "LiteRT",
    "executorch": "ExecuTorch",
    "torch": "PyTorch",
}


def runtime_name(runtime: str) -> str:
    """ "onnxruntime" -> "ONNX Runtime"; a name that is not known stays as it is."""
    return RUNTIMES.get(runtime, runtime)


def bytes_text(value: float) -> str:
    """
    >>> bytes_text(853), bytes_text(3616431), bytes_text(287650)
    ('853 B', '3.45 MiB', '280.9 KiB')
    """
    if value < 1024:
        return f"{value:.0f} B"
    for unit, size in (("KiB", 2**10), ("MiB", 2**20), ("GiB", 2**30)):
        # 1023.95 KiB would be rounded to 1024.0, so the next unit starts a little earlier.
        if value < size * 1023.95 or unit == "GiB":
            return f"{value / size:.1f} {unit}" if unit == "KiB" else f"{value / size:.2f} {unit}"
    raise AssertionError("GiB ends the loop")


def count_text(value: float) -> str:
    """
    >>> count_text(640), count_text(853018), count_text(125485696)
    ('640', '853.0 k', '125.5 M')
    """
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size * 0.99995:
            return f"{value / size:.2f} G" if unit == "G" else f"{value / size:.1f} {unit}"
    return f"{value:.0f}"


def milliseconds_text(value: float) -> str:
    """
    >>> milliseconds_text(0.01234), milliseconds_text(2.631), milliseconds_text(123.4)
    ('0.0123 ms', '2.63 ms', '123 ms')
    """
    digits = 4 if value < 0.1 else 3 if value < 1 else 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:.{digits}f} ms"


def milliseconds_span(low: float, high: float) -> str:
    """
    >>> milliseconds_span(2.6, 2.7)
    '2.60-2.70'
    """
    return f"{milliseconds_text(low)[:-3]}-{milliseconds_text(high)[:-3]}"


def percent(share: float) -> str:
    """
    >>> percent(0.915)
    '91.50 %'
    """
    return f"{100 * share:.2f} %"


def factor_text(factor: float) -> str:
    """How many times. Two digits after the point where one would hide the difference from 1.

    >>> factor_text(2.78), factor_text(1.04), factor_text(0.625), factor_text(131.0)
    ('2.8x', '1.04x', '0.62x', '131x')
    """
    return f"{factor:.2f}x" if factor < 1.095 else f"{factor:.1f}x" if factor < 99.95 else f"{factor:.0f}x"


def left_text(left: float) -> str:
    """What is left, as a share of what there was.

    >>> left_text(0.36), left_text(0.0213)
    ('0.36', '0.021')
    """
    return f"{left:.2f}" if left >= 0.0995 else f"{left:.3f}"


def both_ways(before: float, after: float) -> str:
    """
    >>> both_ways(2.8, 1.0)
    '2.8x; 0.36'
    """
    return f"{factor_text(before / after)}; {left_text(after / before)}" if before > 0 and after > 0 else ""


def seconds_text(value: float) -> str:
    """
    >>> seconds_text(1.77), seconds_text(90), seconds_text(7500)
    ('1.8 s', '1 min 30 s', '2 h 5 min')
    """
    if value < 60:
        return f"{value:.1f} s"
    minutes, seconds = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"


def plain(value: Any) -> str:
    """A setting or a fact of the machine as text."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(plain, value))
    if isinstance(value, dict):
        return ", ".join(f"{key} {plain(item)}" for key, item in value.items())
    return "-" if value is None else str(value)
