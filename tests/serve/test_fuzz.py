"""A hundred requests that nobody thought of; `tests/benchmarks/serve_soak.py` sends two thousand."""

from collections.abc import Callable

import pytest

from tests.serve.process import ServerProcess

pytest.importorskip("schemathesis", reason="schemathesis is not installed")
pytest.importorskip("fastapi", reason="the extra `serve` is not installed")


def test_nothing_from_the_servers_own_schema_or_beside_it_is_a_5xx(
    start: Callable[..., ServerProcess],
) -> None:
    from tests.serve.fuzz import GENERATING, fuzz

    server = start("{dtype: fp32, max_batch_size: 4, max_model_len: 96}")
    answers = fuzz(server.url, server.headers, num_cases=100, seed=5)

    assert sum(answers.values()) >= 90
    assert sum(answers[path, 200] for path in GENERATING) > 3
    assert all(answers[path, 400] > 3 for path in GENERATING)
    server.stop()
    assert "Traceback" not in server.stderr
