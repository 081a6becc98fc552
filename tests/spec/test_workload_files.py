"""Files that a workload names: where they are looked for, what takes their place, how trouble in them is told."""

from pathlib import Path
from typing import Any

import pytest

from codesign.errors import InputError
from codesign.search.inputs import profile_document
from codesign.spec.check import check_file
from codesign.spec.profile import load_profile
from codesign.spec.workload import Workload
from codesign.spec.yaml import dump_yaml
from tests.spec.test_trace import AZURE, MOONCAKE

PROFILE: dict[str, Any] = {
    "hardware": {"name": "here", "device": "cpu"},
    "model": "bundled",
    "objectives": ["throughput_tokens_per_s"],
}
OFFLINE = {"scenario": "offline", "prompt_tokens": 8, "output_tokens": 4, "num_requests": 4}
SERVER = {"scenario": "server", "num_requests": 4}


def written(folder: Path, workload: Any, name: str = "p.yaml") -> Path:
    path = folder / name
    path.write_text(dump_yaml({**PROFILE, "workload": workload}))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "t.csv").write_text(AZURE)
    (tmp_path / "t.jsonl").write_text(MOONCAKE)
    (tmp_path / "lengths.txt").write_text("5\n\n 9 \n20\n")
    return tmp_path


def loaded(folder: Path, workload: Any) -> Workload:
    return load_profile(written(folder, workload)).workload


def test_a_bare_trace_brings_its_lengths_and_arrivals(folder: Path) -> None:
    workload = loaded(folder, {**SERVER, "trace": "t.csv"})

    assert workload.replays_arrivals
    assert workload.max_model_len == 4808 + 27


def test_caps_cut_the_longest_and_never_add(folder: Path) -> None:
    workload = loaded(folder, {**SERVER, "trace": {"file": "t.csv", "max_prompt_tokens": 64, "max_output_tokens": 99}})

    assert workload.max_model_len == 64 + 27


def test_lengths_of_a_file_take_its_place(folder: Path) -> None:
    workload = loaded(folder, {**OFFLINE, "prompt_tokens": {"empirical": "lengths.txt"}})

    assert workload.prompt_tokens is not None
    assert workload.prompt_tokens.empirical is not None
    assert workload.prompt_tokens.empirical.lengths == (5, 9, 20)
    assert workload.max_model_len == 24


def test_files_are_looked_for_beside_the_file_that_names_them(folder: Path) -> None:
    deep = folder / "workloads"
    deep.mkdir()
    (deep / "azure.yaml").write_text("{scenario: server, trace: ../t.csv, num_requests: 4}")
    (deep / "seen.yaml").write_text("{scenario: offline, prompt_tokens: {empirical: ../lengths.txt}, output_tokens: 1}")

    assert loaded(folder, "workloads/azure.yaml").max_model_len == 4808 + 27
    assert loaded(folder, {"from": "workloads/seen.yaml", "num_requests": 2}).max_model_len == 21


@pytest.mark.parametrize(
    "workload",
    [
        {**SERVER, "trace": {"file": "t.csv", "speed": 2}},
        {**SERVER, "trace": "t.jsonl", "arrival": {"process": "poisson", "rate_per_s": 2}},
        {**OFFLINE, "prompt_tokens": {"empirical": {"file": "lengths.txt", "in_order": True}}},
        {**OFFLINE, "shared_prefix": {"num_groups": 2, "share": 0.5}},
        {**OFFLINE, "scenario": "interactive", "concurrency": 2, "conversation": {"turns": 3, "user_tokens": 5}},
    ],
)
def test_a_resolved_profile_loads_again_as_the_same_from_anywhere(folder: Path, workload: Any) -> None:
    """The folder of a study holds the resolved profile."""
    profile = load_profile(written(folder, workload))
    study = folder / "study"
    study.mkdir()
    document = {k: v for k, v in profile_document(profile.sections).items() if k != "search_space"}
    (study / "profile.yaml").write_text(dump_yaml(document))
    again = load_profile(study / "profile.yaml")

    assert again.workload == profile.workload
    assert again.digest == profile.digest


def test_a_resolved_profile_refuses_a_trace_that_has_changed(folder: Path) -> None:
    resolved = loaded(folder, {**SERVER, "trace": "t.csv"}).model_dump(mode="json", exclude_none=True)
    (folder / "t.csv").write_text(AZURE.replace("110", "111"))

    with pytest.raises(InputError, match=r"p\.yaml:\d+: workload\.trace.*has changed"):
        loaded(folder, resolved)


WRONG: dict[str, tuple[Any, str, str, str]] = {  # name -> (workload, where, key, what it says)
    "no trace": (
        {**SERVER, "trace": "x.csv"},
        "p.yaml",
        "workload.trace",
        "no such file (in that folder: t.csv, t.jsonl)",
    ),
    "a folder": ({**SERVER, "trace": "d.csv"}, "p.yaml", "workload.trace", "is a directory"),
    "a pipe": ({**SERVER, "trace": "pipe.csv"}, "p.yaml", "workload.trace", "not a regular file"),
    "an empty trace": ({**SERVER, "trace": "empty.jsonl"}, "p.yaml", "workload.trace", "holds no request"),
    "a bad row": ({**SERVER, "trace": "bad.csv"}, "bad.csv:2", "ContextTokens", "whole number"),
    "no lengths": (
        {**OFFLINE, "output_tokens": {"empirical": "x"}},
        "p.yaml",
        "workload.output_tokens",
        "no such file",
    ),
    "empty lengths": (
        {**OFFLINE, "output_tokens": {"empirical": "empty.jsonl"}},
        "p.yaml",
        "workload",
        "holds no length",
    ),
    "a bad length": ({**OFFLINE, "output_tokens": {"empirical": "bad.csv"}}, "bad.csv:1", "", "whole number"),
    "lengths without end": ({**OFFLINE, "output_tokens": {"empirical": "many"}}, "many:2001", "", "more than 2000"),
    "lengths of turns": (
        {
            **{**OFFLINE, "scenario": "interactive", "concurrency": 2},
            "conversation": {"turns": 3, "user_tokens": {"empirical": "x"}},
        },
        "p.yaml",
        "workload.conversation.user_tokens.empirical",
        "no such file",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_trouble_in_a_file_is_told_where_it_is(name: str, folder: Path) -> None:
    workload, where, key, says = WRONG[name]
    (folder / "d.csv").mkdir()
    (folder / "empty.jsonl").write_text("\n")
    (folder / "bad.csv").write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2024-01-01,x,1\n")
    (folder / "many").write_text("1\n" * 2001)
    if name == "a pipe":
        import os

        os.mkfifo(folder / "pipe.csv")
    if name == "no trace":
        (folder / "bad.csv").unlink(), (folder / "d.csv").rmdir(), (folder / "empty.jsonl").unlink()
    path = written(folder, workload)
    for check in (load_profile, check_file):
        with pytest.raises(InputError) as caught:
            check(path)

        assert (caught.value.file or "").startswith(str(folder / where))
        assert (caught.value.key or "").startswith(key)
        assert says in str(caught.value)


def test_check_reads_the_files_of_a_workload_that_stands_alone(folder: Path) -> None:
    path = folder / "w.yaml"
    path.write_text("{scenario: server, trace: t.csv, num_requests: 3}")

    assert check_file(path) == "workload"
    (folder / "t.csv").unlink()
    with pytest.raises(InputError, match="no such file"):
        check_file(path)
