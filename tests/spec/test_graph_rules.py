"""What `kernels.graphs` is refused with, because no step would ever be replayed."""

from typing import Any

import pytest

from codesign.engine.build import build_engine
from codesign.engine.kv.codec import KVCodec
from codesign.engine.kv.policy import KVPolicy
from codesign.engine.models.tiny import tiny_spec
from codesign.errors import Unsupported
from codesign.registry import KV_CODECS, KV_POLICIES
from codesign.spec.engine_config import EngineConfig
from codesign.spec.graph_rules import GROUP_CODECS, UNFIXED_POLICIES
from codesign.spec.hardware import Hardware
from codesign.spec.rules import lacking, senseless


def config(**changes: Any) -> EngineConfig:
    wanted = {"max_model_len": 512, "attention": "triton", "kernels": {"graphs": True}, **changes}
    return EngineConfig.from_dict(wanted).resolve()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"attention": "sdpa"}, "with attention sdpa: .* use attention triton, or kernels.graphs false"),
        ({"attention": "eager"}, "with attention eager"),
        ({"parallel": {"tensor_parallel_size": 2}}, "with parallel sizes above 1: .* use one rank"),
        ({"parallel": {"pipeline_parallel_size": 2}}, "with parallel sizes above 1"),
        ({"kv": {"policy": "streaming_llm"}}, "with kv.policy streaming_llm: .*sinks.* use another kv.policy"),
        ({"kv": {"policy": "dynamic"}}, "with kv.policy dynamic"),
        ({"kv": {"codec": "int4"}}, "with kv.codec int4: .* use kv.codec native, int8 or fp8"),
        ({"kv": {"codec": "low_rank"}}, "with kv.codec low_rank"),
        ({"kv": {"place": "offload"}}, "with kv.place offload: .* use kv.place device"),
    ],
)
def test_what_is_never_replayed_is_refused_by_name(changes: dict[str, Any], reason: str) -> None:
    asked = config(**changes)

    with pytest.raises(Unsupported, match=f"kernels.graphs {reason}"):
        build_engine(tiny_spec(), asked)
    assert senseless(EngineConfig.from_dict({**asked.to_dict(), "kernels": {"graphs": False}})) is None


@pytest.mark.parametrize("layout", ["dense", "paged"])
@pytest.mark.parametrize("codec", ["native", "int8", "fp8"])
def test_rows_that_are_encoded_one_by_one_are_not(codec: str, layout: str) -> None:
    assert senseless(config(kv={"codec": codec, "layout": layout}, speculate="ngram", weights="int4")) is None


@pytest.mark.parametrize("name", ["snapkv", "pyramidkv", "ada_kv", "h2o", "r_kv"])
def test_policies_that_decide_between_steps_are_not(name: str) -> None:
    assert senseless(config(kv={"policy": name})) is None


def test_members_that_need_more_are_all_named() -> None:
    policies: dict[str, KVPolicy] = {name: KV_POLICIES.create(name) for name in KV_POLICIES.names()}
    codecs: dict[str, KVCodec] = {name: KV_CODECS.create(name) for name in KV_CODECS.names()}

    assert {
        name for name, policy in policies.items() if policy.key_space == "pre_rope" or len(policy.slot_policies(4)) > 1
    } == set(UNFIXED_POLICIES)
    assert {name for name, codec in codecs.items() if codec.group_size} == set(GROUP_CODECS)


def test_only_a_cuda_device_records() -> None:
    reason = "kernels.graphs on a CPU: only a CUDA device records steps; use kernels.graphs false"

    assert lacking(config(), Hardware(name="x", device="cpu")) == reason
    assert lacking(config(), Hardware(name="x", device="cuda")) is None
    with pytest.raises(Unsupported, match=reason):
        build_engine(tiny_spec(), config(max_model_len=64))
