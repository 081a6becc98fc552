"""The loop itself: what is tried, told, kept and where it stops."""

from pathlib import Path

import optuna
import pytest

from codesign.errors import InputError, WorkError
from codesign.results.ledger import read_records
from codesign.results.pareto import front
from codesign.results.record import OutcomeKind, TrialIdentity, TrialRecord
from codesign.search import study
from codesign.search.interrupt import Interrupt
from codesign.search.limits import Limits
from codesign.search.misfit import Misfit
from codesign.spec.engine_config import EngineConfig
from tests.search.fake_measure import OBJECTIVES, FakeMeasure, OnPhase
from tests.search.studies import Heard, optuna_trials, run_study, space_of


def test_trial_0_is_the_unmodified_configuration(tmp_path: Path) -> None:
    result = run_study(tmp_path, space_of(tmp_path), limits=Limits(trials=3))

    expected = EngineConfig(max_model_len=512).resolve()
    assert result.records[0].number == 0
    assert result.records[0].config == expected.to_dict()


def test_the_same_study_goes_on_to_its_total_and_no_further(tmp_path: Path) -> None:
    space, measure = space_of(tmp_path), FakeMeasure()
    run_study(tmp_path, space, measure=measure, limits=Limits(trials=4))
    run_study(tmp_path, space, measure=measure, limits=Limits(trials=7))
    result = run_study(tmp_path, space, measure=measure, limits=Limits(trials=7))

    assert [record.number for record in result.records] == list(range(7))
    assert len(measure.calls) == 7
    assert "7" in result.stopped


def test_no_configuration_is_measured_twice_and_an_exhausted_space_is_said(tmp_path: Path) -> None:
    space, measure = space_of(tmp_path, "max_batch_size: [1, 2, 4]\nmax_step_tokens: [128, 256]\n"), FakeMeasure()
    result = run_study(tmp_path, space, measure=measure, limits=Limits(trials=50))

    digests = [config.digest for _, config in measure.calls]
    # Six points and the unmodified configuration's own batch size and step are in range already or replaced.
    assert len(digests) == len(set(digests)) == space.size
    assert "every configuration" in result.stopped


def test_two_of_four_at_a_small_batch_is_never_tried(tmp_path: Path) -> None:
    text = "max_batch_size: [8, 64]\nprune: {none: {}, wanda: {pattern: [two_of_four]}}\n"
    space, measure = space_of(tmp_path, text), FakeMeasure()

    result = run_study(tmp_path, space, measure=measure, limits=Limits(trials=50))

    tried = {(config.max_batch_size, config.prune.name) for _, config in measure.calls}
    assert tried == {(8, "none"), (64, "none"), (64, "wanda")}
    assert "every configuration that the search space allows" in result.stopped


def test_an_interrupted_study_draws_what_an_uninterrupted_one_draws(tmp_path: Path) -> None:
    space = space_of(tmp_path)
    whole = run_study(tmp_path / "a", space, limits=Limits(trials=14))
    for total in (1, 5, 12, 14):
        parts = run_study(tmp_path / "b", space, limits=Limits(trials=total))

    assert [record.config_digest for record in parts.records] == [record.config_digest for record in whole.records]


def test_two_seeds_search_differently(tmp_path: Path) -> None:
    space = space_of(tmp_path)
    one = run_study(tmp_path / "a", space, seed=1)
    two = run_study(tmp_path / "b", space, seed=2)

    assert [r.config_digest for r in one.records] != [r.config_digest for r in two.records]


def test_configurations_that_the_space_rules_out_are_neither_measured_nor_counted(tmp_path: Path) -> None:
    space = space_of(
        tmp_path,
        "max_batch_size: [1, 2, 4, 8, 16]\nmax_step_tokens: [128, 512, 2048]\n"
        "constraints:\n- when: {max_batch_size: 16, max_step_tokens: 2048}\n  reason: too much at once\n",
    )
    measure = FakeMeasure()
    result = run_study(tmp_path, space, measure=measure, limits=Limits(trials=20))

    assert len(measure.calls) == len(result.records) == 14
    assert not any(c.max_batch_size == 16 and c.max_step_tokens == 2048 for _, c in measure.calls)


@pytest.mark.parametrize("kind", ["oom", "crashed", "unsupported", "numerical", "killed_by_os", "protocol"])
def test_a_failed_trial_is_kept_and_told_as_infeasible_with_finite_sentinels(tmp_path: Path, kind: OutcomeKind) -> None:
    measure = FakeMeasure(outcome=lambda config: kind if config.max_batch_size == 16 else "ok")
    result = run_study(tmp_path, space_of(tmp_path), measure=measure, limits=Limits(trials=10))

    failed = {record.uid for record in result.records if record.outcome.kind == kind}
    assert failed
    told = [trial for trial in optuna_trials(tmp_path) if trial.user_attrs.get("uid") in failed]
    assert len(told) == len(failed)
    for trial in told:
        assert trial.state == optuna.trial.TrialState.COMPLETE
        assert max(trial.constraints.values()) > 0
        assert trial.user_attrs["sentinel"] is True
    assert not failed & {record.uid for record in front(result.records, OBJECTIVES)}


def test_a_sentinel_is_worse_than_anything_seen_before(tmp_path: Path) -> None:
    measure = FakeMeasure(outcome=lambda config: "oom" if config.max_batch_size == 16 else "ok")
    result = run_study(tmp_path, space_of(tmp_path), measure=measure, limits=Limits(trials=12))

    by_uid = {trial.user_attrs.get("uid"): trial for trial in optuna_trials(tmp_path)}
    for place, record in enumerate(result.records):
        earlier = [r for r in result.records[:place] if r.outcome.kind == "ok"]
        if record.outcome.kind == "oom" and earlier:
            throughput, memory = by_uid[record.uid].values
            assert throughput < min(r.metrics["throughput_tokens_per_s"].value for r in earlier)
            assert memory > max(r.metrics["peak_memory_bytes"].value for r in earlier)


def test_a_broken_limit_keeps_its_measured_values_and_is_infeasible(tmp_path: Path) -> None:
    def measure(identity: TrialIdentity, config: EngineConfig, on_phase: OnPhase) -> TrialRecord:
        import dataclasses

        record = FakeMeasure()(identity, config, on_phase)
        return dataclasses.replace(record, violations={"slo.tpot_ms.p99": 0.25})

    run_study(tmp_path, space_of(tmp_path), measure=measure, limits=Limits(trials=2))

    for trial in optuna_trials(tmp_path):
        assert trial.constraints["slo.tpot_ms.p99"] == 0.25
        assert "sentinel" not in trial.user_attrs


def test_infrastructure_failures_are_tried_again_as_further_attempts_at_the_same_trial(tmp_path: Path) -> None:
    measure = FakeMeasure()
    measure.outcome = lambda config: "harness" if len(measure.calls) in (3, 4) else "ok"
    result = run_study(tmp_path, space_of(tmp_path), measure=measure, limits=Limits(trials=4))

    assert [(r.number, r.attempt, r.outcome.kind) for r in result.records] == [
        (0, 0, "ok"),
        (1, 0, "ok"),
        (2, 0, "harness"),
        (2, 1, "harness"),
        (2, 2, "ok"),
        (3, 0, "ok"),
    ]
    assert len({r.config_digest for r in result.records if r.number == 2}) == 1
    states = [trial.state.name for trial in optuna_trials(tmp_path)]
    assert states == ["COMPLETE", "COMPLETE", "FAIL", "FAIL", "COMPLETE", "COMPLETE"]


def test_a_hang_is_tried_once_more_and_then_counts(tmp_path: Path) -> None:
    measure = FakeMeasure()
    measure.outcome = lambda config: "hang" if len(measure.calls) in (2, 4, 5) else "ok"
    result = run_study(tmp_path, space_of(tmp_path), measure=measure, limits=Limits(trials=3))

    assert [(r.number, r.attempt, r.outcome.kind) for r in result.records] == [
        (0, 0, "ok"),
        (1, 0, "hang"),
        (1, 1, "ok"),
        (2, 0, "hang"),
        (2, 1, "hang"),
    ]
    told = [trial for trial in optuna_trials(tmp_path) if trial.state.name == "COMPLETE"]
    assert [bool(trial.user_attrs.get("sentinel")) for trial in told] == [False, False, True]


def test_a_trial_that_a_worker_measured_in_another_world_does_not_count(tmp_path: Path) -> None:
    fake = FakeMeasure()

    def measure(identity: TrialIdentity, config: EngineConfig, on_phase: OnPhase) -> TrialRecord:
        import dataclasses

        record = fake(identity, config, on_phase)
        torch = "2.14" if len(fake.calls) == 2 else "2.13"
        return dataclasses.replace(record, provenance={"versions": {"torch": torch}})

    result = run_study(tmp_path, space_of(tmp_path), measure=measure, limits=Limits(trials=3))

    assert [(r.number, r.attempt, r.outcome.kind) for r in result.records] == [
        (0, 0, "ok"),
        (1, 0, "harness"),
        (1, 1, "ok"),
        (2, 0, "ok"),
    ]
    odd = result.records[1]
    assert "torch was 2.13, is 2.14" in odd.outcome.detail
    assert not odd.metrics


def test_infrastructure_that_never_works_stops_the_study_with_the_reason(tmp_path: Path) -> None:
    measure = FakeMeasure(outcome=lambda config: "harness")

    with pytest.raises(WorkError, match="trial 0 could not be run in 3 attempts"):
        run_study(tmp_path, space_of(tmp_path), measure=measure)
    assert len(measure.calls) == 3

    measure.outcome = lambda config: "ok"
    result = run_study(tmp_path, space_of(tmp_path), measure=measure, limits=Limits(trials=2))
    assert [(r.number, r.attempt, r.outcome.kind) for r in result.records][3:] == [(0, 3, "ok"), (1, 0, "ok")]


def test_what_cannot_fit_is_recorded_without_being_built_and_does_not_count(tmp_path: Path) -> None:
    measure = FakeMeasure()

    def predict(config: EngineConfig) -> Misfit | None:
        return Misfit("needs 3 GiB, has 2 GiB", 0.5) if config.max_batch_size == 16 else None

    result = run_study(tmp_path, space_of(tmp_path), measure=measure, predict=predict, limits=Limits(trials=10))

    predicted = [r for r in result.records if r.config["max_batch_size"] == 16]
    assert predicted
    assert all(r.outcome.kind == "oom" and r.outcome.detail.startswith("predicted: needs") for r in predicted)
    assert len(measure.calls) == 10
    assert not any(config.max_batch_size == 16 for _, config in measure.calls)
    by_uid = {trial.user_attrs.get("uid"): trial for trial in optuna_trials(tmp_path)}
    assert all(by_uid[r.uid].constraints["memory"] == 0.5 for r in predicted)


def test_a_space_that_holds_nothing_that_fits_comes_to_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "MAX_MISFITS", 7)
    space = space_of(tmp_path, "max_step_tokens: {low: 128, high: 100000}\n")
    result = run_study(tmp_path, space, predict=lambda config: Misfit("too large", 1.0), limits=Limits(trials=5))

    assert len(result.records) == 7
    assert "would not fit" in result.stopped


def test_the_budget_ends_the_run_before_a_trial_that_would_not_fit(tmp_path: Path) -> None:
    measure = FakeMeasure(seconds=0.3)
    limits = Limits(trials=None, budget_s=1.5)
    result = run_study(tmp_path, space_of(tmp_path), measure=measure, limits=limits)

    assert 1 <= len(result.records) <= 5
    assert "budget" in result.stopped


def test_trial_0_is_measured_however_small_the_budget(tmp_path: Path) -> None:
    result = run_study(tmp_path, space_of(tmp_path), limits=Limits(trials=None, budget_s=1e-6))

    assert [record.number for record in result.records] == [0]


def test_another_profile_or_space_under_the_same_name_is_refused(tmp_path: Path) -> None:
    run_study(tmp_path, space_of(tmp_path), limits=Limits(trials=1))

    with pytest.raises(InputError, match="another profile"):
        run_study(tmp_path, space_of(tmp_path), profile="other")
    with pytest.raises(InputError, match="another space"):
        run_study(tmp_path, space_of(tmp_path, "max_batch_size: [1, 2]\n"))
    assert len(read_records(tmp_path / "study" / "trials")[0]) == 1


def test_the_default_name_tells_studies_of_different_inputs_apart(tmp_path: Path) -> None:
    run_study(tmp_path, space_of(tmp_path), name=None, limits=Limits(trials=1))
    run_study(tmp_path, space_of(tmp_path), name=None, profile="other", limits=Limits(trials=1))

    names = sorted(path.name for path in tmp_path.iterdir() if path.is_dir())
    assert len(names) == 2
    assert all(name.startswith("small-") and len(name) == len("small-") + 6 for name in names)


@pytest.mark.parametrize("name", ["", "..", "a/b", "/etc", "-x", "benchmarks", "a" * 101, "a b", "a\n"])
def test_a_name_that_is_no_folder_name_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="cannot name a study"):
        run_study(tmp_path / "out", space_of(tmp_path), name=name)


def test_a_second_search_in_the_same_study_is_kept_out(tmp_path: Path) -> None:
    space = space_of(tmp_path)

    def measure(identity: TrialIdentity, config: EngineConfig, on_phase: OnPhase) -> TrialRecord:
        with pytest.raises(WorkError, match="another search is running"):
            run_study(tmp_path, space)
        return FakeMeasure()(identity, config, on_phase)

    assert len(run_study(tmp_path, space, measure=measure, limits=Limits(trials=1)).records) == 1


def test_each_trial_leaves_the_configuration_that_measure_takes(tmp_path: Path) -> None:
    from codesign.spec.engine_config import load_config

    result = run_study(tmp_path, space_of(tmp_path), limits=Limits(trials=3))

    for record in result.records:
        path = tmp_path / "study" / "configs" / f"trial-{record.number}.yaml"
        assert load_config(path).resolve().digest == record.config_digest


def test_ctrl_c_in_a_trial_keeps_the_finished_ones_and_writes_the_report(tmp_path: Path) -> None:
    interrupt, reports = Interrupt(), []
    fake = FakeMeasure()

    def measure(identity: TrialIdentity, config: EngineConfig, on_phase: OnPhase) -> TrialRecord:
        if identity.number == 3:
            import os
            import signal

            os.kill(os.getpid(), signal.SIGINT)
        return fake(identity, config, on_phase)

    with interrupt.installed():
        result = run_study(
            tmp_path,
            space_of(tmp_path),
            measure=measure,
            interrupt=interrupt,
            write_report=lambda: reports.append(len(read_records(tmp_path / "study" / "trials")[0])),
        )

    assert result.was_interrupted
    assert interrupt.exit_status == 130
    assert [record.number for record in result.records] == [0, 1, 2]
    assert reports[-1] == 3
    assert not [trial for trial in optuna_trials(tmp_path) if not trial.state.is_finished()]


def test_a_measurement_that_answers_for_another_trial_is_a_bug_and_not_recorded(tmp_path: Path) -> None:
    import dataclasses

    def measure(identity: TrialIdentity, config: EngineConfig, on_phase: OnPhase) -> TrialRecord:
        return dataclasses.replace(FakeMeasure()(identity, config, on_phase), uid="forged")

    with pytest.raises(RuntimeError, match="forged"):
        run_study(tmp_path, space_of(tmp_path), measure=measure)
    assert read_records(tmp_path / "study" / "trials") == ([], [])


def test_progress_hears_each_phase_and_record(tmp_path: Path) -> None:
    heard = Heard()
    run_study(tmp_path, space_of(tmp_path), heard=heard, limits=Limits(trials=2))

    assert heard.phases == ["measure", "measure"]
    assert [record.number for record in heard.finished_records] == [0, 1]
