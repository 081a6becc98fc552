"""reports/benchmarks/gpu.md says what the files beside it say."""

from tests.benchmarks.gpu_report import PARTS, REPORTS, report


def test_the_report_is_in_step_with_what_was_measured() -> None:
    folder = REPORTS / "gpu"

    assert {file.stem for file in folder.glob("*.json")} <= set(PARTS)
    assert (REPORTS / "gpu.md").read_text() == report(folder) + "\n"
