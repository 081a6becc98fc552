"""What is said before the first trial."""

from pathlib import Path
from typing import Any

import pytest

from codesign.errors import InputError, Unsupported
from codesign.measure.monitor import EnergySource
from codesign.search import preflight
from codesign.search.preflight import check_device, memory_check, study_rules, usable_objectives
from codesign.search.suggest import Points
from codesign.search.world import check_same_world
from codesign.spec.engine_config import EngineConfig
from codesign.spec.profile import Profile, load_profile
from tests.search.fake_measure import record_of
from tests.search.studies import space_of
from tests.search.test_objective import identity

MODEL = (
    "{weights: random, model_type: llama, hidden_size: 4096, intermediate_size: 14336, num_hidden_layers: 32, "
    "num_attention_heads: 32, num_key_value_heads: 8, vocab_size: 128256, max_position_embeddings: 8192}"
)


def profile(folder: Path, hardware: str, objectives: str = "[kv_bytes]", more: str = "") -> Profile:
    path = folder / "p.yaml"
    path.write_text(
        f"hardware: {hardware}\nmodel: {MODEL}\nobjectives: {objectives}\n{more}\n"
        "workload: {scenario: offline, prompt_tokens: 8, output_tokens: 8, num_requests: 1}\n"
    )
    return load_profile(path)


def gpu(name: str) -> dict[str, Any]:
    return {"name": name, "uuid": "GPU-0", "memory_bytes": 80 * 2**30, "compute_capability": "9.0", "max_power_w": 700}


@pytest.mark.parametrize(
    ("asked", "found", "is_same"),
    [
        ("NVIDIA A100-SXM4-80GB", "NVIDIA A100-SXM4-80GB", True),
        ("A100 80GB", "NVIDIA A100-SXM4-80GB", True),
        ("NVIDIA H100 SXM", "NVIDIA H100 80GB HBM3", True),
        ("NVIDIA H200", "NVIDIA H200", True),
        ("NVIDIA H200", "NVIDIA H100 80GB HBM3", False),
        ("NVIDIA L40S", "NVIDIA L40", False),
        ("NVIDIA L40", "NVIDIA L40S", False),
        ("GeForce RTX 4090", "NVIDIA GeForce RTX 4090", True),
        ("GeForce RTX 4090", "NVIDIA GeForce RTX 4080", False),
    ],
)
def test_a_gpu_is_recognised_by_its_model_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: str, found: str, is_same: bool
) -> None:
    monkeypatch.setattr(preflight, "gpus", lambda: [gpu(found)])
    asking = profile(tmp_path, f"{{name: {asked}, device: cuda}}")
    if is_same:
        check_device(asking)
    else:
        with pytest.raises(Unsupported, match=f"asks for {asked}; here is 1 x {found}"):
            check_device(asking)


def test_fewer_devices_than_asked_for_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "gpus", lambda: [gpu("NVIDIA H200")])

    with pytest.raises(Unsupported, match="asks for 2 x NVIDIA H200; here is 1 x NVIDIA H200"):
        check_device(profile(tmp_path, "{name: NVIDIA H200, device: cuda, count: 2}"))


def test_objectives_that_cannot_be_given_are_dropped_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "energy_source", lambda device: EnergySource(scope="", reason="no meter"))
    said: list[str] = []
    names = "[kv_bytes, kl_divergence, energy_per_token_j, cost_per_mtok, goodput_requests_per_s]"
    kept = usable_objectives(profile(tmp_path, "{name: x, device: cpu}", names), said.append)

    assert [objective.metric for objective in kept] == ["kv_bytes"]
    assert said == [
        "objective kl_divergence is dropped: the model's weights are random",
        "objective energy_per_token_j is dropped: no meter",
        "objective cost_per_mtok is dropped: the profile has no hardware.price_per_hour",
        "objective goodput_requests_per_s is dropped: the slo limits no time of a request",
    ]


@pytest.mark.parametrize(
    ("slo", "reason"),
    [
        ("slo: {quality: {max_kl: 1}}", "the slo limits no time of a request"),
        ("slo: {ttft_ms: {p90: 100}}", "scenario offline has no request rate, only server has"),
    ],
)
def test_a_capacity_needs_a_limit_on_time_and_a_server(tmp_path: Path, slo: str, reason: str) -> None:
    said: list[str] = []
    names = "[kv_bytes, capacity_requests_per_s]"
    usable_objectives(profile(tmp_path, "{name: x, device: cpu}", names, slo), said.append)

    assert said == [f"objective capacity_requests_per_s is dropped: {reason}"]


def test_objectives_that_can_be_given_are_kept_silently(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "energy_source", lambda device: EnergySource(scope="board"))
    said: list[str] = []
    asking = profile(
        tmp_path,
        "{name: x, device: cpu, price_per_hour: 2}",
        "[energy_per_token_j, cost_per_mtok, goodput_requests_per_s]",
        "slo: {tpot_ms: {p50: 10}}",
    )

    assert usable_objectives(asking, said.append) == asking.objectives
    assert said == []


def test_a_profile_whose_objectives_are_all_impossible_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="none of them can be measured here"):
        usable_objectives(profile(tmp_path, "{name: x, device: cpu}", "[kl_divergence]"), lambda text: None)


def test_memory_is_checked_against_the_smaller_of_profile_and_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "gpus", lambda: [gpu("X1")])
    hardware = "{name: X1, device: cuda, memory: [{name: hbm, gib: %s}, {name: host, gib: 1}]}"
    small = memory_check(profile(tmp_path, hardware % 12))(EngineConfig())
    large = memory_check(profile(tmp_path, hardware % 200))(EngineConfig())

    assert small is not None and "has 12 GiB" in small.detail and small.excess > 0
    assert large is None
    assert memory_check(profile(tmp_path, hardware % 200))(EngineConfig(max_batch_size=4096)) is not None


FP8 = "weights: {native: {}, fp8: {}, w8a8: {}}"
GPU = "{name: x, device: cuda, compute_capability: '%s'}"


@pytest.mark.parametrize(
    ("hardware", "space", "left"),
    [
        (GPU % "8.0", FP8, {"native", "w8a8"}),
        (GPU % "8.9", FP8, {"native", "w8a8", "fp8"}),
        (GPU % "10.0", FP8, {"native", "w8a8", "fp8"}),
        ("{name: x, device: cuda}", FP8, {"native", "w8a8", "fp8"}),
        ("{name: x, device: cpu}", FP8, {"native", "w8a8"}),
        ("{name: x, device: cpu}", "weights: {native: {}, fp8: {emulated: true}}", {"native", "fp8"}),
        (GPU % "9.0", "weights: {native: {}, fp8: {emulated: true}}", {"native"}),
    ],
)
def test_no_trial_is_spent_on_a_format_that_the_hardware_cannot_multiply(
    tmp_path: Path, hardware: str, space: str, left: set[str]
) -> None:
    """A capability that the profile does not say rules nothing out: the build will tell."""
    points = Points(space_of(tmp_path, space), refuse=study_rules(profile(tmp_path, hardware)))

    assert {point.config.weights.name for point in points.all() if point.refusal is None} == left


@pytest.mark.parametrize(
    ("objectives", "more", "is_refused"),
    [
        ("[kv_bytes]", "", False),
        ("[kv_bytes, kl_divergence]", "slo: {quality: {max_kl: 1}, memory_gib: 2}", False),
        ("[kv_bytes, tpot_ms]", "", True),
        ("[energy_per_token_j]", "", True),
        ("[cost_per_mtok]", "", True),
        ("[goodput_requests_per_s]", "", True),
        ("[kv_bytes]", "slo: {e2e_ms: {p99: 1000}}", True),
        ("[kv_bytes]", "slo: {power_w: 100}", True),
    ],
)
def test_an_emulation_is_proposed_only_where_nobody_asks_for_speed(
    tmp_path: Path, objectives: str, more: str, is_refused: bool
) -> None:
    refuse = study_rules(profile(tmp_path, "{name: x, device: cpu}", objectives, more))

    found = refuse(EngineConfig.from_dict({"weights": {"name": "fp8", "emulated": True}}).resolve())

    assert (found is not None and "no speed" in found) == is_refused
    assert refuse(EngineConfig()) is None


def test_a_study_does_not_go_on_in_another_world() -> None:
    here = {
        "machine": {"cpu": "A", "cores": 2},
        "versions": {"torch": "2.13"},
        "model": {"digest": "sha256:1"},
        "gpus": [{"name": "H200"}],
    }
    import dataclasses

    record = dataclasses.replace(record_of(identity(0), EngineConfig()), provenance=here)
    check_same_world([record], here, "study")
    for changed, word in (
        ({"machine": {"cpu": "B", "cores": 2}}, "processor was A"),
        ({"versions": {"torch": "2.14"}}, "torch was 2.13, is 2.14"),
        ({"model": {"digest": "sha256:2"}}, "model was"),
        ({"gpus": [{"name": "H100"}]}, "GPU was H200, is H100"),
    ):
        with pytest.raises(InputError, match=word):
            check_same_world([record], {**here, **changed}, "study")


def test_a_study_of_predicted_trials_only_has_no_world_yet() -> None:
    check_same_world([record_of(identity(0), EngineConfig())], {"machine": {}}, "study")
