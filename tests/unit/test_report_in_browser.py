"""Reports in a browser: they load without console messages, and their scripts sort and filter."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from carclass.evaluation.report import render
from carclass.ingestion.report import render as render_dataset
from carclass.masking.report import render as render_masking
from carclass.prediction.report import render as render_predictions
from carclass.tuning.report import render_analysis
from tests.helpers.browser import BROWSER, PHONE_WIDTH, open_page, photograph_page
from tests.helpers.pages import (
    COMPARISON_SECTIONS,
    DATASET_SECTIONS,
    EVALUATION_SECTIONS,
    MASKING_SECTIONS,
    PREDICTION_SECTIONS,
    SWEEP_SECTIONS,
    comparison_page,
    make_dataset_report,
    make_masking_report,
    make_prediction_report,
    make_report,
)
from tests.helpers.sweeps import make_sweep

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")


def with_script(page: str, script: str) -> str:
    """Return the page without its content policy and with another script that simulates a reader."""
    page = re.sub(r'<meta http-equiv="Content-Security-Policy".*?>', "", page, flags=re.S)
    return page.replace("</body>", f"<script>{script}</script></body>")


def class_rows(dom: str) -> list[str]:
    """Return the rows of the table of classes."""
    table = re.search(r'<section id="classes".*?<tbody>(.*?)</tbody>', dom, re.S).group(1)
    return re.findall(r"<tr.*?</tr>", table, re.S)


@pytest.mark.parametrize("num_classes", [4, 196])
def test_a_report_opens_with_all_sections_and_a_silent_console(tmp_path, num_classes):
    dom, console = open_page(render(make_report(num_classes, num_photos=400)), tmp_path)
    assert console == []
    assert [name for name in EVALUATION_SECTIONS if f'<section id="{name}"' not in dom] == []


@pytest.mark.slow
def test_the_page_of_a_dataset_opens_with_all_sections_and_a_silent_console(tmp_path):
    dom, console = open_page(render_dataset(make_dataset_report()), tmp_path)
    assert console == []
    assert [name for name in DATASET_SECTIONS if f'<section id="{name}"' not in dom] == []


@pytest.mark.slow
def test_a_masking_report_opens_with_all_sections_and_a_silent_console(tmp_path):
    dom, console = open_page(render_masking(make_masking_report()), tmp_path)
    assert console == []
    assert [name for name in MASKING_SECTIONS if f'<section id="{name}"' not in dom] == []


@pytest.mark.slow
def test_the_page_of_predictions_opens_with_all_sections_and_a_silent_console(tmp_path):
    dom, console = open_page(render_predictions(make_prediction_report()), tmp_path)
    assert console == []
    assert [name for name in PREDICTION_SECTIONS if f'<section id="{name}"' not in dom] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("field", "value", "shown"),
    [
        ("class", "Belmar Wagon", ["new/0001.jpg"]),
        ("words", "elan 0003", ["new/0003.jpg"]),
        ("low", "70", ["new/0003.jpg", "new/0005.jpg"]),
        ("result", "rejected", ["new/0000.jpg", "new/0002.jpg", "new/0004.jpg"]),
        ("low", "", [f"new/{i:04d}.jpg" for i in range(6)]),
    ],
)
def test_a_filter_shows_the_photos_that_pass_it(tmp_path, field, value, shown):
    script = f"""
        const input = document.querySelector("#{field}");
        input.value = "{value}";
        input.dispatchEvent(new Event("input", {{ bubbles: true }}));
    """
    dom, _ = open_page(with_script(render_predictions(make_prediction_report()), script), tmp_path)
    figures = re.findall(r"<figure data-class[^>]*>.*?</figure>", dom, re.S)
    found = [re.search(r'class="key">(.*?)<', one)[1] for one in figures if "hidden" not in one.split(">")[0]]
    assert sorted(found) == shown
    assert f"{len(shown)} of 6 photos" in dom


@pytest.mark.slow
def test_no_script_runs_in_a_masking_report(tmp_path):
    page = render_masking(make_masking_report()).replace("</body>", "<script>document.title = 'taken'</script></body>")
    dom, console = open_page(page, tmp_path)
    assert "<title>taken" not in dom
    assert any("Content Security Policy" in line for line in console)


def test_errors_of_scripts_are_detected(tmp_path):
    _, console = open_page(with_script(render(make_report()), "undefinedFunction()"), tmp_path)
    assert any("Uncaught ReferenceError" in line for line in console)


def test_a_foreign_script_in_the_page_does_not_run(tmp_path):
    page = render(make_report()).replace("</body>", "<script>document.title = 'taken'</script></body>")
    dom, console = open_page(page, tmp_path)
    assert "<title>taken" not in dom
    assert any("Content Security Policy" in line for line in console)


def test_a_click_on_a_header_sorts_the_classes(tmp_path):
    script = "document.querySelectorAll('#classes th button')[5].click()"
    dom, _ = open_page(with_script(render(make_report(num_classes=12)), script), tmp_path)
    photos = [int(re.findall(r'data-value="(\d+)"', row)[-1]) for row in class_rows(dom)]
    assert len(set(photos)) > 1
    assert photos == sorted(photos)


@pytest.mark.slow
def test_the_filter_shows_the_classes_with_all_its_words(tmp_path):
    script = """
        const input = document.querySelector("#filter");
        input.value = "011 MAKER";
        input.dispatchEvent(new Event("input"));
    """
    dom, _ = open_page(with_script(render(make_report(num_classes=12)), script), tmp_path)
    shown = [row for row in class_rows(dom) if "hidden" not in row.split(">")[0]]
    assert len(shown) == 1
    assert "Maker Model 011" in shown[0]


@pytest.mark.slow
def test_an_analysis_of_a_sweep_opens_with_all_sections_and_a_silent_console(tmp_path):
    dom, console = open_page(render_analysis(make_sweep()), tmp_path)
    assert console == []
    assert [name for name in SWEEP_SECTIONS if f'<section id="{name}"' not in dom] == []


@pytest.mark.slow
def test_a_click_on_a_header_sorts_the_trials(tmp_path):
    script = "document.querySelectorAll('#trials th button')[0].click()"
    dom, _ = open_page(with_script(render_analysis(make_sweep()), script), tmp_path)
    table = re.search(r'<section id="trials".*?<tbody>(.*?)</tbody>', dom, re.S).group(1)
    numbers = [int(number) for number in re.findall(r'<th scope="row"[^>]*data-value="(\d+)"', table)]
    assert numbers == list(range(len(make_sweep().trials)))


@pytest.mark.slow
def test_a_comparison_opens_with_all_sections_and_a_silent_console(tmp_path):
    dom, console = open_page(comparison_page(), tmp_path)
    assert console == []
    assert [name for name in COMPARISON_SECTIONS if f'<section id="{name}"' not in dom] == []


FIND_CLIPPED = """
    const region = document.querySelector("#confusion .scroll");
    const edge = region.getBoundingClientRect().top;
    const names = [...region.querySelectorAll("thead span")];
    const clipped = names.filter(
      (name) => name.getBoundingClientRect().top < edge || name.scrollHeight > name.clientHeight + 1);
    document.title = JSON.stringify(clipped.map((name) => name.textContent));
"""


@pytest.mark.slow
def test_headings_of_the_confusion_matrix_are_not_clipped(tmp_path: Path):
    report = make_report(3)
    report.class_names = [
        "Chevrolet_Silverado_1500_Crew_Cab_2012",
        "RollsRoycePhantomDropheadCoupeConvertible2012",
        "x",
    ]
    report.metrics["per_class"] = [
        {**row, "name": name} for row, name in zip(report.metrics["per_class"], report.class_names, strict=True)
    ]
    dom, _ = open_page(with_script(render(report), FIND_CLIPPED), tmp_path, 1200)
    assert json.loads(re.search("<title>(.*?)</title>", dom)[1]) == []


SET_WIDTH = f"document.body.style.width = '{PHONE_WIDTH}px';"  # a window is at least 485 pixels wide
FIND_HIDDEN_COLUMNS = f"""
    {SET_WIDTH}
    const wide = [...document.querySelectorAll("body *")].filter(
      (element) => element.scrollWidth > element.clientWidth + 1 && getComputedStyle(element).overflowX === "auto");
    const bare = wide.filter((element) => !getComputedStyle(element).backgroundAttachment.includes("local"));
    const found = [wide.length, bare.map((element) => element.outerHTML.slice(0, 80)), document.body.scrollWidth];
    document.title = JSON.stringify(found);
"""
PAGES = {
    "evaluation": lambda: render(make_report(12, num_photos=400)),
    "dataset": lambda: render_dataset(make_dataset_report()),
    "predictions": lambda: render_predictions(make_prediction_report()),
    "masking": lambda: render_masking(make_masking_report()),
    "sweep": lambda: render_analysis(make_sweep()),
    "comparison": comparison_page,
}


FITTING = ("dataset", "predictions")
"""Pages without anything wider than a phone."""


@pytest.mark.slow
@pytest.mark.parametrize("name", PAGES)
def test_everything_wider_than_a_phone_scrolls_with_a_hint(tmp_path: Path, name: str):
    dom, _ = open_page(with_script(PAGES[name](), FIND_HIDDEN_COLUMNS), tmp_path, PHONE_WIDTH)
    num_wide, bare, page_width = json.loads(re.search("<title>(.*?)</title>", dom)[1])
    assert (num_wide == 0) == (name in FITTING)
    assert bare == []
    assert page_width <= PHONE_WIDTH


def show_edges(page: str, selector: str, folder: Path, place: int) -> tuple[int, int]:
    """Scroll an element and return the brightness at its left and right edge, the median over its upper rows."""
    script = f"""
        {SET_WIDTH}
        const element = document.querySelector("{selector}");
        const around = element.closest("section, nav");
        document.body.replaceChildren(around);
        around.replaceChildren(element);
        around.style.cssText = element.style.cssText = "margin: 0; padding: 0; border: 0; position: static";
        element.scrollLeft = {place};
    """
    rows = photograph_page(with_script(page, script), folder)[4:24].mean(axis=2)
    return tuple(int(np.median(rows[:, column])) for column in (0, -1))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "selector"),
    [("evaluation", "#confusion .scroll"), ("comparison", "#runs .scroll"), ("comparison", "nav ul")],
)
def test_an_edge_is_shaded_while_there_is_more_beyond_it(tmp_path: Path, name: str, selector: str):
    start, end = (show_edges(PAGES[name](), selector, tmp_path, place) for place in (0, 100_000))
    assert start[1] < start[0] - 30
    assert end[0] < end[1] - 30
    assert (start[0], end[1]) >= (240, 240)
