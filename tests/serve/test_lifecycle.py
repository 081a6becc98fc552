"""How a server starts and ends, as a process."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from codesign.bundled import target_path
from codesign.cli import main
from tests.serve.process import ROOT, RUNNER, ServerProcess, wait_until
from tests.serve.test_chat_template import HOSTILE

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")

LONG = {"model": "bundled", "prompt": "x", "max_tokens": 200, "ignore_eos": True, "stream": True}
Start = Callable[..., ServerProcess]
CONFIG = "{dtype: fp32, max_batch_size: 2, max_model_len: 1024}"


def run(capfd: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    status = main([str(argument) for argument in arguments])
    return status, capfd.readouterr().err


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG)
    return path


def test_sigterm_lets_running_requests_finish_and_takes_no_new_ones(start: Start) -> None:
    process = start(CONFIG)
    statuses: list[int] = []
    with (
        httpx.Client(base_url=process.url, headers=process.headers, timeout=60) as client,
        client.stream("POST", "/v1/completions", json=LONG) as answer,
    ):
        lines = answer.iter_lines()
        next(lines)
        process.signal(signal.SIGTERM)
        wait_until(lambda: "finish first" in process.stderr)
        statuses.append(client.post("/v1/completions", json={**LONG, "stream": False}).status_code)
        statuses.append(client.get("/health").status_code)
        events = [line for line in lines if line]
    status = process.wait()

    assert statuses == [503, 503]
    assert events[-1] == "data: [DONE]"
    assert json.loads(events[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
    assert status == 0, process.stderr
    assert "SIGTERM: served 1 sequences, 200 tokens; 0 were cut off" in process.stderr


def test_it_drains_though_nobody_reads_its_messages_any_more(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG)
    process = subprocess.Popen(
        [sys.executable, str(RUNNER), "serve", str(path), "--port", "0", "--model", "bundled"],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    try:
        assert process.stderr is not None
        ready = next(line for line in process.stderr if line.startswith("ready: "))
        with httpx.stream("POST", f"{ready.split()[1]}/completions", json=LONG, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.stderr.close()
            process.send_signal(signal.SIGTERM)
            events = [line for line in lines if line]
        process.wait(60)
    finally:
        process.kill()
        process.wait()

    assert events[-1] == "data: [DONE]"
    assert process.returncode >= 0


def test_a_second_signal_ends_at_once(start: Start) -> None:
    process = start(CONFIG, key=None)
    with httpx.stream("POST", f"{process.url}/v1/completions", json={**LONG, "n": 8}, timeout=60) as answer:
        lines = answer.iter_lines()
        next(lines)
        process.signal(signal.SIGINT)
        wait_until(lambda: "finish first" in process.stderr)
        process.signal(signal.SIGINT)
        with pytest.raises(httpx.RemoteProtocolError):
            for _ in lines:
                pass

    assert process.wait() == 0, process.stderr


def test_when_the_engine_fails_clients_are_told_and_the_process_ends_with_an_error(start: Start) -> None:
    process = start(CONFIG, runner=("--fail-after", "5"))
    answers: list[httpx.Response] = []
    with httpx.Client(base_url=process.url, headers=process.headers, timeout=60) as client:
        thread = threading.Thread(
            target=lambda: answers.append(client.post("/v1/completions", json={**LONG, "stream": False}))
        )
        thread.start()
        wait_until(lambda: client.get("/health").status_code == 503)
        thread.join()
    status = process.wait()

    assert answers[0].status_code == 500
    assert answers[0].json()["error"]["code"] == "engine_failed"
    assert status == 1
    assert "codesign: the engine failed: the logits are NaN or infinite" in process.stderr
    assert "Traceback" not in process.stderr


def test_an_open_address_without_a_key_is_exit_2(
    capfd: pytest.CaptureFixture[str], config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CODESIGN_API_KEY", raising=False)
    for host in ("0.0.0.0", "::", "192.0.2.1", "models.example"):
        status, err = run(capfd, "serve", config, "--model", "bundled", "--host", host)
        assert status == 2
        assert "an API key is needed" in err and "CODESIGN_API_KEY" in err


def test_an_open_address_with_a_key_is_served_by_any_address(start: Start, tmp_path: Path) -> None:
    key_file = tmp_path / "key"
    key_file.write_text("secret\n")
    process = start(CONFIG, "--host", "0.0.0.0", "--api-key-file", str(key_file), key=None)
    url = process.url.replace("0.0.0.0", "127.0.0.1")
    key = {"Authorization": "Bearer secret"}

    assert httpx.get(f"{url}/v1/models").status_code == 401
    assert httpx.get(f"{url}/v1/models", headers={**key, "Host": "192.168.0.7:80"}).status_code == 200
    assert httpx.get(f"{url}/v1/models", headers={**key, "Host": "evil.example"}).status_code == 403
    process.stop()


@pytest.mark.parametrize("text", ["", "\n", "two\nlines", "\x00", "caf\u00e9", "x" * 5000])
def test_a_key_that_is_none_is_refused(
    capfd: pytest.CaptureFixture[str], config: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CODESIGN_API_KEY", raising=False)
    file = config.parent / "key"
    file.write_text(text)
    status, err = run(capfd, "serve", config, "--model", "bundled", "--api-key-file", file)

    assert status == 2
    assert "printable ASCII" in err


def test_two_keys_are_one_too_many(
    capfd: pytest.CaptureFixture[str], config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CODESIGN_API_KEY", "one")
    status, err = run(capfd, "serve", config, "--model", "bundled", "--api-key-file", config)

    assert status == 2
    assert "use one" in err


def test_without_a_model_the_ways_to_name_one_are_said(capfd: pytest.CaptureFixture[str], config: Path) -> None:
    status, err = run(capfd, "serve", config)

    assert status == 2
    assert "--profile" in err and "--model" in err and "profile.yaml" in err


def test_random_weights_are_not_served(capfd: pytest.CaptureFixture[str], config: Path) -> None:
    (config.parent / "profile.yaml").write_text(
        "hardware: {name: here, device: cpu}\n"
        "model: {weights: random, model_type: llama, hidden_size: 64, intermediate_size: 128, num_hidden_layers: 1,\n"
        "  num_attention_heads: 2, num_key_value_heads: 1, vocab_size: 256, max_position_embeddings: 512}\n"
        "workload: {scenario: offline, prompt_tokens: 16, output_tokens: 4, num_requests: 4}\n"
        "objectives: [throughput_tokens_per_s]\n"
    )
    status, err = run(capfd, "serve", config)

    assert status == 2
    assert "no tokenizer" in err and "--model" in err


def test_the_profile_beside_the_configuration_names_the_model(start: Start, tmp_path: Path) -> None:
    (tmp_path / "profile.yaml").write_text(
        "hardware: {name: here, device: cpu, cores: 1}\nmodel: bundled\n"
        "workload: {scenario: offline, prompt_tokens: 16, output_tokens: 4, num_requests: 4}\n"
        "objectives: [throughput_tokens_per_s]\n"
    )
    process = start(CONFIG, "--profile", str(tmp_path / "profile.yaml"))

    assert "building bundled on cpu" in process.stderr
    process.stop()


def test_a_port_that_is_taken_is_said(capfd: pytest.CaptureFixture[str], config: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        status, err = run(capfd, "serve", config, "--model", "bundled", "--port", port)

    assert status == 1
    assert "in use" in err and "--port 0" in err


def test_a_configuration_that_is_wrong_is_exit_2(capfd: pytest.CaptureFixture[str], config: Path) -> None:
    config.write_text("max_batch_sise: 1\n")
    status, err = run(capfd, "serve", config, "--model", "bundled")

    assert status == 2
    assert "max_batch_size" in err


def test_what_cannot_be_built_is_exit_2(capfd: pytest.CaptureFixture[str], config: Path) -> None:
    config.write_text("max_model_len: 100000\n")
    status, err = run(capfd, "serve", config, "--model", "bundled", "--port", "0")

    assert status == 2
    assert "max_model_len" in err and "Traceback" not in err


def test_a_template_that_never_ends_holds_nobody_up(start: Start, tmp_path: Path) -> None:
    """The model directory brings the template; whoever chats is refused in time, and everybody else goes on."""
    model = tmp_path / "hostile"
    model.mkdir()
    for file in target_path().iterdir():
        (model / file.name).symlink_to(file)
    (model / "chat_template.jinja").write_text(HOSTILE["nested_range"])
    process = start(CONFIG, "--model", str(model))
    chat = {"model": "hostile", "messages": [{"role": "user", "content": "x"}]}
    with httpx.Client(base_url=process.url, headers=process.headers, timeout=60) as client:
        answers: list[httpx.Response] = []
        thread = threading.Thread(target=lambda: answers.append(client.post("/v1/chat/completions", json=chat)))
        thread.start()
        completion = client.post("/v1/completions", json={"model": "hostile", "prompt": "x", "max_tokens": 1})
        was_first = not answers
        thread.join()

    assert completion.status_code == 200 and was_first
    assert answers[0].status_code == 400
    assert answers[0].json()["error"]["code"] == "chat_template_failed"
    assert answers[0].elapsed.total_seconds() < 5  # 1 s of its own, on a machine that does other things too
    process.stop()


def test_without_the_extra_the_way_to_it_is_said(config: Path) -> None:
    code = (
        "import sys; sys.modules['fastapi'] = None; from codesign.cli import main; "
        f"sys.exit(main(['serve', {str(config)!r}, '--model', 'bundled']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )

    assert done.returncode == 2
    assert "pip install --editable '.[serve]'" in done.stderr and "Traceback" not in done.stderr
