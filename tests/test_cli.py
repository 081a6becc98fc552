"""The command line as a person meets it: exit status, one JSON document, messages that help, never a traceback."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import codesign
from codesign.cli import main
from codesign.results.ledger import read_records
from codesign.search.limits import Limits
from codesign.spec.engine_config import load_config
from codesign.spec.profile import load_profile
from tests.search.studies import run_study, space_of

ROOT = Path(codesign.__file__).parents[1]
VERBS = ("search", "measure", "front", "report", "export", "serve", "probe", "check")

TINY = """
hardware: {name: here, device: cpu, cores: 1}
model:
  {weights: random, model_type: llama, hidden_size: 64, intermediate_size: 128, num_hidden_layers: 2,
   num_attention_heads: 2, num_key_value_heads: 1, head_dim: 32, vocab_size: 256, max_position_embeddings: 512}
workload: {scenario: offline, prompt_tokens: 16, output_tokens: 4, num_requests: 4}
objectives: [throughput_tokens_per_s, kv_bytes, kl_divergence, energy_per_token_j, cost_per_mtok]
search_space: space.yaml
"""
SPACE = "max_batch_size: [1, 2, 4]\ndtype: [fp32]\nattention: {sdpa: {}, eager: {}}\n"


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    (tmp_path / "space.yaml").write_text(SPACE)
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return path


@pytest.fixture
def study(tmp_path: Path) -> Path:
    run_study(tmp_path, space_of(tmp_path), limits=Limits(trials=4))
    return tmp_path / "study"


def run(capfd: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    status = main([str(argument) for argument in arguments])
    out, err = capfd.readouterr()
    return status, out, err


def test_help_lists_the_real_verbs_only(capfd: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capfd, "--help")

    assert status == 0
    assert all(f"\n  {verb} " in out for verb in VERBS)
    assert "predict" not in out


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself_and_has_json(capfd: pytest.CaptureFixture[str], verb: str) -> None:
    status, out, _ = run(capfd, verb, "--help")

    assert status == 0
    assert "--json" in out


def test_help_loads_neither_torch_nor_optuna() -> None:
    code = (
        "import sys, codesign.cli as c; c.main(['search', '--help']); "
        "print({'torch', 'optuna', 'pandas'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)

    assert done.stdout.endswith("set()\n")


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["serch", "x"], "Did you mean 'search'"),
        (["search", "p.yaml", "--trails", "3"], "--trials"),
        (["search", "p.yaml", "--trials", "many"], "valid integer"),
        (["search", "p.yaml", "--trials", "0"], "equal to 1"),
        (["search", "p.yaml", "--budget", "soon"], "20m"),
        (["search", "no-such.yaml"], "no-such.yaml"),
        (["search", "."], "."),
        (["search"], "PROFILE"),
        (["search", "profiles/cpu.yaml", "--workers", "0"], "equal to 1"),
        (["search", str(ROOT / "profiles/cpu.yaml"), "--workers", "100000"], "at most"),
        (["search", str(ROOT / "profiles/cpu.yaml"), "--workers", "2", "--ray", "local"], "--ray"),
        (["search", str(ROOT / "profiles/cpu.yaml"), "--ray", "auto"], "HOST:PORT"),
        (["search", str(ROOT / "profiles/cpu.yaml"), "--storage", "sqlite:///x"], "SQLite"),
        (["front", "no-such-study"], "no study here"),
        (["front", "/etc/passwd"], "no study here"),
        (["report", "\x00"], "null byte"),
        (["export", ".", "--to", "natve"], "did you mean 'native'"),
        (["check", "/dev/zero"], "/dev/zero"),
        (["check", "/proc/self/mem"], "/proc/self/mem"),
    ],
)
def test_a_mistake_is_exit_2_with_a_hint_and_no_traceback(
    capfd: pytest.CaptureFixture[str], arguments: list[str], hint: str
) -> None:
    status, out, err = run(capfd, *arguments)

    assert status == 2
    assert hint in err
    assert "Traceback" not in err
    assert out == ""


@pytest.mark.parametrize("arguments", [["front", "nowhere"], ["serch"], ["check", "nowhere.yaml"], ["search"]])
def test_with_json_a_mistake_is_one_document_too(capfd: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    status, out, err = run(capfd, *arguments, "--json")

    assert status == 2
    document = json.loads(out)
    assert "nowhere" in str(document) or document["exit_status"] == 2
    assert err


def test_another_target_names_the_nearest(capfd: pytest.CaptureFixture[str], tiny: Path) -> None:
    status, _, err = run(capfd, "search", tiny, "--target", "nativ", "--out", tiny.parent / "out")

    assert status == 2
    assert "did you mean 'native'" in err
    assert not (tiny.parent / "out").exists()


@pytest.mark.parametrize("name", ["a100", "h100", "h200", "l40s", "rtx4090"])
def test_a_profile_of_another_device_is_refused_with_the_ways_on(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, name: str
) -> None:
    pynvml = pytest.importorskip("pynvml")
    try:
        pynvml.nvmlInit()
        pytest.skip("there is a GPU here")
    except pynvml.NVMLError:
        pass
    status, _, err = run(capfd, "search", ROOT / "profiles" / f"{name}.yaml", "--out", tmp_path / "out")

    assert status == 2
    assert "asks for a CUDA device" in err and "here is none" in err
    assert "profiles/cpu.yaml" in err and "codesign probe" in err
    assert not (tmp_path / "out").exists()


def test_a_search_of_a_real_engine_from_profile_to_report_and_export(
    capfd: pytest.CaptureFixture[str], tiny: Path
) -> None:
    out = tiny.parent / "reports"
    status, stdout, stderr = run(capfd, "search", tiny, "--trials", "2", "--out", out, "--name", "t", "--json")

    assert status == 0, stderr
    document = json.loads(stdout)
    assert document["num_trials"] == 2
    assert document["stopped"] == "all 2 trials are done"
    for dropped in ("kl_divergence", "energy_per_token_j", "cost_per_mtok"):
        assert f"objective {dropped} is dropped" in stderr
    assert [objective["metric"] for objective in document["objectives"]] == ["throughput_tokens_per_s", "kv_bytes"]
    folder = out / "t"
    records, damaged = read_records(folder / "trials")
    assert [record.outcome.kind for record in records] == ["ok", "ok"], records[0].outcome
    assert damaged == []
    for name in ("index.html", "trials.csv", "front.json", "study.db", "study.json", "configs/trial-0.yaml"):
        assert (folder / name).stat().st_size > 0
    assert load_profile(folder / "profile.yaml").digest == load_profile(tiny).digest

    status, stdout, _ = run(capfd, "export", folder, "--pick", "baseline", "--to", "native", "--json")
    exported = Path(json.loads(stdout)["files"][0]).parent
    assert load_config(exported / "config.yaml").resolve().digest == records[0].config_digest
    assert load_profile(exported / "profile.yaml").digest == load_profile(tiny).digest
    kept = exported / "again.json"
    measured = ["measure", exported / "profile.yaml", "--config", exported / "config.yaml", "--tier", "screen"]
    status, stdout, stderr = run(capfd, *measured, "--out", kept, "--json")
    assert status == 0, stderr
    assert json.loads(stdout) == json.loads(kept.read_text())
    assert json.loads(stdout)["metrics"]["throughput_tokens_per_s"]["unit"] == "tokens/s"


def test_a_search_measures_in_a_worker_and_says_where(capfd: pytest.CaptureFixture[str], tiny: Path) -> None:
    out = tiny.parent / "reports"
    arguments = ("search", tiny, "--trials", "2", "--workers", "1", "--out", out, "--name", "t", "--json")
    status, _, stderr = run(capfd, *arguments)

    assert status == 0, stderr
    records, _ = read_records(out / "t" / "trials")
    assert [record.outcome.kind for record in records] == ["ok", "ok"], records[0].outcome
    (placement,) = {json.dumps(record.provenance["placement"]) for record in records}
    assert json.loads(placement)["worker"] != os.getpid()
    assert json.loads(placement)["cores"] == 1
    assert f"worker {json.loads(placement)['worker']}, cpu, cores" in stderr
    left = subprocess.run(["pgrep", "-f", "codesign.search.worker"], capture_output=True, text=True).stdout.split()
    assert not {int(pid) for pid in left} & {json.loads(placement)["worker"]}


def test_front_says_what_runs_where(capfd: pytest.CaptureFixture[str], study: Path) -> None:
    import dataclasses

    from codesign.search import lease as leases

    records, _ = read_records(study / "trials")
    with leases.hold(study / "leases") as lease:
        running = dataclasses.replace(
            lease,
            worker="w",
            uid="u",
            number=9,
            config=records[2].config,
            place="cores 4-7",
            since="2026-11-25T10:00:00",
        )
        leases.write(study / "leases", running)
        status, out, _ = run(capfd, "front", study)
        assert status == 0
        assert "running: trial 9, " in out and f"on {lease.host}, search {os.getpid()}, cores 4-7, since 2026" in out

        _, out, _ = run(capfd, "front", study, "--json")
        (found,) = json.loads(out)["running"]
        assert (found["number"], found["host"], found["search"], found["place"]) == (
            9,
            lease.host,
            os.getpid(),
            "cores 4-7",
        )
    (study / "leases" / "w.json").unlink()


def test_a_search_says_before_its_first_trial_what_it_leaves_out_and_why(
    capfd: pytest.CaptureFixture[str], tiny: Path
) -> None:
    text = "max_batch_size: [8]\nprune: {none: {}, wanda: {pattern: two_of_four}}\nweights: {native: {}, fp8: {}}\n"
    (tiny.parent / "space.yaml").write_text(text)

    status, _, stderr = run(capfd, "search", tiny, "--out", tiny.parent / "reports", "--name", "t")

    assert status == 0, stderr
    assert "ruled out, 1 of 4 points: prune.pattern two_of_four with max_batch_size below 64" in stderr
    assert "ruled out, 1 of 4 points: prune.pattern two_of_four with packed weights" in stderr
    assert "ruled out, 1 of 4 points: fp8 is multiplied by CUDA devices of compute capability 8.9" in stderr
    assert stderr.index("ruled out") < stderr.index("trial 0")
    assert "trial 1" not in stderr


def test_front_shows_the_front_and_the_picks(capfd: pytest.CaptureFixture[str], study: Path) -> None:
    status, out, _ = run(capfd, "front", study)
    assert status == 0
    assert "baseline" in out and "balanced" in out

    status, out, err = run(capfd, "front", study, "--json")
    document = json.loads(out)
    assert (status, err) == (0, "")
    assert document["num_trials"] == 4
    assert {trial["number"] for trial in document["front"]} <= {0, 1, 2, 3}


def test_report_writes_the_page_again(capfd: pytest.CaptureFixture[str], study: Path) -> None:
    status, out, _ = run(capfd, "report", study)

    assert status == 0
    assert (study / "index.html").exists()
    assert out.strip() == str(study / "index.html")


def test_two_studies_are_compared(capfd: pytest.CaptureFixture[str], study: Path) -> None:
    run_study(study.parent, space_of(study.parent), name="other", seed=3, limits=Limits(trials=3))
    status, out, _ = run(capfd, "report", study, study.parent / "other", "--json")

    assert status == 0
    assert Path(json.loads(out)["report"]).exists()


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        ([], "--trial N"),
        (["--trial", "1", "--pick", "baseline"], "--trial N"),
        (["--trial", "99"], "0 to 3"),
        (["--pick", "balancd"], "did you mean 'balanced'"),
    ],
)
def test_export_says_what_can_be_chosen(
    capfd: pytest.CaptureFixture[str], study: Path, arguments: list[str], hint: str
) -> None:
    status, _, err = run(capfd, "export", study, "--to", "native", *arguments)

    assert status == 2
    assert hint in err


def test_check_names_each_file_and_fails_if_one_is_wrong(
    capfd: pytest.CaptureFixture[str], tiny: Path, tmp_path: Path
) -> None:
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("max_batch_sise: [1]\n")
    status, out, err = run(capfd, "check", tiny, wrong, tmp_path / "space.yaml")

    assert status == 2
    assert f"{tiny}: a valid profile" in out and "space.yaml: a valid search space" in out
    assert "max_batch_size" in err


def test_shipped_files_are_valid(capfd: pytest.CaptureFixture[str]) -> None:
    files = [*ROOT.glob("profiles/*.yaml"), *ROOT.glob("profiles/hardware/*.yaml"), *ROOT.glob("search_spaces/*.yaml")]
    status, _, err = run(capfd, "check", *files)

    assert len(files) >= 3
    assert (status, err) == (0, "")


def test_a_folder_that_cannot_be_written_is_said(capfd: pytest.CaptureFixture[str], tiny: Path) -> None:
    blocker = tiny.parent / "file"
    blocker.write_text("")
    status, _, err = run(capfd, "search", tiny, "--out", blocker)

    assert status == 2
    assert "stands where" in err and "Traceback" not in err


def test_a_reader_that_leaves_early_is_no_error(study: Path) -> None:
    command = f"{sys.executable} -m codesign front {study} --json | head -c 10"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, cwd=ROOT)

    assert "Traceback" not in done.stderr


def test_what_libraries_print_stays_out_of_the_document(
    capfd: pytest.CaptureFixture[str], study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from codesign.report.study import Study

    load = Study.load

    def noisy(folder: Path) -> Study:
        print("printed by Python")
        os.write(1, b"printed by C\n")
        return load(folder)

    monkeypatch.setattr(Study, "load", noisy)
    status, out, err = run(capfd, "front", study, "--json")

    assert status == 0
    assert json.loads(out)["num_trials"] == 4
    assert "printed by C" in err
