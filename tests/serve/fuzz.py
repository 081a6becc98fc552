"""Schemathesis against a running server: requests made from its own OpenAPI document, valid and not."""

from collections import Counter
from collections.abc import Mapping

import hypothesis
import requests
import schemathesis
from hypothesis import strategies as st
from schemathesis import GenerationMode

GENERATING = ("/v1/completions", "/v1/chat/completions")


def fuzz(url: str, headers: Mapping[str, str], *, num_cases: int, seed: int) -> Counter[tuple[str, int]]:
    """(path, status) -> answers.

    Args:
        num_cases: requests sent; of two that generate tokens, one is as the document says and one is not.
    Raises:
        AssertionError: a 5xx, or a refusal that does not look like one of OpenAI's.
    """
    document = schemathesis.openapi.from_url(f"{url}/openapi.json", headers=dict(headers))
    operations = [found.ok() for found in document.get_all_operations()]
    generating = [operation for operation in operations if operation.path in GENERATING]
    others = [operation for operation in operations if operation.path not in GENERATING]
    assert len(generating) == 2 and len(others) >= 4
    cases = st.one_of(
        *(operation.as_strategy(mode) for operation in generating for mode in GenerationMode),
        st.one_of(*(operation.as_strategy(GenerationMode.POSITIVE) for operation in others)),
    )
    answers: Counter[tuple[str, int]] = Counter()

    with requests.Session() as session:

        @hypothesis.seed(seed)
        @hypothesis.settings(
            max_examples=num_cases,
            database=None,
            deadline=None,
            phases=[hypothesis.Phase.generate],  # a finding is shown as it was sent
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        @hypothesis.given(case=cases)
        def send(case: schemathesis.Case) -> None:
            answer = case.call(base_url=url, session=session, headers=dict(headers), timeout=120)
            answers[case.operation.path, answer.status_code] += 1
            assert answer.status_code < 500, (case.as_curl_command(), answer.text)
            if answer.status_code >= 400:
                assert set(answer.json()["error"]) == {"message", "type", "param", "code"}, answer.text

        send()
    return answers
