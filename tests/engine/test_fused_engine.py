"""Whole engines with `kernels.fused` on and off: the same tokens and logits, and a record that says which ran."""

import pytest
import torch

from codesign.engine.kernels import fused
from codesign.engine.kernels.compiled import Missing
from codesign.engine.models.shape import ARCHITECTURES
from tests.engine.driving import generate, request, tiny_engine
from tests.engine.models.test_logits import random_tokens
from tests.engine.test_score import scored

ON, OFF = {"fused": True}, {"fused": False}
found = fused.load(torch.float32)
needs_kernels = pytest.mark.skipif(isinstance(found, Missing), reason=str(found))


@needs_kernels
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_tokens_are_the_same(architecture: str) -> None:
    requests = [request(str(index), 20 + 30 * index, 12, ignore_eos=True) for index in range(4)]

    on, off = (tiny_engine(architecture, max_step_tokens=64, kernels=kernels) for kernels in (ON, OFF))

    assert "codesign::fused" in on.facts()["kernels"]["fused"]
    assert generate(on, *requests) == generate(off, *requests)


@needs_kernels
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("policy", ["full", "streaming_llm", "h2o"])
def test_logits_are_the_same(policy: str, dtype: str) -> None:
    """Bit for bit: the pieces are, and everything between them is the same code."""
    kv = {"policy": {"name": policy, **({} if policy == "full" else {"kv_budget": 64})}}
    text = random_tokens(120)

    on, off = (
        scored(tiny_engine("Qwen3ForCausalLM", dtype=dtype, kv=kv, kernels=kernels), [text], 80)[0]
        for kernels in (ON, OFF)
    )

    assert torch.equal(on, off)


def test_the_record_says_what_is_fused_and_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tiny_engine().facts()["kernels"]["fused"] == "none"
    half = tiny_engine(dtype="fp16", kernels=ON).facts()["kernels"]["fused"]
    assert half == "none: written for bf16 and fp32, activations are float16"

    monkeypatch.setattr(fused, "load", lambda dtype: Missing("no C compiler (gcc) on this machine"))
    engine = tiny_engine(kernels=ON)

    assert engine.facts()["kernels"]["fused"] == "none: no C compiler (gcc) on this machine"
    assert generate(engine, request("a", 20, 5)) == generate(tiny_engine(), request("a", 20, 5))


@needs_kernels
def test_what_is_packed_does_not_depend_on_the_pieces(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    """A method that looks at activations packs the same weights, and finds those of the other engine in the cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    weights = {"name": "int4", "group_size": 32, "method": "gptq"}

    first, second = (tiny_engine(weights=weights, kernels=kernels) for kernels in (ON, OFF))

    assert [engine.facts()["resolved"]["weight_cache"] for engine in (first, second)] == ["made", "found"]
    assert generate(first, request("a", 20, 8)) == generate(second, request("a", 20, 8))
