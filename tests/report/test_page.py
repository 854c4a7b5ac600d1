"""The HTML page in a real browser: Debian's chromium, headless, through playwright."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import shutil
from pathlib import Path

import pytest

from tersenet.errors import FileError
from tersenet.job import compress
from tersenet.numerics.scale import Scale
from tersenet.report import svg
from tersenet.report.layers import SHOWN, layer_table
from tersenet.report.page import run_names, write_html
from tersenet.report.plots import score_plot, score_series, score_waterfall
from tersenet.report.settings import DEFAULTS, split_settings
from tersenet.task import Task

ARGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
ARGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
NASTY = "<script>window.broken=1</script><img src=x onerror='window.broken=2'><i>tilt</i>"
in_browser = pytest.mark.minutes


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
        return page

    yield opened
    for context in contexts:
        context.close()
    assert noise == []
    assert [url for url in requests if not url.startswith(("file:", "data:", "blob:"))] == []
    assert len([url for url in requests if url.startswith("file:")]) == len(contexts)


def bars(page, place):
    """(name, figure, tip, left edge, right edge) of each bar of a waterfall, edges as parts of the longest bar."""
    found = (
        page.locator(".plots:not(.two) svg.plot")
        .nth(place)
        .locator("g")
        .evaluate_all(
            "all => all.map(g => [g.querySelector('.name').textContent, g.querySelector('.figure').textContent,"
            " g.querySelector('title').textContent, g.querySelector('rect').x.baseVal.value,"
            " g.querySelector('rect').width.baseVal.value])"
        )
    )
    start, whole = found[0][3], found[0][4]
    return [(name, said, tip, (x - start) / whole, (x + width - start) / whole) for name, said, tip, x, width in found]


@in_browser
def test_the_waterfalls_have_their_bars(visit, page_file):
    page, rows = visit(page_file), load_example()["rows"]
    for place, values, unit in (
        (0, [row["file_bytes"]["onnx"] for row in rows], 2**20),
        (1, [row["latency_ms"]["onnxruntime"]["median"] for row in rows], 1),
        (3, [row["macs"] for row in rows], 1e6),
        (4, [row["file_bytes"]["terse"] for row in rows], 2**10),
    ):
        found = bars(page, place)
        assert [bar[0] for bar in found] == [row["step"] for row in rows] + ["result"]
        assert [bar[1] for bar in found] == [f"{value / unit:.3g}" for value in [*values, values[-1]]]
        # A step's bar reaches from what there was to what is left; the last bar from nothing to that.
        for bar, before, after in zip(found[1:], values, values[1:], strict=False):
            low, high = sorted((before / values[0], after / values[0]))
            assert (bar[3], bar[4]) == pytest.approx((low, max(high, low)), abs=0.01)
        assert (found[-1][3], found[-1][4]) == pytest.approx((0, values[-1] / values[0]), abs=0.01)
    assert "0.447 ms (2.7x; 0.37)" in bars(page, 1)[-1][2]


def test_the_waterfall_of_the_score_is_of_what_became_worse():
    report = load_example()
    drawn = score_waterfall(report)
    assert drawn is not None
    assert 'class="band"' in drawn  # the original's interval
    assert drawn.count('class="bad"') == 2  # pruning and quantizing; folding changed nothing
    assert drawn.count('class="good"') == 1  # training won most of it back
    assert drawn.count('class="even"') == 1
    assert "accuracy against the original, points<" in drawn
    report["metric"] = Scale("MAE", "px", False).to_json()
    turned = score_waterfall(report)
    assert turned is not None
    assert (turned.count('class="good"'), turned.count('class="bad"')) == (2, 1)
    assert "MAE against the original, px, left is worse" in turned


def test_the_points_of_score_against_size_and_latency():
    report = load_example()
    rows = report["rows"]
    (size,) = score_series([report], ["run"], "size")
    assert [point.x for point in size.points] == [row["file_bytes"]["onnx"] / 1024 for row in rows]
    assert [point.y for point in size.points] == [100 * row["score"] for row in rows]
    assert all(point.y_ends for point in size.points)
    fast, slow = score_series([report], ["run"], "latency")  # one per runtime
    assert (fast.name, slow.name) == ("ONNX Runtime", "OpenVINO")
    assert [point.x for point in slow.points] == [row["latency_ms"]["openvino"]["median"] for row in rows]
    assert [point.y for point in slow.points] == [100 * row["scores"]["openvino"] for row in rows]
    assert all(point.x_ends and point.y_ends for point in (*fast.points, *slow.points))


def test_runs_of_several_metrics_share_no_plot():
    one, other = load_example(), load_example()
    other["metric"] = Scale("mAP").to_json()
    assert score_plot([one, other], ["a", "b"], "size") is None
    one["metric"] = other["metric"]
    assert score_plot([one, other], ["a", "b"], "size") is not None


def test_ticks_are_round_and_within():
    for low, high in ((0, 4.7), (0, 3e-4), (97.21, 99.63), (-1.5, 0.4), (0, 1e9)):
        found = svg.ticks(low, high)
        assert 3 <= len(found) <= 7
        assert low <= found[0] <= found[-1] <= high
        step = found[1] - found[0]
        assert any(abs(step / 10.0**power - factor) < 1e-6 for power in range(-6, 10) for factor in (1, 2, 5))
    assert svg.Axis(97.2, 99.6, 0, 100).labelled(5)[0][1] == "97.5"
    assert svg.Axis(0, 200, 0, 100).labelled(4)[-1][1] == "200"


def test_everything_in_a_drawing_is_escaped():
    assert "<i>" not in svg.text(0, 0, "<i>") + svg.element("g", tip="<i>") + svg.drawing(1, 1, "<i>", [])


@in_browser
def test_what_is_on_the_page(visit, page_file):
    page, report = visit(page_file), load_example()
    text = page.inner_text("main").replace("\u00a0", " ")
    assert page.inner_text("h1").replace("\u00a0", " ") == report["verdict"]
    recipes = page.locator(".recipe")
    assert recipes.nth(0).text_content().split() == report["brief_recipe"].split()
    assert recipes.nth(1).text_content().split() == report["recipe"].split()
    assert not recipes.nth(1).is_visible()
    assert [" ".join(line.split()) for line in page.locator(".command").all_inner_texts()] == report["commands"]
    for wanted in (report["machine"]["cpu"], report["files"]["model.onnx"]["sha256"], *report["warnings"]):
        assert wanted in text
    assert page.locator("table.rows tbody tr").count() == len(report["rows"])
    layers = [layer for layer in report["rows"][-1]["layers"] if layer["params"] or layer["macs"]]
    assert page.locator("table.sortable tbody tr").count() == len(layers) < len(report["rows"][-1]["layers"])


def layers_of(report):
    return [layer for layer in report["rows"][-1]["layers"] if layer["params"] or layer["macs"]]


@in_browser
def test_a_click_sorts_both_ways(visit, page_file):
    page, layers = visit(page_file), layers_of(load_example())

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


@in_browser
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


def wide(report):
    """The example with all that makes tables wide: three runtimes and formats, long names, top-5."""
    report = copy.deepcopy(report)
    for row in report["rows"]:
        row["latency_ms"]["pytorch"] = row["latency_ms"]["openvino"]
        row["scores"]["pytorch"] = row["score"] - 0.001
        row["file_bytes"]["pt2"] = row["file_bytes"]["onnx"]
        row["top5"] = 0.9986
    report["rows"][-1]["step"] = "5. quantize_aware"
    report["not_written"] = {"model.terse": "a reason that has no end " * 20}
    for layer in report["rows"][-1]["layers"]:
        layer["path"] = f"backbone.features.{layer['path']}"
    return report


@in_browser
@pytest.mark.parametrize("width", [320, 390, 768, 1280, 1920])
def test_the_page_never_scrolls_sideways(visit, tmp_path, width):
    write_html([wide(load_example())], tmp_path / "page.html")
    page = visit(tmp_path / "page.html", width)
    assert page.evaluate("document.scrollingElement.scrollWidth") <= width
    plots = page.eval_on_selector_all(".plot", "all => all.map(svg => svg.getBoundingClientRect().right)")
    assert max(plots) <= width
    scrolling = page.eval_on_selector_all(
        ".scroll", "all => all.filter(box => box.scrollWidth > box.clientWidth + 1).map(box => box.ariaLabel)"
    )
    if width >= 1280:
        assert scrolling == []  # whole tables
    fixed = page.eval_on_selector_all(
        ".scroll", "all => all.map(box => box.querySelector('tbody th').offsetWidth / box.clientWidth)"
    )
    assert max(fixed) < 0.6  # what stays in place leaves room for what is scrolled
    cut = page.eval_on_selector_all(
        "main *",
        "all => all.filter(e => e.scrollWidth > e.clientWidth + 1 && e.clientWidth && "
        "getComputedStyle(e).overflowX === 'hidden').map(e => e.outerHTML.slice(0, 80))",
    )
    assert cut == []


@in_browser
@pytest.mark.parametrize("width", [390, 1280])
def test_no_text_of_a_plot_is_cut_or_covers_another(visit, page_file, width):
    page = visit(page_file, width)
    found = page.evaluate(
        """() => [...document.querySelectorAll('svg.plot')].flatMap(svg => {
          const frame = svg.closest('figure').getBoundingClientRect();
          const boxes = [...svg.querySelectorAll('text')].map(t => [t.textContent, t.getBoundingClientRect()]);
          const out = boxes.filter(([, b]) => b.left < frame.left || b.right > frame.right || b.bottom > frame.bottom);
          const over = boxes.filter(([, a], i) => boxes.some(([, b], j) => i < j &&
            Math.min(a.right, b.right) - Math.max(a.left, b.left) > 2 &&
            Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 4));
          const size = 11.5 * svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;
          const small = size < 9.5 ? [[`text of ${size} px`]] : [];
          return [...out, ...over, ...small].map(([said]) => said);
        })"""
    )
    assert found == []


@in_browser
def test_dark_mode_changes_page_and_plots(visit, page_file):
    def colours(page):
        return page.evaluate(
            "['body', '.plot text', '.plot rect.good', '.plot rect.total'].map((name, place) => {"
            " const style = getComputedStyle(document.querySelector(name));"
            " return place ? style.fill : style.backgroundColor; })"
        )

    light, dark = visit(page_file), visit(page_file, scheme="dark")
    first = colours(light)
    assert sum(map(int, first[0][4:-1].split(","))) > 600 > 200 > sum(map(int, colours(dark)[0][4:-1].split(",")))
    assert not set(first) & set(colours(dark))
    light.emulate_media(color_scheme="dark")  # a change while the page is open is followed
    assert colours(light) == colours(dark)


@in_browser
def test_words_stand_out_from_what_is_behind_them(visit, page_file):
    """Contrast of 4.5 at least, as the Web Content Accessibility Guidelines 2.2 ask for (1.4.3)."""
    for scheme in ("light", "dark"):
        page = visit(page_file, scheme=scheme)
        pairs = page.evaluate(
            """() => ['--text', '--muted', '--link', '--good-text', '--bad-text'].flatMap(word =>
              (word === '--good-text' ? ['--card', '--good-soft'] : word === '--bad-text' ? ['--card', '--bad-soft']
               : ['--page', '--card', '--soft']).map(behind => [word, behind].map(name => {
                const probe = document.body.appendChild(document.createElement('i'));
                probe.style.color = `var(${name})`;
                const found = getComputedStyle(probe).color.match(/[\\d.]+/g).slice(0, 3).map(Number);
                probe.remove();
                return found;
              })))"""
        )
        for word, behind in pairs:
            light, dark = sorted(map(luminance, (word, behind)), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (scheme, word, behind)


def luminance(color):
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (part / 255 for part in color)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@in_browser
def test_several_runs_share_the_two_plots(visit, tmp_path):
    other = copy.deepcopy(load_example())
    other["rows"] = [other["rows"][0], other["rows"][-1]]
    write_html([load_example(), other], tmp_path / "page.html", [tmp_path / "a" / "run", tmp_path / "b" / "run"])
    page = visit(tmp_path / "page.html")
    assert page.locator(".plots.two svg.plot").nth(0).locator("g").count() == 5 + 2
    assert page.locator(".plots.two svg.plot").nth(1).locator("polyline").count() == 4
    assert page.locator("article").count() == 2
    assert page.locator(".runs a").all_inner_texts() == ["a/run", "b/run"]


def test_runs_are_named_by_as_much_of_their_folders_as_tells_them_apart(tmp_path):
    one, other = load_example(), load_example()
    assert run_names([one], ["runs/a"]) == ["resnet20"]
    assert run_names([one, other], ["runs/int8", "runs/half"]) == ["int8", "half"]
    assert run_names([one, other], ["a/x/run", "b/x/run"]) == ["a/x/run", "b/x/run"]
    assert run_names([one, other]) == ["resnet20 (1)", "resnet20 (2)"]
    other["settings"]["model"] = "resnet56"
    assert run_names([one, other]) == ["resnet20", "resnet56"]


def test_a_page_is_small(tmp_path):
    """600 KB at most, of a network of very many layers and of several runs, too; without scripts from elsewhere."""
    report = load_example()
    layer = {"kind": "Conv2d", "params": 2304, "macs": 2359296, "bytes": 9216}
    report["rows"][-1]["layers"] = [{**layer, "path": f"stages.{i}.blocks.{i}.conv"} for i in range(2000)]
    write_html([report], tmp_path / "one.html")
    write_html([report] * 3, tmp_path / "three.html", ["a", "b", "c"])
    for name in ("one.html", "three.html"):
        assert (tmp_path / name).stat().st_size <= 600_000
    assert "plotly" not in (tmp_path / "one.html").read_text(encoding="utf-8")


def test_layers_without_numbers_are_counted_and_not_listed():
    report = load_example()
    conv = {"path": "conv", "kind": "Conv2d", "params": 10, "macs": 20, "bytes": 40}
    empty = {"kind": "ReLU", "params": 0, "macs": 0, "bytes": 0}
    quantizer = {"path": "q", "kind": "Quantizer", "params": 0, "macs": 0, "bytes": 5}
    relus = [{**empty, "path": f"relu{i}"} for i in range(3)]
    report["rows"][-1]["layers"] = [conv, *relus, quantizer, {"path": "unknown"}]
    table = layer_table(report)
    assert table is not None
    assert [row["path"] for row in table.rows] == ["conv", "unknown"]
    assert table.empty == "Not listed: 4 layers without parameters and multiply-adds (ReLU 3, Quantizer 1, 5 B in all)."
    assert not table.notes
    many = [{**conv, "path": f"conv{i}", "macs": i} for i in range(SHOWN + 50)]
    report["rows"][-1]["layers"] = many
    table = layer_table(report)
    assert table is not None
    assert [row["macs"] for row in table.rows] == list(range(SHOWN + 49, 49, -1))
    rest = 100 * sum(range(50)) / sum(range(SHOWN + 50))
    assert table.smaller.startswith(f"The {SHOWN} largest; 50 more with {rest:.1f} % of the multiply-adds")


def test_only_settings_that_differ_from_the_defaults_are_shown(tmp_path):
    signature = inspect.signature(compress)
    for name, value in DEFAULTS.items():
        if name == "seed":
            (field,) = (each for each in dataclasses.fields(Task) if each.name == name)
            assert field.default == value
        else:
            default = signature.parameters[name].default
            assert (list(default) if isinstance(default, tuple) else default) == value
    asked = {
        "model": "resnet20",
        "seed": 0,
        "threads": 2,
        "runtimes": ["onnxruntime"],
        "search": {"a": 1},
        "table": None,
    }
    assert split_settings(asked) == ({"model": "resnet20", "threads": 2}, {"seed": 0, "runtimes": ["onnxruntime"]})


@in_browser
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
    assert "<i>tilt</i>" in page.locator(".plot title").first.text_content()  # as it is written, not as a tag
    assert page.evaluate("window.broken") is None
    assert page.locator("main img").count() == 0
    assert page.locator("main i:not(.bar i)").count() == 0


@in_browser
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
