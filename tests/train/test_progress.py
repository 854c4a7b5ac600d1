"""What is shown: a bar on a terminal, lines elsewhere, nothing from other processes."""

from __future__ import annotations

import pytest

from tersenet.train.progress import Display, Meter


def test_means_are_over_samples_not_batches() -> None:
    meter = Meter()
    meter.add(1.0, 3, 4)
    meter.add(4.0, None, 2)
    values = meter.values()
    assert values["loss"] == (1.0 * 4 + 4.0 * 2) / 6
    assert values["accuracy"] == 3 / 4
    copy = Meter()
    copy.load(meter.state())
    assert copy.state() == meter.state()
    assert copy.values()["samples_per_s"] == 0, "counted since the training went on"
    assert "accuracy" not in Meter().values()


def test_without_a_terminal_there_is_one_line_per_epoch(capsys: pytest.CaptureFixture[str]) -> None:
    meter = Meter()
    meter.add(0.25, 1, 4)
    for first in (True, False):
        with Display(2, 1, quiet=False, first=first) as display:
            display.batch(0, 0, meter)
            display.epoch(0, meter)
    out, err = capsys.readouterr()
    assert out == "", "standard output belongs to --json"
    assert len(err.splitlines()) == 1
    assert err.startswith("epoch 1/2: loss 0.2500, accuracy 25.00%, ")


def test_on_a_terminal_there_is_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "160")
    meter = Meter()
    meter.add(0.25, 1, 4)
    with Display(2, 10, quiet=False, first=True) as display:
        display.batch(1, 4, meter)
        assert display.bar is not None
        display.bar.refresh()
    out, err = capsys.readouterr()
    assert out == ""
    assert "epoch 2/2" in err
    assert "15/20" in err
    assert "loss 0.2500, accuracy 25.00%" in err
    assert Display(2, 10, quiet=True, first=True).bar is None
