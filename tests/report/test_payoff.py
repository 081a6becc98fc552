import dataclasses
import random
from pathlib import Path
from typing import Any

from codesign.report.payoff import Payoff, by_choice, payoffs, summaries, summary
from codesign.report.study import Study
from codesign.results.record import TrialRecord
from tests.report.recorded import config, failed_record, ok_record, write_study


def study_of(folder: Path, *configs: dict[str, Any], extra: tuple[TrialRecord, ...] = ()) -> Study:
    rng = random.Random(3)
    made = [ok_record(number, plain, rng, tier="confirm") for number, plain in enumerate(configs)]
    return Study.load(write_study(folder, [*made, *extra]))


def the(found: list[Payoff], key: str, name: str, batch: int) -> Payoff:
    return next(p for p in found if (p.key, p.name, p.max_batch_size) == (key, name, str(batch)))


def test_a_pair_differs_in_the_choice_alone(tmp_path: Path) -> None:
    study = study_of(
        tmp_path, config(), config("int8"), config("int8", batch=1), config(batch=1), config("int4", "h2o")
    )

    found = payoffs(study)

    for payoff in found:
        for pair in payoff.pairs:
            if not pair.confounders:
                ours, theirs = dict(pair.trial.config), dict(pair.partner.config)
                choice = {"weights": "weights", "kv.policy": "kv"}[payoff.key]
                assert ours.pop(choice) != theirs.pop(choice)
                assert ours == theirs
    assert [(p.trial.number, p.partner.number) for p in the(found, "weights", "int8", 8).pairs] == [(1, 0)]
    assert [(p.trial.number, p.partner.number) for p in the(found, "weights", "int8", 1).pairs] == [(2, 3)]


def test_a_format_that_pays_at_one_batch_size_and_not_at_another_is_told_so(tmp_path: Path) -> None:
    study = study_of(tmp_path, config(), config("int4"), config(batch=1), config("int4", batch=1))

    text = summary(payoffs(study))

    assert "pays in speed at max_batch_size 1 (1.7" in text
    assert "does not pay in speed at max_batch_size 8 (0.8" in text
    assert "weight bytes 0.31×" in text
    assert "KL divergence +0.03" in text


def test_no_measurable_difference_is_a_tie_and_not_a_gain(tmp_path: Path) -> None:
    study = study_of(tmp_path, config(), config("int8"))

    payoff = the(payoffs(study), "weights", "int8", 8)

    assert payoff.verdict == "no measurable difference"
    assert "makes no measurable difference to speed at max_batch_size 8" in summary([payoff])


def test_without_an_isolated_pair_nothing_is_settled_and_the_confounder_is_named(tmp_path: Path) -> None:
    study = study_of(tmp_path, config(), config("int4", "h2o"))

    payoff = the(payoffs(study), "weights", "int4", 8)

    assert not payoff.is_isolated
    assert payoff.confounders == ("kv.policy",)
    assert "not settled" in summary([payoff])
    assert "kv.policy" in summary([payoff])
    assert "pays" not in summary([payoff])


def test_choices_that_nothing_settles_are_named_in_one_sentence_after_those_that_are(tmp_path: Path) -> None:
    study = study_of(tmp_path, config(), config("int4", "h2o"), config("int8"), config("native", "h2o", batch=32))
    settled, last = summaries(payoffs(study))

    assert settled.startswith("weights int8 ")
    assert last.startswith("Not settled: weights int4 and kv.policy h2o: no two trials differ in one of them alone")


def test_trials_of_other_batch_sizes_are_never_partners(tmp_path: Path) -> None:
    payoff = the(payoffs(study_of(tmp_path, config(), config("int8", batch=32))), "weights", "int8", 32)

    assert payoff.pairs == ()
    assert "nothing comparable ran" in summary([payoff])


def test_a_choice_whose_trials_all_failed_says_so(tmp_path: Path) -> None:
    study = study_of(tmp_path, config(), extra=(failed_record(1, config("int4"), "oom"),))

    assert "all 1 trial failed" in summary(payoffs(study))


def test_several_pairs_show_their_range_and_how_many_were_told_apart(tmp_path: Path) -> None:
    study = study_of(tmp_path, config(), config("int4"), config(dtype="fp32"), config("int4", dtype="fp32"))

    payoff = the(payoffs(study), "weights", "int4", 8)

    assert payoff.told == "slower in 2 of 2 pairs"
    speed = payoff.speed
    assert speed is not None
    values = [change.effect for change in speed.changes]
    assert (speed.low, speed.high) == (min(values), max(values))
    assert min(values) <= speed.typical <= max(values)


def test_pairs_that_disagree_are_called_mixed(tmp_path: Path) -> None:
    rng = random.Random(0)
    made = [ok_record(n, plain, rng, tier="confirm") for n, plain in enumerate([config(), config("int8")])]
    for number, (plain, speed) in enumerate(((config(dtype="fp32"), 100.0), (config("int8", dtype="fp32"), 200.0)), 2):
        record = ok_record(number, plain, rng, tier="confirm")
        metric = dataclasses.replace(
            record.metrics["throughput_tokens_per_s"], value=speed, low=speed - 1, high=speed + 1
        )
        made.append(dataclasses.replace(record, metrics={**record.metrics, "throughput_tokens_per_s": metric}))
    slow = dataclasses.replace(made[1].metrics["throughput_tokens_per_s"], value=700, low=695, high=705)
    made[1] = dataclasses.replace(made[1], metrics={**made[1].metrics, "throughput_tokens_per_s": slow})
    study = Study.load(write_study(tmp_path, made))

    assert the(payoffs(study), "weights", "int8", 8).verdict == "mixed"


def test_nothing_is_compared_without_a_baseline(tmp_path: Path) -> None:
    study = Study.load(write_study(tmp_path, [ok_record(1, config("int8"), random.Random(0))]))

    assert payoffs(study) == []
    assert by_choice([]) == []
