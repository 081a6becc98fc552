"""OpenAI's own client, pointed at a server of ours."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.serve.process import ServerProcess

openai = pytest.importorskip("openai", reason="OpenAI's client is not installed")


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=server.key, max_retries=0) as found:
        yield found


def test_it_completes_and_streams(client: Any) -> None:
    asked = {"model": "bundled", "prompt": "import os\n", "max_tokens": 12, "temperature": 0}
    answer = client.completions.create(**asked)
    chunks = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))

    assert answer.choices[0].finish_reason == "length"
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == answer.choices[0].text
    assert chunks[-1].usage == answer.usage
    assert answer.usage.completion_tokens == 12


def test_it_chats_and_streams(client: Any) -> None:
    asked: dict[str, Any] = {
        "model": "bundled",
        "messages": [{"role": "user", "content": "def f(x):"}],
        "max_completion_tokens": 8,
        "seed": 1,
        "logprobs": True,
        "top_logprobs": 2,
    }
    answer = client.chat.completions.create(**asked)
    text = ""
    with client.chat.completions.create(**asked, stream=True) as stream:
        for chunk in stream:
            text += chunk.choices[0].delta.content or ""

    assert text == answer.choices[0].message.content
    assert len(answer.choices[0].logprobs.content) == answer.usage.completion_tokens


def test_extensions_go_in_the_extra_body(client: Any) -> None:
    extra = {"top_k": 1, "ignore_eos": True}
    answer = client.completions.create(model="bundled", prompt="x", max_tokens=30, extra_body=extra)

    assert answer.usage.completion_tokens == 30


def test_it_lists_models(client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["bundled"]
    assert client.models.retrieve("bundled").owned_by == "codesign"


def test_its_errors_are_its_own(client: Any, server: ServerProcess) -> None:
    with pytest.raises(openai.BadRequestError, match="best_of"):
        client.completions.create(model="bundled", prompt="x", best_of=3)
    with pytest.raises(openai.NotFoundError, match="bundled"):
        client.completions.create(model="gpt-4", prompt="x")
    other = client.with_options(api_key="wrong")
    with pytest.raises(openai.AuthenticationError):
        other.models.list()
