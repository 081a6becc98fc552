"""One trial end to end: real nursery, real child, real engine, real clocks."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from codesign.engine.models.tiny import tiny_config
from codesign.measure import suite as suites
from codesign.measure import trial as trials
from codesign.measure.ruler import TASKS
from codesign.measure.suite import SuiteSize
from codesign.measure.tier import RULES
from codesign.measure.trial import TrialRunner
from codesign.results.record import TrialIdentity, TrialRecord
from codesign.spec.engine_config import Choice, EngineConfig
from codesign.spec.metrics import METRICS, Objective
from codesign.spec.model import ModelSpec
from codesign.spec.profile import Profile, load_profile
from codesign.spec.rules import unjudged
from codesign.spec.slo import Slo

PROFILE = """
hardware: {name: here, device: cpu, cores: 1}
model: bundled
workload: {scenario: offline, prompt_tokens: 24, output_tokens: 8, num_requests: 4}
slo: {tpot_ms: {p50: 0.000001}, quality: {max_kl: 10}}
objectives: [throughput_tokens_per_s, kl_divergence]
"""
BASELINE = EngineConfig.from_dict({"dtype": "fp32", "max_batch_size": 2, "max_model_len": 256}).resolve()


@pytest.fixture(scope="module", autouse=True)
def _short() -> Iterator[None]:
    size = SuiteSize(num_sequences=3, sequence_tokens=48, num_prompts=2, prompt_tokens=200)
    rule = dataclasses.replace(RULES["screen"], min_s=0.05, min_requests=4, warm_up_s=0.05, suite=size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(trials.RULES, "screen", rule)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trial")


@pytest.fixture(scope="module")
def profile(folder: Path) -> Profile:
    (folder / "p.yaml").write_text(PROFILE)
    return load_profile(folder / "p.yaml")


@pytest.fixture(scope="module")
def runner(profile: Profile, folder: Path) -> Iterator[TrialRunner]:
    with TrialRunner(profile, baseline=BASELINE, cache_dir=folder / "cache") as runner:
        yield runner


@pytest.fixture(scope="module")
def baseline(runner: TrialRunner) -> TrialRecord:
    return measured(runner)


def measured(runner: TrialRunner, number: int = 0, **changes: Any) -> TrialRecord:
    config = EngineConfig.from_dict({**BASELINE.to_dict(), **changes}).resolve()
    return runner.measure(TrialIdentity(study="s", number=number, uid=f"u{number}"), config)


def test_a_trial_leaves_a_complete_record(baseline: TrialRecord) -> None:
    record = baseline

    assert record.outcome.kind == "ok"
    for name in ("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms", "throughput_tokens_per_s", "kl_divergence", "perplexity"):
        assert record.metrics[name].value >= 0, name
        assert record.metrics[name].num_samples >= 3, name
    assert {"weights", "kv", "peak"} <= set(record.bytes)
    assert {"spawn_s", "build_s", "warm_up_s", "measure_s", "quality_s", "close_s"} <= set(record.phases)
    assert record.monitor["source"] == "psutil"
    assert record.kernels["attention"]
    assert {"machine", "versions", "model", "profile", "seed", "code"} <= set(record.provenance)
    assert len(record.requests) == record.trust["num_requests"]
    assert TrialRecord.from_json(record.to_json()) == record


def test_the_unmodified_configuration_agrees_with_its_own_reference(baseline: TrialRecord) -> None:
    assert baseline.metrics["kl_divergence"].value < 1e-7
    assert baseline.metrics["top1_agreement"].value == 1.0


def test_what_all_others_are_compared_with_is_measured_twice_as_long(
    runner: TrialRunner, baseline: TrialRecord
) -> None:
    other = measured(runner, 1)

    assert baseline.trust["num_blocks"] >= 2 * RULES["screen"].min_blocks
    assert other.trust["num_blocks"] >= RULES["screen"].min_blocks


def test_int8_weights_hold_fewer_bytes_and_move_the_output(runner: TrialRunner, baseline: TrialRecord) -> None:
    int8 = measured(runner, 1, weights="int8")

    assert int8.bytes["weights"] < 0.6 * baseline.bytes["weights"]
    assert int8.metrics["kl_divergence"].value > 1e-6


def test_a_broken_service_level_is_a_violation(baseline: TrialRecord) -> None:
    assert baseline.violations["slo.tpot_ms.p50"] > 0
    assert baseline.violations["slo.quality.max_kl"] <= 0
    assert not baseline.is_feasible


def test_a_configuration_that_cannot_be_built_is_a_typed_result(runner: TrialRunner) -> None:
    """The context of the bundled model is shorter than this."""
    record = measured(runner, max_model_len=10**6)

    assert record.outcome.kind == "unsupported"
    assert "positions" in record.outcome.detail
    assert record.metrics == {}


EMULATED = {"name": "fp8", "emulated": True}


def test_an_emulation_is_not_measured_where_speed_is_asked_for(runner: TrialRunner) -> None:
    record = measured(runner, 1, weights=EMULATED)

    assert record.outcome.kind == "unsupported"
    assert "no speed, and the profile asks for throughput_tokens_per_s, tpot_ms" in record.outcome.detail
    assert record.metrics == record.phases == {}
    assert not record.is_feasible


@pytest.mark.parametrize("asked", ["slo", "objectives"])
def test_a_limit_on_speed_asks_for_it_as_much_as_an_objective(profile: Profile, asked: str) -> None:
    only = dataclasses.replace(
        profile, **{asked: {"slo": Slo(), "objectives": (Objective.of("kl_divergence"),)}[asked]}
    )

    assert unjudged(EngineConfig(weights=Choice.of("fp8", emulated=True)), only.asked_metrics)


def test_an_emulation_leaves_quality_and_bytes_and_no_time_in_its_record(profile: Profile, folder: Path) -> None:
    objectives = (Objective.of("kl_divergence"), Objective.of("weights_bytes"))
    quality = dataclasses.replace(profile, objectives=objectives, slo=Slo())
    with TrialRunner(quality, baseline=BASELINE, cache_dir=folder / "cache") as runner:
        record = measured(runner, 1, weights=EMULATED)

    assert record.outcome.kind == "ok"
    assert {"kl_divergence", "top1_agreement", "perplexity", "weights_bytes", "kv_bytes"} <= set(record.metrics)
    assert not [name for name in record.metrics if METRICS[name].is_timed]
    assert not record.requests and not record.monitor
    assert 0 < record.metrics["kl_divergence"].value < 0.1
    assert record.kernels["weights"].startswith("emulation of fp8")
    assert any("throughput_tokens_per_s" in warning for warning in record.warnings)


@pytest.mark.usefixtures("baseline")
def test_the_reference_is_made_once(runner: TrialRunner, folder: Path) -> None:
    [reference] = (folder / "cache" / "references").iterdir()
    before = reference.stat().st_mtime_ns
    measured(runner, 1)

    assert reference.stat().st_mtime_ns == before


def test_every_answer_is_kept_in_the_record(
    runner: TrialRunner, baseline: TrialRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = SuiteSize(num_sequences=1, sequence_tokens=8, num_prompts=0, num_ruler=1)
    rule = dataclasses.replace(RULES["confirm"], min_s=0.05, min_requests=4, min_blocks=1, warm_up_s=0.05, suite=size)
    monkeypatch.setitem(trials.RULES, "confirm", rule)
    monkeypatch.setattr(suites, "RULER_LENGTHS", (256,))
    record = runner.measure(TrialIdentity(study="s", number=1, uid="u1"), BASELINE, tier="confirm")
    kept = TrialRecord.from_json(record.to_json()).quality["ruler"]

    assert record.outcome.kind == "ok"
    assert [(item["task"], item["asked"]) for item in kept] == [
        (task, asked) for task in TASKS for asked in suites.ASKED
    ]
    assert all(item["length_tokens"] == 256 and item["log_prob"] <= 0 for item in kept)
    assert kept[0]["task"] == "single_needle" and kept[0]["is_exact"]
    assert baseline.quality["ruler"] == []


def test_a_configuration_with_room_for_more_is_judged_on_what_the_unmodified_one_can_answer(
    profile: Profile, folder: Path
) -> None:
    short = dataclasses.replace(BASELINE, max_model_len=40)
    with TrialRunner(profile, baseline=short, cache_dir=folder / "cache") as runner:
        record = measured(runner)

    assert record.outcome.kind == "ok", record.outcome
    assert record.metrics["kl_divergence"].value < 1e-6


def test_random_weights_are_timed_and_not_judged(profile: Profile, folder: Path) -> None:
    config = tiny_config(max_position_embeddings=512)
    random_profile = dataclasses.replace(profile, model_spec=ModelSpec(name="tiny", architecture=config))
    with TrialRunner(random_profile, baseline=BASELINE, cache_dir=folder) as runner:
        record = measured(runner)

    assert record.outcome.kind == "ok"
    assert record.metrics["throughput_tokens_per_s"].value > 0
    assert "kl_divergence" not in record.metrics
    assert record.quality == {}


SERVED = {
    "a capacity": (
        "{scenario: server, arrival: {process: poisson, rate_per_s: 40}, prompt_tokens: 24, output_tokens: 4,"
        " shared_prefix: {num_groups: 2, share: 0.5}, num_requests: 8}",
        "{ttft_ms: {p90: 200}}",
        "[capacity_requests_per_s, goodput_requests_per_s]",
    ),
    "conversations": (
        "{scenario: interactive, concurrency: 2, prompt_tokens: 12, output_tokens: 4, num_requests: 8,"
        " conversation: {turns: 3, user_tokens: 5, think_time_s: 0.001}}",
        "{tpot_ms: {p50: 1000}}",
        "[goodput_requests_per_s]",
    ),
    "a trace": (
        "{scenario: server, num_requests: 5, trace: {file: t.csv, speed: 50, max_prompt_tokens: 60}}",
        "{e2e_ms: {p90: 5000}}",
        "[goodput_requests_per_s]",
    ),
}


def served(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> TrialRecord:
    workload, slo, objectives = SERVED[name]
    rule = dataclasses.replace(RULES["screen"], min_s=0.05, min_requests=4, warm_up_s=0.05, capacity_s=4.0)
    monkeypatch.setitem(trials.RULES, "screen", rule)
    rows = "".join(f"2024-05-10 00:00:0{i},{30 * i + 20},{i + 2}\n" for i in range(5))
    (folder / "t.csv").write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + rows)
    path = folder / "served.yaml"
    path.write_text(
        f"{{hardware: {{name: here, device: cpu, cores: 1}}, model: bundled, "
        f"workload: {workload}, slo: {slo}, objectives: {objectives}}}"
    )
    profile = load_profile(path)
    random_weights = ModelSpec(name="tiny", architecture=tiny_config(max_position_embeddings=512))
    served_profile = dataclasses.replace(profile, model_spec=random_weights)
    assert profile.workload.max_model_len <= BASELINE.max_model_len
    with TrialRunner(served_profile, baseline=BASELINE, cache_dir=folder) as runner:
        record = measured(runner, 1)
    assert record.outcome.kind == "ok", record.outcome
    assert TrialRecord.from_json(record.to_json()) == record
    return record


def test_a_capacity_that_is_asked_for_is_searched_on_the_warm_session(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = served("a capacity", folder, monkeypatch)
    found, kept = record.metrics["capacity_requests_per_s"], record.trust["capacity"]

    assert found.value == kept["rate_per_s"]
    assert found.num_samples == len(kept["probes"]) >= 1
    assert record.phases["capacity_s"] > 0
    assert {"rate_per_s", "broke", "values", "late_p99_ms"} <= set(kept["probes"][0])
    assert set(record.trust["late_ms"]) == {"p50", "p99", "max"}
    assert record.trust["percentiles"]["ttft_ms"]["p50"]["value"] > 0


def test_a_capacity_that_nobody_asks_for_is_not_searched(baseline: TrialRecord) -> None:
    assert "capacity_requests_per_s" not in baseline.metrics
    assert "capacity_s" not in baseline.phases


def test_conversations_go_through_the_engine_turn_by_turn(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = served("conversations", folder, monkeypatch)

    assert [sample.prompt_tokens for sample in record.requests[:8]] == [12, 21, 30, 12, 21, 30, 12, 21]
    assert record.metrics["goodput_requests_per_s"].value > 0


def test_a_trace_is_replayed_and_what_was_cut_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = served("a trace", folder, monkeypatch)

    assert [sample.prompt_tokens for sample in record.requests[:5]] == [20, 50, 60, 60, 60]
    assert [sample.output_tokens for sample in record.requests[:5]] == [2, 3, 4, 5, 6]
    assert record.trust["trace"]["prompts_cut"] == 3
    assert any("3 prompts cut" in warning for warning in record.warnings)


def test_a_record_says_how_often_memory_ran_out_and_what_prompts_shared(runner: TrialRunner) -> None:
    plain = measured(runner, 7)
    paged = measured(runner, 8, kv={"layout": "paged"}, prefix_cache=True)

    assert not {"preemptions", "prefix_hit_rate"} & plain.trust.keys()
    assert paged.outcome.kind == "ok"
    assert paged.trust["preemptions"] == 0 and 0 <= paged.trust["prefix_hit_rate"] < 1
    assert not {"prefix_hit_rate", "kv_fragmentation"} & plain.metrics.keys()
    assert paged.metrics["prefix_hit_rate"].value == paged.trust["prefix_hit_rate"]
    use = paged.trust["kv_use"]
    assert 0 < paged.metrics["kv_fragmentation"].value == use["fragmentation"]["p50"] <= use["fragmentation"]["max"] < 1
    assert paged.metrics["kv_fragmentation"].num_samples == use["num_samples"] >= 8
    assert use["blocks_used"]["max"] <= paged.resolved["num_blocks"]


def test_a_limit_on_hits_is_broken_where_there_is_no_cache(profile: Profile, folder: Path) -> None:
    asking = dataclasses.replace(profile, slo=Slo(min_prefix_hit_rate=0.5, max_preemptions_per_request=0))
    with TrialRunner(asking, baseline=BASELINE, cache_dir=folder / "cache") as runner:
        record = measured(runner, 9)

    assert record.violations == {"slo.min_prefix_hit_rate": 1.0, "slo.max_preemptions_per_request": 0.0}
    assert not record.is_feasible
