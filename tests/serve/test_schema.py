"""What is asked is checked field by field; each bound plus one is refused, by name."""

import json
from typing import Any

import pytest

from codesign.serve import bounds
from codesign.serve.refusal import Refusal
from codesign.serve.schema import ChatRequest, CompletionRequest, GenerationRequest, parse

COMPLETION = {"model": "m", "prompt": "hi"}
CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


def refusal(kind: type[GenerationRequest], document: object) -> Refusal:
    with pytest.raises(Refusal) as caught:
        parse(document if isinstance(document, bytes) else json.dumps(document).encode(), kind)
    assert caught.value.status == 400
    return caught.value


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [("hi", ["hi"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]]), ("", [""])],
)
def test_prompts_of_every_form(prompt: Any, prompts: Any) -> None:
    assert parse(json.dumps({**COMPLETION, "prompt": prompt}).encode(), CompletionRequest).prompts == prompts


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", [""] * (bounds.PROMPTS + 1)),
        ("prompt", [[1]] * (bounds.PROMPTS + 1)),
        ("prompt", []),
        ("prompt", [[]]),
        ("prompt", [1, "a"]),
        ("prompt", [-1]),
        ("prompt", [2**31]),
        ("prompt", [0.5]),
        ("prompt", [[[0.1, 0.2]]]),  # embeddings are not taken
        ("prompt", None),
        ("prompt", {"tensor": "AAAA"}),
        ("n", bounds.CHOICES + 1),
        ("n", 0),
        ("stop", ["x"] * (bounds.STOPS + 1)),
        ("stop", "x" * (bounds.STOP_CHARS + 1)),
        ("stop", ["x" * (bounds.STOP_CHARS + 1)]),
        ("stop", ""),
        ("stop", [""]),
        ("max_tokens", 0),
        ("max_tokens", 2**31),
        ("max_tokens", "5"),
        ("max_tokens", True),
        ("temperature", 2.1),
        ("temperature", -0.1),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("seed", 2**63),
        ("seed", 0.5),
        ("logprobs", bounds.TOP_LOGPROBS + 1),
        ("logprobs", True),
        ("stream", 1),
        ("user", "x" * (bounds.USER_CHARS + 1)),
        ("stream_options", {"include_usage": True}),  # without stream
        ("stream_options", {"include_usage": True, "other": 1}),
        ("model", "x" * 257),
        ("echo", True),
        ("best_of", 2),
        ("suffix", "x"),
        ("frequency_penalty", 0.1),
        ("presence_penalty", -0.1),
        ("logit_bias", {"5": 1}),
        ("chat_template", "{{ 1 }}"),
        ("chat_template_kwargs", {}),
        ("prompt_embeds", "AAAA"),
        ("messages", []),
        ("x" * 1000, 1),
    ],
)
def test_a_wrong_field_of_a_completion_is_refused_by_name(field: str, value: object) -> None:
    found = refusal(CompletionRequest, {**COMPLETION, field: value})

    assert found.param == field[:60]
    assert field[:60] in found.message
    assert len(found.message) < 400


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("messages", []),
        ("messages", [{"role": "user", "content": "x"}] * (bounds.MESSAGES + 1)),
        ("messages", [{"role": "tool", "content": "x"}]),
        ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]),
        ("messages", [{"role": "user", "content": "x", "name": "y"}]),
        ("messages", [{"role": "user"}]),
        ("top_logprobs", 2),  # without logprobs
        ("top_logprobs", bounds.TOP_LOGPROBS + 1),
        ("logprobs", 2),
        ("max_completion_tokens", 0),
        ("tools", []),
        ("tool_choice", "auto"),
        ("response_format", {"type": "json_object"}),
        ("add_generation_prompt", False),
        ("chat_template", "x"),
        ("chat_template_kwargs", {"a": 1}),
        ("documents", []),
        ("prompt", "x"),
    ],
)
def test_a_wrong_field_of_a_chat_is_refused_by_name(field: str, value: object) -> None:
    found = refusal(ChatRequest, {**CHAT, field: value})

    assert found.param == field
    assert field in found.message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("echo", False),
        ("best_of", 1),
        ("suffix", ""),
        ("frequency_penalty", 0),
        ("presence_penalty", 0.0),
        ("logit_bias", {}),
        *((name, None) for name in CompletionRequest.model_fields if name not in ("model", "prompt")),
    ],
)
def test_a_value_that_asks_for_nothing_is_taken(field: str, value: object) -> None:
    parse(json.dumps({**COMPLETION, field: value}).encode(), CompletionRequest)


def test_both_bounds_on_output_are_one_too_many() -> None:
    assert "one of the two" in refusal(ChatRequest, {**CHAT, "max_tokens": 1, "max_completion_tokens": 1}).message


def test_a_misspelt_field_names_the_nearest() -> None:
    assert "did you mean 'temperature'" in refusal(CompletionRequest, {**COMPLETION, "temprature": 1}).message


def test_what_is_not_supported_says_what_may_stand_there() -> None:
    assert "leave it out (or 0" in refusal(CompletionRequest, {**COMPLETION, "presence_penalty": 1}).message


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"1",
        b"null",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"model": "m", "prompt": "\xff"}',
        b'{"model": "m", "prompt": "\\ud800"}',
        b'{"model": "m", "prompt": "x", "temperature": NaN}',
        b'{"model": "m", "prompt": "x", "temperature": Infinity}',
        b'{"model": "m", "prompt": "x", "max_tokens": ' + b"9" * 10_000 + b"}",
    ],
    ids=lambda body: repr(body[:24]),
)
def test_a_body_that_is_no_request_is_refused(body: bytes) -> None:
    refusal(CompletionRequest, body)


def test_a_message_of_parts_is_their_text() -> None:
    content = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    asked = parse(json.dumps({**CHAT, "messages": [{"role": "user", "content": content}]}).encode(), ChatRequest)

    assert asked.messages[0].plain == {"role": "user", "content": "ab"}
