import dataclasses
from pathlib import Path
from typing import Any

import pytest

from codesign.bundled import draft_path, target_path
from codesign.errors import InputError
from codesign.search.inputs import profile_document
from codesign.spec.check import check_file
from codesign.spec.model import ModelSpec
from codesign.spec.profile import Profile, load_profile
from codesign.spec.space import load_space
from codesign.spec.yaml import dump_yaml
from codesign.units import GIB
from tests.spec.hostile import ARCHITECTURE, PROFILE

ROOT = Path(__file__).parents[2]
REVISION = "0123456789abcdef0123456789abcdef01234567"


def profile(folder: Path, **sections: Any) -> Profile:
    path = folder / "mine.yaml"
    path.write_text(dump_yaml({**PROFILE, **sections}))
    return load_profile(path)


def model_folder(folder: Path, name: str) -> Path:
    path = folder / name
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    return path


@pytest.mark.parametrize("path", sorted(ROOT.glob("profiles/**/*.yaml")), ids=lambda path: str(path.relative_to(ROOT)))
def test_shipped_profiles_and_their_parts_are_right(path: Path) -> None:
    check_file(path)


@pytest.mark.parametrize("path", sorted(ROOT.glob("search_spaces/*.yaml")), ids=lambda path: path.stem)
def test_shipped_spaces_hold_something_and_allow_the_default(path: Path) -> None:
    space = load_space(path)

    assert (space.size or 0) > 24
    assert space.refusal(space.default()) is None


def test_the_promised_profiles_are_there() -> None:
    names = {path.stem for path in (ROOT / "profiles").glob("*.yaml")}

    assert names >= {"cpu", "a100", "h100", "h200", "l40s", "rtx4090"}


@pytest.mark.parametrize("name", ["a100", "h100", "h200", "l40s", "rtx4090"])
def test_published_figures_are_dense_and_whole(name: str) -> None:
    hardware = load_profile(ROOT / f"profiles/{name}.yaml").hardware
    peak = hardware.peak_tflops

    assert hardware.device == "cuda" and hardware.compute_capability is not None
    assert hardware.memory[0].gb_per_s is not None and hardware.max_power_w is not None
    assert hardware.links.device_gb_per_s is not None and hardware.links.host_gb_per_s is not None
    assert peak.bf16 is not None and peak.int8 is not None and peak.fp16 == peak.bf16
    # A figure with 2:4 sparsity would be twice too high; int8 is at most four times bf16 on these devices.
    assert 2 <= peak.int8 / peak.bf16 <= 4


def test_the_demo_is_this_machine_with_the_bundled_model() -> None:
    found = load_profile(ROOT / "profiles/cpu.yaml")

    assert found.name == "cpu" and found.device == "cpu"
    assert found.model_spec.path == str(target_path()) and found.model_spec.name == "bundled"
    assert [objective.label for objective in found.objectives][:2] == ["throughput_tokens_per_s", "kl_divergence"]


def test_a_part_can_come_from_a_file_beside_the_profile(tmp_path: Path) -> None:
    (tmp_path / "hardware").mkdir()
    (tmp_path / "hardware/small.yaml").write_text("name: small\ndevice: cuda\nmemory: [{name: hbm, gib: 8}]\n")

    found = profile(tmp_path, hardware="hardware/small.yaml")

    assert (found.hardware.name, found.hardware.memory[0].gib) == ("small", 8)


def test_keys_beside_from_go_over_the_file_key_by_key(tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text(
        "name: small\ndevice: cuda\nlinks: {host_gb_per_s: 16, device_gb_per_s: 64}\nmemory: [{name: hbm, gib: 8}]\n"
    )

    found = profile(
        tmp_path,
        hardware={
            "from": "small.yaml",
            "count": 4,
            "links": {"host_gb_per_s": 32},
            "memory": [{"name": "x", "gib": 1}],
        },
    )

    assert found.hardware.count == 4
    assert (found.hardware.links.host_gb_per_s, found.hardware.links.device_gb_per_s) == (32, 64)
    assert [memory.name for memory in found.hardware.memory] == ["x"]


def test_a_mistake_in_an_included_file_names_that_file_and_line(tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text("name: small\ndevice: cuda\ncuont: 4\n")

    with pytest.raises(InputError, match="did you mean 'count'") as caught:
        profile(tmp_path, hardware="small.yaml")
    assert (caught.value.file, caught.value.key) == (f"{tmp_path / 'small.yaml'}:3", "hardware.cuont")


def test_a_mistake_in_an_override_names_the_profile(tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text("name: small\ndevice: cuda\ncount: 2\n")

    with pytest.raises(InputError) as caught:
        profile(tmp_path, hardware={"from": "small.yaml", "count": 0})
    assert (caught.value.file or "").startswith(str(tmp_path / "mine.yaml"))


@pytest.mark.parametrize("text", ["from: small.yaml\n", "small.yaml"])
def test_files_that_include_each_other_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text(text)

    with pytest.raises(InputError, match="include each other"):
        profile(tmp_path, hardware="small.yaml")


def test_broken_yaml_in_an_included_file_names_it(tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text("name: small\ndevice: [cuda\n")

    with pytest.raises(InputError, match="not YAML") as caught:
        profile(tmp_path, hardware="small.yaml")
    assert (caught.value.file or "").startswith(str(tmp_path / "small.yaml"))


def test_a_model_directory_is_relative_to_the_profile(tmp_path: Path) -> None:
    path = model_folder(tmp_path, "models/mine")

    assert profile(tmp_path, model="models/mine").model_spec.path == str(path)


def test_an_overriding_model_is_relative_to_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = model_folder(tmp_path, "elsewhere/mine")
    profile(tmp_path)
    monkeypatch.chdir(tmp_path / "elsewhere")

    spec = load_profile(tmp_path / "mine.yaml", model_override="mine").model_spec
    assert (spec.path, spec.name) == (str(path), "mine")
    with pytest.raises(InputError, match="neither `bundled` nor") as caught:
        load_profile(tmp_path / "mine.yaml", model_override="yours")
    assert caught.value.key == "--model"


def test_an_override_makes_the_profiles_own_model_irrelevant(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(dump_yaml({k: v for k, v in PROFILE.items() if k != "model"}))

    assert load_profile(tmp_path / "mine.yaml", model_override="bundled").model_spec.name == "bundled"


def test_a_hub_model_comes_from_the_local_cache_at_that_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(InputError, match=f"hf download some/model --revision {REVISION}"):
        profile(tmp_path, model={"id": "some/model", "revision": REVISION})

    path = model_folder(tmp_path, f"cache/models--some--model/snapshots/{REVISION}")
    spec = profile(tmp_path, model={"id": "some/model", "revision": REVISION}).model_spec
    assert (spec.path, spec.name) == (str(path), "some/model@0123456789ab")


def test_checking_a_hub_profile_needs_no_files_of_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    path = tmp_path / "mine.yaml"
    path.write_text(dump_yaml({**PROFILE, "model": {"id": "some/model", "revision": REVISION}}))

    assert check_file(path) == "profile"


def test_a_fetcher_is_asked_for_the_pinned_commit(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(dump_yaml({**PROFILE, "model": {"id": "some/model", "revision": REVISION}}))
    asked: list[tuple[str, str]] = []

    def fetch(name: str, revision: str) -> Path:
        asked.append((name, revision))
        return tmp_path / "fetched"

    assert load_profile(path, fetch=fetch).model_spec.path == str(tmp_path / "fetched")
    assert asked == [("some/model", REVISION)]


def test_a_random_model_keeps_its_keys_as_written(tmp_path: Path) -> None:
    spec = profile(tmp_path, model={**ARCHITECTURE, "name": "tiny", "seed": 7, "sliding_window": None}).model_spec

    assert spec.name == "tiny" and spec.seed == 7 and not spec.has_trained_weights
    assert spec.architecture == {k: v for k, v in {**ARCHITECTURE, "sliding_window": None}.items() if k != "weights"}


def test_limits_are_flat_and_in_the_metrics_units(tmp_path: Path) -> None:
    limits = profile(
        tmp_path,
        slo={"ttft_ms": {"p99": 200, "mean": 80}, "quality": {"max_kl": 0.1, "min_retrieval": 0.9}, "memory_gib": 2},
    ).slo.limits()

    assert [(limit.key, limit.metric, limit.statistic, limit.side, limit.bound) for limit in limits] == [
        ("slo.ttft_ms.p99", "ttft_ms", "p99", "at_most", 200),
        ("slo.ttft_ms.mean", "ttft_ms", "mean", "at_most", 80),
        ("slo.quality.max_kl", "kl_divergence", "", "at_most", 0.1),
        ("slo.quality.min_retrieval", "retrieval_accuracy", "", "at_least", 0.9),
        ("slo.memory_gib", "peak_memory_bytes", "", "at_most", 2 * GIB),
    ]


def test_a_violation_is_a_share_over_the_bound(tmp_path: Path) -> None:
    time, retrieval = profile(tmp_path, slo={"ttft_ms": {"p99": 200}, "quality": {"min_retrieval": 0.8}}).slo.limits()

    assert [time.violation(value) for value in (240, 200, 100)] == pytest.approx([0.2, 0, -0.5])
    assert [retrieval.violation(value) for value in (0.4, 0.8, 1.0)] == pytest.approx([0.5, 0, -0.25])


def test_a_bound_of_zero_can_be_broken(tmp_path: Path) -> None:
    (limit,) = profile(tmp_path, slo={"quality": {"max_kl": 0}}).slo.limits()

    assert limit.violation(0.25) == 0.25 and limit.violation(0.0) == 0


def test_the_digest_follows_what_is_resolved(tmp_path: Path) -> None:
    first = profile(tmp_path).digest
    (tmp_path / "hardware.yaml").write_text(dump_yaml(PROFILE["hardware"]))

    assert profile(tmp_path, hardware="hardware.yaml").digest == first
    assert profile(tmp_path, objectives=["kv_bytes"]).digest != first
    assert profile(tmp_path, workload={**PROFILE["workload"], "seed": 1}).digest != first
    assert profile(tmp_path, slo={}).digest != first


def test_the_digest_of_the_bundled_model_is_the_same_on_every_machine(tmp_path: Path) -> None:
    assert "path" not in profile(tmp_path, model="bundled").sections["model"]


def test_the_bundled_model_has_a_draft_that_changes_no_digest(tmp_path: Path) -> None:
    plain, named = profile(tmp_path, model="bundled"), profile(tmp_path, model="bundled", draft="bundled")

    assert plain.model_spec.draft is not None and plain.model_spec.draft.path == str(draft_path())
    assert plain.digest == named.digest and "draft" not in plain.sections


def test_a_draft_is_named_beside_its_model(tmp_path: Path) -> None:
    model, draft = model_folder(tmp_path, "large"), model_folder(tmp_path, "small")
    found = profile(tmp_path, model="large", draft="small")

    assert found.model_spec.path == str(model)
    assert found.model_spec.draft is not None and found.model_spec.draft.path == str(draft)
    assert found.digest != profile(tmp_path, model="large").digest
    assert profile(tmp_path, model="large").model_spec.draft is None
    document = profile_document(found.sections)
    assert (document["model"], document["draft"]) == (str(model), str(draft))


def test_a_draft_of_random_weights_is_written_as_it_was_read(tmp_path: Path) -> None:
    found = profile(tmp_path, draft={**ARCHITECTURE, "num_hidden_layers": 1})
    document = profile_document(found.sections)

    assert found.model_spec.draft is not None and found.model_spec.draft.path is None
    assert profile(tmp_path, model=document["model"], draft=document["draft"]).digest == found.digest


def test_a_draft_that_is_not_there_is_named_by_its_key(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"draft: 'nowhere' is neither `bundled` nor"):
        profile(tmp_path, draft="nowhere")


def test_a_model_with_its_draft_crosses_as_plain_data(tmp_path: Path) -> None:
    found = profile(tmp_path, draft="bundled").model_spec

    assert ModelSpec.from_dict(dataclasses.asdict(found)) == found


def test_sections_are_plain_data_that_can_be_written_and_loaded_again(tmp_path: Path) -> None:
    found = profile(tmp_path)
    sections = {**found.sections, "model": PROFILE["model"]}
    sections["objectives"] = [
        {item["metric"]: item["statistic"]} if item["statistic"] else item["metric"] for item in sections["objectives"]
    ]
    (tmp_path / "again.yaml").write_text(dump_yaml(sections))

    assert load_profile(tmp_path / "again.yaml").digest == found.digest


@pytest.mark.parametrize("name", ["cpu", "a100", "h100"])
def test_a_profile_crosses_to_another_process_as_its_sections(name: str) -> None:
    import dataclasses
    import json

    here = load_profile(ROOT / "profiles" / f"{name}.yaml", model_override="bundled")
    there = Profile.from_sections(here.name, json.loads(json.dumps(here.sections)))

    assert there == dataclasses.replace(here, path=Path(f"{name}.yaml"), search_space=None)
    assert there.digest == here.digest


def test_an_architecture_crosses_to_another_process_too(tmp_path: Path) -> None:
    here = profile(tmp_path)

    assert Profile.from_sections("mine", here.sections).model_spec == here.model_spec
