"""The page in a real browser: it draws, sorts, filters and opens, and hostile text stays text."""

import os
import random
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from codesign.report.comparison import write_comparison
from codesign.report.figures import axis_title
from codesign.report.page import write_report
from codesign.report.show import visible
from tests.report.payloads import PAYLOADS, hostile, hostile_inputs
from tests.report.recorded import config, inputs, ok_record, records, write_study

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (set CHROMIUM, or install the package chromium)"),
]
ARGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    with api.sync_playwright() as playwright:
        instance = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGS)
        yield instance
        instance.close()


class Visit:
    """An opened page, and everything that it should not have done."""

    def __init__(self, browser: Any, file: Path, *, fragment: str = "") -> None:
        self.page = browser.new_page(viewport={"width": 1280, "height": 900})
        self.faults: list[str] = []
        self.page.on("dialog", lambda dialog: (self.faults.append(f"dialog {dialog.message}"), dialog.dismiss()))
        self.page.on("request", lambda request: self._see(request.url, file))
        self.page.on("console", lambda said: said.type in ("error", "warning") and self.faults.append(said.text))
        self.page.on("pageerror", lambda error: self.faults.append(f"error {error}"))
        self.page.on("popup", lambda popup: self.faults.append("popup"))
        self.page.goto(file.as_uri() + fragment)
        if self.page.query_selector("#scatter"):
            self.page.wait_for_selector("#scatter .main-svg")

    def _see(self, url: str, file: Path) -> None:
        if url.partition("#")[0] != file.as_uri():
            self.faults.append(f"request {url}")

    def points(self) -> list[tuple[float, float]]:
        """What the scatter holds now, all groups together."""
        found = self.page.evaluate(
            "document.getElementById('scatter').data.filter(t => t.mode === 'markers')"
            ".flatMap(t => t.x.map((x, i) => [x, t.y[i]]))"
        )
        return sorted((x, y) for x, y in found)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(write_study(tmp_path_factory.mktemp("study"), records(40)))


@pytest.fixture(scope="module")
def visit(browser: Any, report: Path) -> Iterator[Visit]:
    opened = Visit(browser, report)
    yield opened
    assert opened.faults == []
    opened.page.close()


def expected(x: str, y: str) -> list[tuple[float, float]]:
    made = [r.metrics for r in records(40) if x in r.metrics and y in r.metrics]
    return sorted((m[x].value, m[y].value) for m in made)


@pytest.mark.parametrize(
    ("x", "y"),
    [
        ("kv_bytes", "tpot_ms"),
        ("peak_memory_bytes", "retrieval_accuracy"),
        ("kl_divergence", "throughput_tokens_per_s"),
    ],
)
def test_both_axes_can_show_any_metric(visit: Visit, x: str, y: str) -> None:
    visit.page.select_option("#x-axis", x)
    visit.page.select_option("#y-axis", y)

    assert visit.points() == expected(x, y)
    assert visit.page.text_content("#scatter .xtitle") == axis_title(x)
    assert visit.page.text_content("#scatter .ytitle") == axis_title(y)


def test_a_logarithmic_axis_says_what_it_cannot_show(visit: Visit) -> None:
    visit.page.select_option("#x-axis", "kl_divergence")
    visit.page.check("#x-log")

    zero = [pair for pair in expected("kl_divergence", "throughput_tokens_per_s") if pair[0] <= 0]
    assert zero
    assert all(x > 0 for x, _ in visit.points())
    assert "zero on a logarithmic" in visit.page.inner_text("#scatter-note")
    visit.page.uncheck("#x-log")


def test_sorting_by_a_metric_orders_rows_both_ways_with_missing_ones_last(visit: Visit) -> None:
    header = visit.page.locator("#trials th", has_text="KL divergence").locator("button")
    index = visit.page.evaluate(
        "[...document.querySelectorAll('#trials th')].findIndex(h => h.textContent.includes('KL divergence'))"
    )

    def column() -> list[str]:
        return list(
            visit.page.evaluate(
                f"[...document.querySelectorAll('#trials tbody tr')].map(r => r.cells[{index}].dataset.v)"
            )
        )

    orders = []
    for _ in range(2):
        header.click()
        values = column()
        measured = [float(value) for value in values if value]
        assert values[len(measured) :] == [""] * (len(values) - len(measured))
        assert len(values) == 40
        orders.append(measured)
    assert orders[0] == sorted(orders[0])
    assert orders[1] == sorted(orders[0], reverse=True)
    visit.page.locator("#trials th button").first.click()
    numbers = [
        int(text)
        for text in visit.page.evaluate("[...document.querySelectorAll('#trials tbody tr')].map(r => r.dataset.number)")
    ]
    assert numbers == sorted(numbers)


def test_the_filter_shows_the_kind_asked_for(visit: Visit) -> None:
    made = records(40)
    counts = {
        "failed": sum(r.outcome.kind != "ok" for r in made),
        "feasible": sum(r.is_feasible for r in made),
        "all": 40,
    }
    for kind, count in counts.items():
        visit.page.select_option("#filter-kind", kind)

        assert visit.page.locator("#trials tbody tr:visible").count() == count
    visit.page.fill("#filter-text", "int4 h2o")
    labels = visit.page.locator("#trials tbody tr:visible td:nth-child(2)").all_inner_texts()
    assert labels
    assert all("int4" in label and "h2o" in label for label in labels)
    visit.page.fill("#filter-text", "")


def test_a_trial_opens_with_its_configuration_and_closes_again(visit: Visit) -> None:
    button = visit.page.locator("#trials tr[data-number='3'] button")

    button.click()

    panel = visit.page.locator("tr.detail")
    text = panel.inner_text()
    assert "max_batch_size: " in text
    assert "--config" in text
    assert "measure" in text
    button.click()
    assert panel.count() == 0


def test_a_failed_trial_shows_its_report(visit: Visit) -> None:
    visit.page.locator("#failures ~ .scroll a", has_text="#7").first.click()

    assert "RuntimeError: shapes" in visit.page.locator("tr.detail pre.failure").inner_text()
    visit.page.locator("#trials tr[data-number='7'] button").click()


def test_the_fragment_opens_a_trial(browser: Any, report: Path) -> None:
    visit = Visit(browser, report, fragment="#trial-2")

    assert visit.page.locator("tr.detail h3").inner_text().startswith("#2 ")
    assert visit.faults == []
    visit.page.close()


def test_nothing_overflows_and_text_keeps_contrast_wide_and_narrow_light_and_dark(browser: Any, report: Path) -> None:
    visit = Visit(browser, report)
    for width in (1280, 400):
        for scheme in ("light", "dark"):
            visit.page.set_viewport_size({"width": width, "height": 900})
            visit.page.emulate_media(color_scheme=scheme)
            # The figure follows the window a moment later.
            visit.page.wait_for_function("width => document.documentElement.scrollWidth <= width", arg=width)

            for selector in (".verdict", ".soft", "a", ".worse", ".better", ".grid td"):
                assert visit.page.evaluate(CONTRAST, selector) >= 4.5, (selector, scheme)
    assert visit.faults == []
    visit.page.close()


# WCAG contrast of the first element's text against the first opaque background below it.
CONTRAST = """selector => {
  const rgb = text => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(c => (c /= 255) <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  let node = document.querySelector(selector);
  const front = rgb(getComputedStyle(node).color);
  let back = [255, 255, 255];
  for (; node; node = node.parentElement) {
    const found = rgb(getComputedStyle(node).backgroundColor);
    if (found.length === 3 || found[3] > 0) { back = found; break; }
  }
  const [a, b] = [light(front), light(back)];
  return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
}"""


def test_five_hundred_trials_load_quickly(browser: Any, tmp_path: Path) -> None:
    file = write_report(write_study(tmp_path, records(500)))

    visit = Visit(browser, file)

    loaded_ms = visit.page.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd")
    drawn_ms = visit.page.evaluate("performance.getEntriesByName('figures drawn')[0].startTime")
    assert visit.page.locator("#trials tbody tr").count() == 500
    assert len(visit.points()) == len([r for r in records(500) if "kl_divergence" in r.metrics])
    print(f"loaded after {loaded_ms:.0f} ms, figures after {drawn_ms:.0f} ms, machine {slowness():.1f} times busy")
    assert loaded_ms < 3000 * slowness()
    assert drawn_ms < 6000 * slowness()
    assert visit.faults == []
    visit.page.close()


def slowness() -> float:
    """How much slower than alone this machine runs now: its load over its cores, at least 1."""
    return max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


@pytest.mark.parametrize("count", [0, 1])
def test_small_studies_open_without_a_fault(browser: Any, tmp_path: Path, count: int) -> None:
    visit = Visit(browser, write_report(write_study(tmp_path, records(count))))

    assert visit.page.locator("#trials tbody tr").count() == count
    assert visit.page.inner_text("#verdict")
    assert visit.faults == []
    visit.page.close()


def squeezed(text: str) -> str:
    return re.sub(r"\s", "", text)


def test_thirty_payloads_in_every_field_stay_text(browser: Any, tmp_path: Path) -> None:
    everything = " ".join(PAYLOADS)
    made = [hostile(record, text) for record, text in zip(records(30), PAYLOADS, strict=True)]
    file = write_report(write_study(tmp_path, made, hostile_inputs(everything, inputs())))

    visit = Visit(browser, file)

    page = visit.page
    assert page.text_content("h1") == visible(everything)
    facts = " ".join(page.locator(".facts span").all_text_contents())
    assert f"model: {visible(everything)}" in facts
    page.evaluate("for (const b of document.querySelectorAll('#trials tbody button')) b.click()")
    panels = page.locator("tr.detail").all_text_contents()
    assert len(panels) == 30
    for panel, record, text in zip(panels, made, PAYLOADS, strict=True):
        shown = visible(text)
        fields = 8 if record.outcome.kind == "ok" else 6
        assert panel.count(shown) >= fields, shown
        for warning in page.locator(".warn").all_text_contents():
            assert warning in {visible(payload) for payload in PAYLOADS}
    hovers = page.evaluate(HOVER)
    assert len(hovers) > 20
    for title, text in hovers:
        assert squeezed(title) in squeezed(text)
    for kind in ("click", "mouseover", "focus"):
        page.evaluate(
            "kind => { for (const n of document.querySelectorAll('main *')) if (!n.closest('a,button,#scatter')) "
            "n.dispatchEvent(new Event(kind, { bubbles: true })) }",
            kind,
        )
    page.wait_for_timeout(300)
    assert page.evaluate("window.hacked") is None
    assert page.locator("main script, main iframe, main base, main img, main object, main embed").count() == 0
    assert visit.faults == []
    page.close()


# Hovers over each point of the scatter: [title in the data, text on the figure].
HOVER = """async () => {
  const data = JSON.parse(document.getElementById("data").textContent), figure = document.getElementById("scatter");
  const found = [];
  for (const [curveNumber, trace] of figure.data.entries()) {
    for (const [pointNumber, row] of (trace.customdata || []).entries()) {
      await new Promise(done => setTimeout(done, 60));  // Plotly looks at one hover in 50 ms
      Plotly.Fx.unhover(figure);
      Plotly.Fx.hover(figure, [{ curveNumber, pointNumber }]);
      found.push([data.studies[0].titles[row], figure.querySelector(".hoverlayer").textContent]);
    }
  }
  return found;
}"""


def test_hostile_studies_can_be_compared(browser: Any, tmp_path: Path) -> None:
    folders = []
    for name, texts in (("one", PAYLOADS[:15]), ("two", PAYLOADS[15:])):
        made = [hostile(ok_record(n, config(), random.Random(n)), text) for n, text in enumerate(texts)]
        folders.append(write_study(tmp_path / name, made, hostile_inputs(" ".join(texts), inputs())))

    visit = Visit(browser, write_comparison(folders))

    assert visible(PAYLOADS[0]) in str(visit.page.text_content("h1"))
    assert visit.page.locator("#fronts tbody tr").count() > 0
    assert visit.faults == []
    visit.page.close()
