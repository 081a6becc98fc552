"""With what `kernels.graphs` would replay no step: a search would measure the same engine twice."""

from codesign.spec.engine_config import EngineConfig

# Members whose output tokens need more than counts and slots in tensors; tests/spec/test_graph_rules.py asks the members.
GROUP_CODECS = ("int4", "low_rank")
UNFIXED_POLICIES = {
    "ada_kv": "its KV heads differ in length, which Python has to know",
    "dynamic": "which sequence is under which policy is known in Python alone",
    "streaming_llm": "the keys of its sinks are turned in each step, for more sequences or fewer",
}


def never_replayed(config: EngineConfig) -> str | None:
    """Why no step of a resolved configuration could be replayed, on any device, or None; also where none should be."""
    if not config.kernels.graphs:
        return None
    kv, reason = config.kv, None
    if config.attention.name != "triton":
        reason = (
            f"attention {config.attention.name}",
            "it is given masks or lengths by Python, anew in each step; use attention triton",
        )
    elif config.parallel.num_ranks > 1:
        reason = ("parallel sizes above 1", "ranks talk to each other between their kernels; use one rank")
    elif kv.policy.name in UNFIXED_POLICIES:
        reason = (f"kv.policy {kv.policy.name}", f"{UNFIXED_POLICIES[kv.policy.name]}; use another kv.policy")
    elif kv.codec.name in GROUP_CODECS:
        reason = (
            f"kv.codec {kv.codec.name}",
            "how many of its groups there are is told by Python, anew in each step; use kv.codec native, int8 or fp8",
        )
    elif kv.place.name != "device":
        reason = (f"kv.place {kv.place.name}", "rows come and go while a step runs; use kv.place device")
    return None if reason is None else f"kernels.graphs with {reason[0]}: {reason[1]}, or kernels.graphs false"


def unrecorded(config: EngineConfig, device: str) -> str | None:
    """Why no step is recorded on "cpu" or "cuda", or None; also where none should be."""
    if config.kernels.graphs and device != "cuda":
        return f"kernels.graphs on a {device.upper()}: only a CUDA device records steps; use kernels.graphs false"
    return None
