"""Quality of a built engine, scored through its own step loop, in the child.

One plain forward pass cannot see eviction: here a part is prefilled, the policy acts at its end, and every later token
is forced one step at a time through the very runner and kernels that were timed (`engine.score`).

KL is to the unmodified model: KL(reference || this) in nats per token. The reference's log-probabilities lie in a
file that the unmodified configuration wrote (`write_reference`).
"""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from codesign.engine.engine import Engine
from codesign.engine.score import score

Progress = Callable[[], None]


def run_suite(engine: Engine, suite: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    """Scores the suite of `measure.suite` and returns plain JSON.

    With `suite["write_reference"]` (a path) the log-probabilities are written there. With `suite["reference"]` the
    result has `kl` and `top1` per sequence. Always `nll` per sequence, `retrieved` per prompt, and for each item of
    "ruler" `is_exact`, whether it was answered, and `log_prob`, the mean over its answer's tokens in nats.

    Args:
        progress: called after each step, to show that the engine is alive.
    """
    text = suite["text"]
    result = _text(engine, text["sequences"], int(text["num_prefill"]), suite, progress)
    result["retrieved"], _ = _answers(engine, suite["retrieval"], progress)
    result["is_exact"], result["log_prob"] = _answers(engine, suite["ruler"], progress)
    return result


def _text(
    engine: Engine, sequences: Sequence[Sequence[int]], num_prefill: int, suite: Mapping[str, Any], progress: Progress
) -> dict[str, Any]:
    num_forced = [len(ids) - num_prefill for ids in sequences]
    starts = np.concatenate([[0], np.cumsum(num_forced)])
    reference = np.load(suite["reference"], mmap_mode="r", allow_pickle=False) if suite.get("reference") else None
    written: np.ndarray[Any, Any] | None = None
    if suite.get("write_reference"):
        written = np.empty((int(starts[-1]), engine.vocab_size), dtype=np.float32)
    sums = {name: [0.0] * len(sequences) for name in ("nll", "kl", "top1")}

    def on_logits(index: int, position: int, logits: Tensor) -> None:
        progress()
        ours = torch.log_softmax(logits[0].double(), dim=-1).cpu()
        target = position + 1
        row = int(starts[index]) + target - num_prefill
        sums["nll"][index] -= float(ours[sequences[index][target]])
        if written is not None:
            written[row] = ours.numpy()
        if reference is not None:
            theirs = torch.from_numpy(np.array(reference[row])).double()
            # Plus q minus p, which sums to 0: so no term is negative, whatever fp32 rounded off the reference.
            sums["kl"][index] += float((theirs.exp() * (theirs - ours) + ours.exp() - theirs.exp()).sum())
            sums["top1"][index] += float(theirs.argmax() == ours.argmax())

    score(engine, [list(ids) for ids in sequences], num_prefill=num_prefill, on_logits=on_logits)
    if written is not None:
        _write_atomically(Path(suite["write_reference"]), written)
    wanted = ("nll", "kl", "top1") if reference is not None else ("nll",)
    result: dict[str, Any] = {
        name: [total / count for total, count in zip(sums[name], num_forced, strict=True)] for name in wanted
    }
    result["num_tokens"] = num_forced
    return result


def _answers(engine: Engine, items: Sequence[Mapping[str, Any]], progress: Progress) -> tuple[list[bool], list[float]]:
    """Of each item: whether its answer is, token for token, the engine's best guess; its mean log-probability.

    What an item's prompt has beyond its `num_prefill` is forced as output first.
    """
    is_exact, log_prob = [True] * len(items), [0.0] * len(items)
    full = [[*item["prompt"], *item["answer"]] for item in items]

    def on_logits(index: int, position: int, logits: Tensor) -> None:
        progress()
        if position < len(items[index]["prompt"]) - 1:
            return
        token = full[index][position + 1]
        is_exact[index] &= int(logits.argmax()) == token
        log_prob[index] += float(logits[0].double().log_softmax(-1)[token]) / len(items[index]["answer"])

    num_prefill = [item.get("num_prefill", len(item["prompt"])) for item in items]
    score(engine, full, num_prefill=num_prefill, on_logits=on_logits)
    return is_exact, log_prob


def _write_atomically(path: Path, array: "np.ndarray[Any, Any]") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        np.save(file, array, allow_pickle=False)
    os.replace(temporary, path)
