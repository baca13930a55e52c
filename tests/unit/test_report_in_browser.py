"""Reports in a browser: they load without console messages, and their scripts sort and filter."""

import re

import pytest

from carclass.evaluation.report import render
from carclass.masking.report import render as render_masking
from carclass.tuning.report import render_analysis
from tests.helpers.browser import BROWSER, open_page
from tests.helpers.pages import (
    COMPARISON_SECTIONS,
    EVALUATION_SECTIONS,
    MASKING_SECTIONS,
    SWEEP_SECTIONS,
    comparison_page,
    make_masking_report,
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


def test_a_masking_report_opens_with_all_sections_and_a_silent_console(tmp_path):
    dom, console = open_page(render_masking(make_masking_report()), tmp_path)
    assert console == []
    assert [name for name in MASKING_SECTIONS if f'<section id="{name}"' not in dom] == []


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


def test_an_analysis_of_a_sweep_opens_with_all_sections_and_a_silent_console(tmp_path):
    dom, console = open_page(render_analysis(make_sweep()), tmp_path)
    assert console == []
    assert [name for name in SWEEP_SECTIONS if f'<section id="{name}"' not in dom] == []


def test_a_click_on_a_header_sorts_the_trials(tmp_path):
    script = "document.querySelectorAll('#trials th button')[0].click()"
    dom, _ = open_page(with_script(render_analysis(make_sweep()), script), tmp_path)
    table = re.search(r'<section id="trials".*?<tbody>(.*?)</tbody>', dom, re.S).group(1)
    numbers = [int(number) for number in re.findall(r'<th scope="row"[^>]*data-value="(\d+)"', table)]
    assert numbers == list(range(len(make_sweep().trials)))


def test_a_comparison_opens_with_all_sections_and_a_silent_console(tmp_path):
    dom, console = open_page(comparison_page(), tmp_path)
    assert console == []
    assert [name for name in COMPARISON_SECTIONS if f'<section id="{name}"' not in dom] == []
