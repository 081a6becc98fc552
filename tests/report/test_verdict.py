import dataclasses
import random
from pathlib import Path

from codesign.report.compare import change
from codesign.report.page import write_report
from codesign.report.payoff import payoffs, summary
from codesign.report.study import Study
from codesign.report.verdict import Verdict, pick_tie, verdict
from codesign.results.record import TrialRecord
from codesign.spec.metrics import METRICS, Objective
from tests.report.recorded import config, failed_record, inputs, interval, ok_record, records, write_study


def said(folder: Path, made: list[TrialRecord]) -> Verdict:
    study = Study.load(write_study(folder, made))
    return verdict(study, payoffs(study))


def test_an_empty_study_says_that_it_is_empty(tmp_path: Path) -> None:
    assert said(tmp_path, []) == Verdict(headline="No trial has finished yet.")


def test_a_study_where_everything_failed_says_how(tmp_path: Path) -> None:
    found = said(tmp_path, [failed_record(n, config(), kind) for n, kind in enumerate(["oom", "oom", "hang"])])

    assert found.headline == "None of the 3 trials could be measured."
    assert found.points == ("3 of 3 trials failed: 2 oom and 1 hang.",)


def test_when_no_configuration_keeps_the_limits_the_closest_is_named_with_its_excess(tmp_path: Path) -> None:
    made = [ok_record(n, config("int8", batch=8 if n else 4), random.Random(0)) for n in range(3)]
    made = [dataclasses.replace(r, violations={"slo.tpot_ms.p99": 0.5 - 0.1 * r.number}) for r in made]

    found = said(tmp_path, made)

    assert found.headline == "None of the 3 measured configurations keeps the limits."
    assert "#2" in found.points[0]
    assert "slo.tpot_ms.p99 by 30 %" in found.points[0]


def test_one_trial_is_nothing_to_choose_from(tmp_path: Path) -> None:
    found = said(tmp_path, records(1))

    assert found.headline.startswith("Only the unmodified configuration has been measured")
    assert "n=38" in found.points[0]


def test_a_real_gain_is_stated_with_interval_quality_samples_and_tier(tmp_path: Path) -> None:
    made = [ok_record(0, config(batch=1), random.Random(1)), ok_record(1, config("int8", batch=1), random.Random(2))]

    headline = said(tmp_path, made).headline

    assert "the fastest, weights int8, gives 1.4" in headline
    assert "× [" in headline
    assert "at KL divergence 0.0017" in headline
    assert "(n=38, screen)" in headline


def test_a_gain_without_quality_says_that_quality_was_not_measured(tmp_path: Path) -> None:
    made = [ok_record(0, config(batch=1), random.Random(1)), ok_record(1, config("int8", batch=1), random.Random(2))]
    only = ("throughput_tokens_per_s", "peak_memory_bytes")
    made = [dataclasses.replace(r, metrics={name: r.metrics[name] for name in only}) for r in made]
    folder = write_study(tmp_path, made)
    (folder / "study.json").write_text(
        '{"objectives": [{"metric": "throughput_tokens_per_s", "statistic": "", "direction": "maximize", "unit": ""}]}'
    )
    study = Study.load(folder)

    assert "quality not measured" in verdict(study, payoffs(study)).headline


def equal_configurations(rng: random.Random) -> Study:
    """Forty configurations that are equally fast, measured with 2 % noise and honest intervals."""
    made = []
    for number in range(40):
        value = interval(1000 * rng.gauss(1, 0.02), 1.96 * 0.02, "tokens/s")
        metrics = {**PLAIN.metrics, "throughput_tokens_per_s": value}
        plain = config(max_step_tokens=1024 + number)
        made.append(dataclasses.replace(PLAIN, number=number, uid=f"u{number}", config=plain, metrics=metrics))
    objectives = (Objective.of("throughput_tokens_per_s"), Objective.of("kl_divergence"))
    return Study(folder=Path("equal"), inputs={}, objectives=objectives, records=tuple(made))


PLAIN = ok_record(0, config(), random.Random(0), tier="publish")


def test_the_luckiest_of_equal_configurations_is_called_faster_in_at_most_one_study_of_twenty() -> None:
    """The winner's curse: without widening, more than one of these studies in five names a winner."""
    rng = random.Random(7)
    studies = [equal_configurations(rng) for _ in range(200)]

    claims = [", gives " in verdict(study, []).headline for study in studies]
    naive = [
        change(study.trial(study.picks["fastest"]), study.records[0], "throughput_tokens_per_s") for study in studies
    ]

    assert sum(claims) <= 0.05 * len(studies)
    assert sum(found is not None and found.judgement == "better" for found in naive) > 0.2 * len(studies)
    assert all("by chance alone" in verdict(study, []).points[-1] for study in studies[:3])


def test_a_failed_baseline_forbids_any_gain(tmp_path: Path) -> None:
    found = said(tmp_path, [failed_record(0, config(), "oom"), ok_record(1, config("int8"), random.Random(0))])

    assert "the unmodified configuration could not be measured, so no gain can be stated" in found.headline


def test_formats_that_do_not_pay_are_said_aloud(tmp_path: Path) -> None:
    rng = random.Random(0)
    made = [ok_record(n, config(weights), rng, tier="confirm") for n, weights in enumerate(["native", "int8", "int4"])]

    found = said(tmp_path, made)

    assert any(point.startswith("Weights int4 does not pay in speed") for point in found.points)


def test_a_pick_says_whom_it_is_tied_with(tmp_path: Path) -> None:
    rng = random.Random(0)
    made = [ok_record(n, config(max_step_tokens=1024 + n), rng) for n in range(4)]
    study = Study.load(write_study(tmp_path, made))
    fastest = study.trial(study.picks["fastest"])

    text = pick_tie(study, "fastest", fastest)

    assert text.startswith("No measurable difference in throughput to #")
    assert f"#{fastest.number}" not in text


def test_a_trial_without_speed_gets_no_claim_of_speed(tmp_path: Path) -> None:
    """As an emulation leaves it: on the front for its bytes, and nowhere said to be fast or slow."""
    made = [ok_record(0, config(), random.Random(1)), ok_record(1, config("int8"), random.Random(2))]
    kept = {name: value for name, value in made[1].metrics.items() if not METRICS[name].is_timed}
    made[1] = dataclasses.replace(made[1], metrics=kept, requests=(), monitor={}, violations={})
    objectives = [item for item in inputs()["objectives"] if not METRICS[item["metric"]].is_timed]
    study = Study.load(write_study(tmp_path, made, inputs(objectives=objectives)))

    found = payoffs(study)

    assert {record.number for record in study.front} == {0, 1}
    assert "fastest" not in study.picks
    assert verdict(study, found).headline.endswith("no fastest configuration could be named.")
    assert [payoff.verdict for payoff in found] == ["unknown"]
    assert "speed not measured" in summary(found)
    assert write_report(tmp_path).exists()
