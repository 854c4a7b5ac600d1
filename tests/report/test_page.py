"""The HTML page in a real browser: Debian's chromium, headless, through playwright."""

from __future__ import annotations

import copy
import json
import shutil
import sys
from pathlib import Path

import pytest

from tersenet.errors import FileError, MissingExtra
from tersenet.report.page import write_html
from tersenet.report.plots import score_plot, waterfall

pytestmark = pytest.mark.minutes


ARGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
ARGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
NASTY = "<script>window.broken=1</script><img src=x onerror='window.broken=2'><i>tilt</i>"


def load_example():
    return json.loads((Path(__file__).parent / "example_report.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def browser():
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed (Debian: apt-get install chromium)")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=chromium, args=ARGS)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_html([load_example()], path)
    return path


@pytest.fixture
def visit(browser):
    """Opens a page and afterwards holds that it logged nothing and asked for nothing but itself."""
    contexts, noise, requests = [], [], []

    def opened(path, width=1200, scheme="light"):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: noise.append(message.text))
        page.on("pageerror", lambda error: noise.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(path.as_uri())
        until(
            page,
            "document.querySelectorAll('.plot').length === document.querySelectorAll('.plot .cartesianlayer').length",
        )
        return page

    yield opened
    for context in contexts:
        context.close()
    assert noise == []
    assert [url for url in requests if not url.startswith(("file:", "data:", "blob:"))] == []
    assert len([url for url in requests if url.startswith("file:")]) == len(contexts)


def until(page, expression):
    """Waits until an expression holds. Playwright's own wait needs `eval`, which the page's security policy forbids."""
    for _ in range(200):
        if page.evaluate(expression):
            return
        page.wait_for_timeout(50)
    raise AssertionError(f"this never became true: {expression}")


def data(page, key):
    return page.evaluate(
        "key => document.querySelector(`[data-figure='${key}']`).data.map(({x, y, type, measure, error_y, error_x}) =>"
        " ({x: [...x], y: [...y], type, measure, error_y: !!error_y, error_x: !!error_x}))",
        key,
    )


def test_the_plots_have_their_points(visit, page_file):
    page, rows = visit(page_file), load_example()["rows"]
    for what, values in {
        "bytes": [row["file_bytes"]["terse"] / 2**10 for row in rows],
        "macs": [row["macs"] / 1e6 for row in rows],
        "latency": [row["latency_ms"]["onnxruntime"]["median"] for row in rows],
    }.items():
        (trace,) = data(page, f"run-1-{what}")
        assert trace["type"] == "waterfall"
        assert trace["x"] == [row["step"] for row in rows] + ["shipped"]
        assert trace["measure"] == ["absolute", *["relative"] * (len(rows) - 1), "total"]
        assert sum(trace["y"][:-1]) == pytest.approx(values[-1])
        assert trace["y"][0] == pytest.approx(values[0])
    (score,) = data(page, "run-1-score")
    assert sum(score["y"][:-1]) == pytest.approx(100 * (rows[-1]["score"] - rows[0]["score"]))
    (size,) = data(page, "score-size")
    assert size["x"] == pytest.approx([row["file_bytes"]["terse"] / 2**10 for row in rows])
    assert size["y"] == pytest.approx([100 * row["score"] for row in rows])
    assert size["error_y"]
    latency = data(page, "score-latency")
    assert len(latency) == 2  # one per runtime
    assert latency[1]["x"] == pytest.approx([row["latency_ms"]["openvino"]["median"] for row in rows])
    assert latency[1]["y"] == pytest.approx([100 * row["scores"]["openvino"] for row in rows])
    assert all(trace["error_x"] and trace["error_y"] for trace in latency)


def test_a_label_below_a_bar_has_room_above_the_names_of_the_steps():
    def low(*values):
        names = [str(place) for place in range(len(values))]
        return waterfall(names, list(values), names, names, "KiB")["layout"]["yaxis"]["range"][0]

    assert low(10.0, 0.2) == low(10.0, 0.9, 5.0) == -1.0
    assert low(10.0, 4.0) == low(0.5, 10.0) == low(0.5, 0.5, 10.0) == 0  # what does not fall has its label above


def test_names_of_points_turn_away_from_the_nearer_edge():
    report = load_example()
    original, *_, last = report["rows"]
    last["file_bytes"]["terse"] = original["file_bytes"]["terse"] // 100
    report["rows"][1]["file_bytes"]["terse"] = last["file_bytes"]["terse"] // 2  # what ships is not the smallest
    figure = score_plot([report], [""], "size")
    assert figure is not None
    (trace,) = figure["data"]
    ends = trace["text"][0], trace["text"][-1], trace["textposition"][0], trace["textposition"][-1]
    assert ends == ("original", "shipped", "bottom left", "bottom right")


def test_what_is_on_the_page(visit, page_file):
    page, report = visit(page_file), load_example()
    text = page.inner_text("main").replace("\u00a0", " ")
    assert page.inner_text("h1").replace("\u00a0", " ") == report["verdict"]
    assert page.inner_text(".recipe").split() == report["recipe"].split()
    assert [" ".join(line.split()) for line in page.locator(".command").all_inner_texts()] == report["commands"]
    for wanted in (report["machine"]["cpu"], report["files"]["model.onnx"]["sha256"], *report["warnings"]):
        assert wanted in text
    assert page.locator("table.rows tbody tr").count() == len(report["rows"])
    assert page.locator("table.sortable tbody tr").count() == len(report["rows"][-1]["layers"])


def test_a_click_sorts_both_ways(visit, page_file):
    page, layers = visit(page_file), load_example()["rows"][-1]["layers"]

    def column(number):
        return page.eval_on_selector_all(
            f"table.sortable tbody tr > :nth-child({number})", "cells => cells.map(cell => cell.dataset.value)"
        )

    button = page.get_by_role("button", name="Params", exact=True)
    head = page.locator("table.sortable th").nth(2)
    button.click()
    assert head.get_attribute("aria-sort") == "descending"
    assert [int(value) for value in column(3)] == sorted((layer["params"] for layer in layers), reverse=True)
    button.focus()
    page.keyboard.press("Enter")
    assert head.get_attribute("aria-sort") == "ascending"
    assert [int(value) for value in column(3)] == sorted(layer["params"] for layer in layers)
    page.get_by_role("button", name="Layer", exact=True).click()
    assert head.get_attribute("aria-sort") == "none"
    assert column(1) == sorted(layer["path"] for layer in layers)


def test_layers_without_a_number_stay_last(visit, tmp_path):
    report = load_example()
    report["rows"][-1]["layers"] = [{"path": "a"}, {"path": "b", "params": 2}, {"path": "c", "params": 10}]
    write_html([report], tmp_path / "page.html")
    page = visit(tmp_path / "page.html")
    orders = []
    for _ in range(2):
        page.get_by_role("button", name="Params", exact=True).click()
        orders.append(page.locator("table.sortable tbody th").all_inner_texts())
    assert orders == [["c", "b", "a"], ["b", "c", "a"]]


@pytest.mark.parametrize("width", [320, 380, 768])
def test_the_page_never_scrolls_sideways(visit, page_file, width):
    page = visit(page_file, width)
    assert page.evaluate("document.scrollingElement.scrollWidth") <= width
    plots = page.eval_on_selector_all(".plot svg", "all => all.map(svg => svg.getBoundingClientRect().right)")
    assert max(plots) <= width


def test_dark_mode_changes_page_and_plots(visit, page_file):
    def colours(page):
        return page.evaluate(
            "[getComputedStyle(document.body).backgroundColor, document.querySelector('.plot').layout.font.color,"
            " document.querySelector('.plot').layout.paper_bgcolor]"
        )

    light, dark = visit(page_file), visit(page_file, scheme="dark")
    first = colours(light)
    assert sum(map(int, first[0][4:-1].split(","))) > 600 > 200 > sum(map(int, colours(dark)[0][4:-1].split(",")))
    assert first[1] != colours(dark)[1]
    assert first[2] == "rgba(0,0,0,0)"
    light.emulate_media(color_scheme="dark")  # a change while the page is open is followed
    until(light, f"document.querySelector('.plot').layout.font.color === '{colours(dark)[1]}'")
    assert colours(light) == colours(dark)


def test_several_runs_share_the_two_plots(visit, tmp_path):
    other = copy.deepcopy(load_example())
    other["rows"] = [other["rows"][0], other["rows"][-1]]
    write_html([load_example(), other], tmp_path / "page.html")
    page = visit(tmp_path / "page.html")
    assert [len(trace["x"]) for trace in data(page, "score-size")] == [5, 2]
    assert len(data(page, "score-latency")) == 4
    assert page.locator("article").count() == 2
    assert page.locator("script").evaluate_all("all => all.filter(s => s.textContent.length > 1e6).length") == 1


def test_nothing_from_a_report_is_read_as_html(visit, tmp_path):
    report = load_example()
    report["settings"] = {"model": NASTY, "note": NASTY}
    report |= {"verdict": NASTY, "recipe": NASTY, "commands": [NASTY], "warnings": [NASTY], "machine": {NASTY: NASTY}}
    for row in report["rows"]:
        row |= {
            "step": NASTY,
            "notes": [NASTY],
            "latency_ms": {NASTY: row["latency_ms"]["onnxruntime"]},
            "scores": {NASTY: 0.9},
        }
        row["file_bytes"][NASTY] = 5
        for layer in row["layers"]:
            layer |= {"path": NASTY, "kind": NASTY, "note": NASTY}
    report["files"] = {NASTY: report["files"]["model.onnx"] | {"runtime": NASTY}}
    report["targets"] = [{"what": NASTY, "wanted": NASTY, "got": NASTY, "met": False}]
    write_html([report, report], tmp_path / "page.html")
    page = visit(tmp_path / "page.html")
    page.locator(".plot .points path").first.hover(force=True)
    page.wait_for_selector(".hoverlayer .hovertext")
    # Plotly would obey the tags that it knows; escaped ones are shown as they are written.
    assert "<i>tilt</i>" in page.text_content(".hoverlayer .hovertext")
    assert page.evaluate("window.broken") is None
    assert page.locator("main img").count() == 0


def test_a_report_with_almost_nothing(visit, tmp_path):
    report = {"schema": 1, "machine": {}, "settings": {}, "files": {}, "verdict": "Nothing."}
    write_html([report | {"rows": [{"step": "original"}]}], tmp_path / "page.html")
    page = visit(tmp_path / "page.html")
    assert page.inner_text("h1") == "Nothing."
    assert page.locator(".plot").count() == 0


def test_no_report_is_refused(tmp_path):
    with pytest.raises(FileError, match="at least one report"):
        write_html([], tmp_path / "page.html")
    with pytest.raises(FileError, match="this is no report"):
        write_html([{"schema": 1}], tmp_path / "page.html")
    assert not list(tmp_path.iterdir())


def test_without_plotly_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly", None)
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(MissingExtra, match=r'pip install "tersenet\[report\]"'):
        write_html([load_example()], tmp_path / "page.html")
