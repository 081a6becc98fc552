import base64
import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest

from codesign.errors import InputError, WorkError
from codesign.report.comparison import write_comparison
from codesign.report.page import write_report
from tests.report.payloads import PAYLOADS, hostile, hostile_inputs
from tests.report.recorded import FAILURES, inputs, records, write_study

MIB = 2**20


@pytest.fixture(scope="module", params=[0, 1, 500])
def page(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, str]:
    folder = write_study(tmp_path_factory.mktemp("study"), records(request.param))
    return request.param, write_report(folder).read_text(encoding="utf-8")


def without_scripts(text: str) -> str:
    return re.sub(r"<(script|style)\b.*?</\1>", "", text, flags=re.DOTALL)


def data_of(text: str) -> dict[str, object]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert found is not None
    return dict(json.loads(found[1]))


def test_the_page_is_small_enough_and_complete(page: tuple[int, str]) -> None:
    count, text = page

    assert len(text.encode()) < (0.1 if count == 0 else 8) * MIB
    assert text.count('<button type="button" class="trial"') == count
    assert len(data_of(text)["details"]) == count  # type: ignore[arg-type]


def test_the_page_asks_the_network_for_nothing(page: tuple[int, str]) -> None:
    markup = without_scripts(page[1])

    assert not re.search(r"""\b(src|srcset|action|poster|data)\s*=""", markup)
    assert set(re.findall(r'href="([^"#][^"]*)"', markup)) == {"trials.csv", "front.json"}
    assert not re.search(r"""\son\w+\s*=""", markup)


def test_the_policy_allows_exactly_the_scripts_and_styles_that_are_there(page: tuple[int, str]) -> None:
    text = page[1]
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)
    assert policy is not None

    def digest(element: str) -> str:
        return "sha256-" + base64.b64encode(hashlib.sha256(element.encode()).digest()).decode()

    scripts = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    scripts += re.findall(r'<script type="text/plain" id="plotly">(.*?)</script>', text, re.DOTALL)
    directives = dict(part.split(" ", 1) for part in policy[1].replace("&#39;", "'").split("; "))
    assert directives["default-src"] == "'none'"
    assert set(directives["script-src"].split()) == {f"'{digest(script)}'" for script in scripts}
    styles = re.findall(r"<style>(.*?)</style>", text, re.DOTALL)
    assert set(directives["style-src"].split()) == {f"'{digest(style)}'" for style in [*styles, ""]}
    assert "unsafe" not in policy[1]


def test_tier_and_samples_stand_beside_every_figure_of_the_table(page: tuple[int, str]) -> None:
    for row in re.findall(r"<tr data-number.*?</tr>", page[1], re.DOTALL):
        figures = re.findall(r'<td data-v="[^"]+">[^<]+<small>([^<]*)</small></td>', row)
        is_measured = any(chip in row for chip in ("on the front<", "feasible<", "breaks a limit<"))
        assert bool(figures) == is_measured
        assert all("n=" in basis for basis in figures)
        assert bool(re.search(r'<td data-v="(screen|confirm|publish)">', row)) == is_measured


def test_every_kind_of_failure_is_shown_with_its_cause(tmp_path: Path) -> None:
    text = write_report(write_study(tmp_path, records(120))).read_text(encoding="utf-8")

    for kind, detail in FAILURES.items():
        assert f">{kind}</span>" in text
        assert detail.split("\n")[0].replace("'", "&#39;").replace('"', "&#34;").replace("<", "&lt;") in text


def test_details_tell_how_to_measure_again_and_how_to_take_it_away(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "a study; rm -rf", records(3))

    details = data_of(write_report(folder).read_text(encoding="utf-8"))["details"]

    commands = details[2]["commands"]  # type: ignore[index]
    assert f"codesign measure '{folder}'/profile.yaml --config '{folder}'/configs/trial-2.yaml" in commands
    assert f"codesign export '{folder}' --trial 2 --to native" in commands


def test_a_damaged_record_is_named_and_the_rest_is_reported(tmp_path: Path) -> None:
    folder = write_study(tmp_path, records(3))
    (folder / "trials" / "torn.json").write_text('{"schema_version": 1, "uid')

    text = write_report(folder).read_text(encoding="utf-8")

    assert "A damaged record was left out: torn.json" in text
    assert text.count('class="trial"') == 3


def test_report_files_are_replaced_as_a_whole(tmp_path: Path) -> None:
    folder = write_study(tmp_path, records(2))
    write_report(folder)
    (folder / "index.html").write_text("old")

    write_report(folder)

    assert (folder / "index.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert {path.name for path in folder.iterdir()} == {
        "trials",
        "study.json",
        "index.html",
        "trials.csv",
        "front.json",
    }


def test_the_same_records_give_the_same_page(tmp_path: Path) -> None:
    folder = write_study(tmp_path, records(20))

    assert write_report(folder).read_bytes() == write_report(folder).read_bytes()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "not a study"),
        ("{", "cannot be read"),
        ("[]", "must be a mapping"),
        ("{}", "at least one objective"),
        ('{"objectives": [{"metric": "speed"}]}', "not an objective"),
        (
            '{"objectives": [{"metric": "tpot", "statistic": "", "direction": "minimize", "unit": ""}]}',
            "did you mean 'tpot_ms'",
        ),
    ],
)
def test_what_is_no_study_is_refused_by_name(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "study.json").write_text(content)

    with pytest.raises(InputError, match=message) as caught:
        write_report(tmp_path)

    assert str(tmp_path) in str(caught.value)


def test_a_folder_that_cannot_be_written_is_a_clear_failure(tmp_path: Path) -> None:
    folder = write_study(tmp_path, records(1))
    (folder / "index.html").mkdir()

    with pytest.raises(WorkError, match=r"index\.html"):
        write_report(folder)


def test_hostile_text_in_every_field_never_becomes_markup(tmp_path: Path) -> None:
    made = [hostile(record, text) for record, text in zip(records(30), PAYLOADS, strict=True)]
    folder = write_study(tmp_path, made, hostile_inputs(" ".join(PAYLOADS), inputs()))

    text = write_report(folder).read_text(encoding="utf-8")

    harmless = write_study(tmp_path / "harmless", records(30))
    plain = write_report(harmless).read_text(encoding="utf-8")
    tags = set(re.findall(r"<[a-z!/][^\s>]*", without_scripts(text)))
    assert tags <= set(re.findall(r"<[a-z!/][^\s>]*", without_scripts(plain)))


def test_two_studies_are_compared_on_the_same_axes(tmp_path: Path) -> None:
    first, second = (write_study(tmp_path / name, records(20, seed=seed)) for seed, name in enumerate(("one", "two")))

    page = write_comparison([first, second])

    text = page.read_text(encoding="utf-8")
    assert page == first / "compare-two.html"
    assert {trace["meta"]["study"] for trace in data_of(text)["figure"]["data"]} == {0, 1}  # type: ignore[index]
    assert "differ: the fronts do not show the same thing" not in text


def test_a_comparison_warns_when_machine_model_or_workload_differ(tmp_path: Path) -> None:
    changes = {
        "models": {"model": "another"},
        "workloads": {"profile": {**inputs()["profile"], "workload": {"scenario": "server"}}},
        "machines": {"profile": {**inputs()["profile"], "hardware": {"name": "other", "device": "cpu"}}},
    }
    first = write_study(tmp_path / "one", records(3))
    for what, change in changes.items():
        second = write_study(tmp_path / what, records(3), inputs(what, **change))

        text = write_comparison([first, second]).read_text(encoding="utf-8")

        assert re.findall(r"Their (\w+) differ", text) == [what]


def test_a_study_cannot_be_compared_with_itself(tmp_path: Path) -> None:
    folder = write_study(tmp_path, records(1))

    with pytest.raises(InputError, match="two different studies"):
        write_comparison([folder, folder])


def test_an_empty_study_can_stand_in_a_comparison(tmp_path: Path) -> None:
    folders = [write_study(tmp_path / name, records(count)) for name, count in (("one", 3), ("none", 0))]

    text = write_comparison(folders).read_text(encoding="utf-8")

    assert "nothing to compare" in text
    shutil.rmtree(folders[0])
