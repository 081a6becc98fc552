"""What a child says of its own quality, checked for shape, type and range before anybody computes with it.

A lie within the range cannot be seen here; that the scores are of the timed engine is the child's code, not its word.
"""

import math
from collections.abc import Mapping
from typing import Any

from codesign.measure.session import BuildFacts, TrialFailed
from codesign.results.record import Outcome

_MAX_NATS = 1e6
_MAX_VOCAB = 2**24


def checked_scores(scores: Mapping[str, Any], suite: Mapping[str, Any]) -> dict[str, Any]:
    """The scores that belong to this suite: `nll`, `kl`, `top1` per sequence, `retrieved` per prompt, `num_tokens`.

    `ruler` says of each sample what it was: {"task", "length_tokens", "asked", "is_exact", "log_prob"}.

    Raises:
        TrialFailed: `protocol`, naming the field that cannot be.
    """
    text = suite["text"]
    expected = [len(ids) - text["num_prefill"] for ids in text["sequences"]]
    if scores.get("num_tokens") != expected:
        raise _fault("num_tokens", scores.get("num_tokens"))
    found: dict[str, Any] = {"num_tokens": expected}
    for name, highest in (("nll", _MAX_NATS), ("kl", _MAX_NATS), ("top1", 1.0)):
        values = scores.get(name)
        if not isinstance(values, list) or len(values) != len(expected):
            raise _fault(name, values)
        for value in values:
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= highest:
                raise _fault(name, value)
        found[name] = [float(value) for value in values]
    retrieved = _flags(scores, "retrieved", len(suite["retrieval"]))
    is_exact, log_prob = _flags(scores, "is_exact", len(suite["ruler"])), scores.get("log_prob")
    if not isinstance(log_prob, list) or len(log_prob) != len(is_exact):
        raise _fault("log_prob", log_prob)
    ruler = []
    for item, exact, value in zip(suite["ruler"], is_exact, log_prob, strict=True):
        if isinstance(value, bool) or not isinstance(value, int | float) or not -_MAX_NATS <= value <= 0:
            raise _fault("log_prob", value)
        named = {name: item[name] for name in ("task", "length_tokens", "asked")}
        ruler.append({**named, "is_exact": exact, "log_prob": float(value)})
    return {**found, "retrieved": retrieved, "ruler": ruler}


def _flags(scores: Mapping[str, Any], name: str, count: int) -> list[bool]:
    values = scores.get(name)
    if not isinstance(values, list) or len(values) != count or not all(isinstance(value, bool) for value in values):
        raise _fault(name, values)
    return list(values)


def vocab_size(facts: BuildFacts) -> int:
    """The size of the vocabulary that the child says it built.

    Raises:
        TrialFailed: `protocol`.
    """
    value = facts.resolved.get("vocab_size")
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _MAX_VOCAB:
        raise _fault("vocab_size", value)
    for part in ("weights", "kv"):
        if part not in facts.bytes:
            raise _fault(f"bytes.{part}", None)
    return value


def _fault(name: str, value: object) -> TrialFailed:
    shown = "NaN" if isinstance(value, float) and math.isnan(value) else ascii(value)[:80]
    return TrialFailed(Outcome(kind="protocol", detail=f"the child says {name} is {shown}"))
