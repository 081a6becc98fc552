"""With what `kernels.graphs` would replay no step: a search would measure the same engine twice."""

from codesign.spec.engine_config import EngineConfig

# Members whose output tokens need more than counts and slots in tensors; tests/spec/test_graph_rules.py asks them.
GROUP_CODECS = ("int4", "low_rank")
UNFIXED_POLICIES = {
    "dynamic": "which sequence is under which policy is known in Python alone",
    "streaming_llm": "in each step it turns the keys of sinks, of more sequences or fewer",
}


def never_replayed(config: EngineConfig) -> str | None:
    """Why no step of a resolved configuration could be replayed, on any device, or None; also where none should be."""
    reason = _unfixed(config) if config.kernels.graphs else None
    return None if reason is None else f"kernels.graphs with {reason}, or kernels.graphs false"


def _unfixed(config: EngineConfig) -> str | None:
    kv, attention = config.kv, config.attention.name
    if attention != "triton":
        return f"attention {attention}: Python gives it masks or lengths, others in each step; use attention triton"
    if config.parallel.num_ranks > 1:
        return "parallel sizes above 1: ranks talk to each other between their kernels; use one rank"
    if kv.policy.name in UNFIXED_POLICIES:
        return f"kv.policy {kv.policy.name}: {UNFIXED_POLICIES[kv.policy.name]}; use another kv.policy"
    if kv.codec.name in GROUP_CODECS:
        return (
            f"kv.codec {kv.codec.name}: how many groups of tokens it has, another number in each step, comes from "
            "Python; use kv.codec native, int8 or fp8"
        )
    if kv.place.name != "device":
        return f"kv.place {kv.place.name}: rows come and go while a step runs; use kv.place device"
    return None


def unrecorded(config: EngineConfig, device: str) -> str | None:
    """Why no step is recorded on "cpu" or "cuda", or None; also where none should be."""
    if config.kernels.graphs and device != "cuda":
        return f"kernels.graphs on a {device.upper()}: only a CUDA device records steps; use kernels.graphs false"
    return None
