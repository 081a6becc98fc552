"""From what was sent to what the engine is asked: tokens, room, seeds, and chat without a template."""

import asyncio
import json
from typing import Any

import pytest

from codesign.bundled import target_path
from codesign.engine.models.tokenizer import Tokenizer
from codesign.serve.prompts import Prompts, seed_of_choice
from codesign.serve.refusal import Refusal
from codesign.serve.schema import ChatRequest, CompletionRequest, parse
from codesign.spec.request import Request

TOKENIZER = Tokenizer(target_path())


def asked(max_model_len: int = 64, **fields: Any) -> list[Request]:
    prompts = Prompts(TOKENIZER, "it has no chat template", max_model_len=max_model_len, vocab_size=4096)
    body = json.dumps({"model": "m", **fields}).encode()
    try:
        if "messages" in fields:
            return asyncio.run(prompts.of_chat(parse(body, ChatRequest)))
        return asyncio.run(prompts.of_completion(parse(body, CompletionRequest)))
    finally:
        prompts.close()


def test_defaults_are_openais() -> None:
    (request,) = asked(prompt="import os")

    sampling = request.sampling
    assert request.prompt_token_ids == tuple(TOKENIZER.encode("import os"))
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p, sampling.top_k) == (16, 1.0, 1.0, 0)
    assert sampling.logprobs is None and not sampling.ignore_eos


def test_requests_are_in_the_order_of_prompts_then_choices() -> None:
    found = asked(prompt=[[1], [2]], n=2, seed=3)

    assert [request.prompt_token_ids for request in found] == [(1,), (1,), (2,), (2,)]
    assert [request.sampling.seed for request in found] == [3, seed_of_choice(3, 1)] * 2


def test_without_a_seed_no_two_choices_share_one() -> None:
    seeds = {request.sampling.seed for _ in range(4) for request in asked(prompt="x", n=8)}

    assert len(seeds) == 32


def test_zero_temperature_and_zero_logprobs_are_not_taken_for_absent() -> None:
    (request,) = asked(prompt="x", temperature=0, logprobs=0)

    assert (request.sampling.temperature, request.sampling.logprobs) == (0, 0)


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "fits"),
    [([1] * 48, 16, True), ([1] * 49, 16, False), ([1] * 63, 1, True), ([1] * 64, 1, False)],
)
def test_prompt_and_output_have_the_models_room(prompt: list[int], max_tokens: int, fits: bool) -> None:
    if fits:
        assert len(asked(prompt=prompt, max_tokens=max_tokens)) == 1
        return
    with pytest.raises(Refusal, match="64") as caught:
        asked(prompt=prompt, max_tokens=max_tokens)
    assert (caught.value.status, caught.value.code) == (400, "context_length_exceeded")


def test_a_token_outside_the_vocabulary_is_named() -> None:
    with pytest.raises(Refusal, match="4096"):
        asked(prompt=[1, 4096])


def test_a_model_without_a_template_does_not_chat() -> None:
    with pytest.raises(Refusal, match="has no chat template; use /v1/completions") as caught:
        asked(messages=[{"role": "user", "content": "x"}])
    assert caught.value.status == 400


def test_a_text_far_too_long_is_refused_by_its_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    longest = 0
    encode = Tokenizer.encode

    def watched(tokenizer: Tokenizer, text: str, **options: bool) -> list[int]:
        nonlocal longest
        longest = max(longest, len(text))
        return encode(tokenizer, text, **options)

    monkeypatch.setattr(Tokenizer, "encode", watched)
    with pytest.raises(Refusal, match="more than"):
        asked(prompt="word " * 100_000)

    assert longest < 10_000


def test_a_long_text_of_few_tokens_is_taken() -> None:
    spaces = " " * 60_000  # 32 in a token, so twice the characters that are looked at first still fit
    (request,) = asked(prompt=spaces, max_model_len=2048)

    assert len(request.prompt_token_ids) == len(TOKENIZER.encode(spaces)) < 2048
