"""What the report says of several ranks: in isolation, and as the best that was found."""

import dataclasses
import random
from pathlib import Path
from typing import Any

from codesign.report.labels import Labels, plan_name
from codesign.report.payoff import payoffs, summary
from codesign.report.ranks import rank_points
from codesign.report.study import Study
from codesign.report.verdict import verdict
from tests.report.recorded import config, interval, ok_record, write_study


def spread(tensor: int = 1, stages: int = 1, micro_batches: int = 1, **how: Any) -> dict[str, Any]:
    plan = {
        "tensor_parallel_size": tensor,
        "pipeline_parallel_size": stages,
        "num_micro_batches": micro_batches,
    }
    return {**config(**how), "parallel": plan}


def study_of(folder: Path, *trials: tuple[dict[str, Any], float]) -> Study:
    """Of configurations and their throughput, known within 2 %."""
    rng, records = random.Random(3), []
    for number, (plain, throughput) in enumerate(trials):
        record = ok_record(number, plain, rng, tier="confirm")
        known = interval(throughput, 0.02, "tokens/s")
        records.append(dataclasses.replace(record, metrics={**record.metrics, "throughput_tokens_per_s": known}))
    return Study.load(write_study(folder, records))


def test_a_plan_is_one_choice_with_a_name() -> None:
    assert plan_name(spread()) == plan_name({}) == "one rank"
    assert plan_name(spread(tensor=2)) == "tensor 2"
    assert plan_name(spread(stages=2)) == "pipeline 2"
    assert plan_name(spread(tensor=2, stages=2, micro_batches=4)) == "tensor 2 x pipeline 2, 4 micro-batches"


def test_a_label_names_the_plan_once() -> None:
    several, one = spread(stages=2, micro_batches=2, weights="int8"), spread()

    assert Labels(one, [one, several]).of(several) == "weights int8 · parallel pipeline 2, 2 micro-batches"
    assert Labels(several, [one, several]).of(one) == "weights native · parallel one rank"


def test_a_pair_may_differ_in_degree_and_micro_batches_together(tmp_path: Path) -> None:
    study = study_of(tmp_path, (spread(), 100), (spread(stages=2, micro_batches=2), 120))

    (payoff,) = payoffs(study)

    assert payoff.is_isolated
    assert (payoff.key, payoff.name, payoff.verdict) == ("parallel", "pipeline 2, 2 micro-batches", "faster")


def test_a_plan_that_pays_at_one_batch_size_only_is_told_with_intervals(tmp_path: Path) -> None:
    study = study_of(
        tmp_path,
        (spread(), 100),
        (spread(tensor=2), 120),
        (spread(batch=1), 50),
        (spread(batch=1, tensor=2), 40),
    )

    text = summary(payoffs(study))

    assert "parallel tensor 2 pays in speed at max_batch_size 8 (1.2× [1.17–1.23])" in text
    assert "does not pay in speed at max_batch_size 1 (0.8× [0.778–0.823])" in text


def test_the_best_of_each_plan_stands_against_the_best_on_one_rank(tmp_path: Path) -> None:
    study = study_of(
        tmp_path,
        (spread(), 100),
        (spread(batch=32), 150),
        (spread(tensor=2), 90),
        (spread(tensor=2, weights="int8"), 300),
        (spread(stages=2), 120),
    )

    first, pipeline, tensor = rank_points(study)

    assert "on one rank is #1, 150 tokens/s" in first
    assert first.endswith("several ranks beat it measurably with tensor 2.")
    assert "Best of 1 trial with pipeline 2: #4, 120 tokens/s" in pipeline
    assert "0.8× [" in pipeline and "× its peak memory" in pipeline and "differs in max_batch_size too" in pipeline
    assert "Best of 2 trials with tensor 2: #3, 300 tokens/s" in tensor
    assert "2× [" in tensor and "differs in weights and max_batch_size too" in tensor
    assert first in verdict(study, payoffs(study)).points


def test_several_ranks_that_do_not_help_are_said_not_to(tmp_path: Path) -> None:
    first, _ = rank_points(study_of(tmp_path, (spread(), 100), (spread(tensor=2), 101)))

    assert first.endswith("several ranks do not beat it measurably with any plan.")


def test_a_study_of_one_plan_says_nothing_of_ranks(tmp_path: Path) -> None:
    assert rank_points(study_of(tmp_path, (config(), 100), (config("int8"), 120))) == ()
