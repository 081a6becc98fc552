"""One server for all tests that only ask it."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.serve.process import ServerProcess

CONFIG = "{dtype: fp32, max_batch_size: 4, max_model_len: 128}"


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """The bundled model with four slots of 128 tokens, behind a key."""
    pytest.importorskip("uvicorn", reason="the extra `serve` is not installed")
    pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
    folder: Path = tmp_path_factory.mktemp("server")
    process = ServerProcess(folder, CONFIG)
    yield process
    process.stop()
    assert "Traceback" not in process.stderr


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., ServerProcess]]:
    """Starts servers of a test's own; none outlives the test, however it ends."""
    started = []

    def starting(config: str, *options: str, **more: Any) -> ServerProcess:
        started.append(ServerProcess(tmp_path, config, *options, **more))
        return started[-1]

    yield starting
    for process in started:
        process.kill()
