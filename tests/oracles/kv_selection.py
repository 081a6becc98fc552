"""snapkv, pyramidkv and ada_kv against kvpress: the same model, prompts and window; scores and kept rows.

    python -m tests.oracles.kv_selection ORACLE_PYTHON          the bundled target in fp32 on held-out text

Scores agree within 5e-4 of themselves: both sides round q·k, up to hundreds, in fp32. Kept rows are equal but where
scores tie as closely, or where budgets differ by one row, which is then the next in rank. Ours runs as a whole engine,
in chunks, and is asked for kvpress's number of rows. What differs, and what it is asked for instead:

sinks      ours never evicts the first 4 tokens, kvpress pins none: 0 here.
tokens     kvpress keeps int(T · (1 - ratio)), a row fewer where the product is rounded down: 59 of 600 at 0.9, not 60.
beta       with K rows on average and window w, kvpress's top layer keeps K/beta rows, window included; ours keeps
           w + (K - w)/beta, as in the paper. Here beta is chosen such that the tops are equal ("matched").
fallback   where the top layer would keep fewer than w rows (and where K > T - w), kvpress gives every layer K rows,
           whatever beta is: snapkv. Ours has no fallback and is asked for beta 1.
cap        kvpress gives no layer more than T - w rows and makes the slope smaller; ours gives what a layer cannot use
           to the others. kvpress's line still has mean K: the matched beta covers it.
least      kvpress's top layer may keep the window alone, 32 rows; ours keeps a row beside it: 33, and the slope less.
rounding   kvpress rounds each layer, ours such that the sum is L · K: a row at most, and none in these cases.
floor      ada_kv's alpha is a share of all K rows of a head in kvpress, window included, and of K - w rows in ours:
           floor_fraction is chosen such that as many rows are safe.
"""

import argparse
import dataclasses
import hashlib
import sys
from pathlib import Path

import torch
from torch import Tensor

from codesign.bundled import heldout_texts, target_path
from codesign.engine.attention.layer import Attention
from codesign.engine.build import build_engine
from codesign.engine.engine import Engine
from codesign.engine.kv.policies.pyramidkv import PyramidKV
from codesign.engine.kv.policies.snapkv import SnapKV
from codesign.engine.kv.policy import Prompt
from codesign.engine.models.tokenizer import Tokenizer
from codesign.spec.engine_config import Choice, EngineConfig, KVConfig
from codesign.spec.model import ModelSpec
from codesign.spec.request import Request, SamplingParams
from tests.oracles.exchange import Tensors, ask, keep_tensors, provenance

WINDOW, KERNEL, NUM_LAYERS, TOLERANCE = 32, 5, 10, 5e-4
KNOBS = {"window_tokens": WINDOW, "kernel_size": KERNEL, "num_sink_tokens": 0}
MAX_STEP_TOKENS = 588  # the last chunk of 600 tokens is shorter than the window


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Knobs of kvpress: `ratio` of the rows is removed; beta is pyramidkv's, alpha ada_kv's."""

    policy: str
    num_tokens: int
    ratio: float
    beta: int = 1
    alpha: float = 0.0

    @property
    def name(self) -> str:
        knob = {"pyramidkv": f" beta {self.beta}", "ada_kv": f" alpha {self.alpha}"}.get(self.policy, "")
        return f"{self.policy} {self.num_tokens} ratio {self.ratio}{knob}"

    @property
    def kept(self) -> int:
        """Rows per head that kvpress keeps on average."""
        return int(self.num_tokens * (1 - self.ratio))

    @property
    def top(self) -> float:
        """Rows that kvpress's rule gives the top layer before it looks whether the window fits."""
        return max(self.kept / self.beta, 2 * self.kept - (self.num_tokens - WINDOW))

    @property
    def falls_back(self) -> bool:
        return self.policy == "pyramidkv" and not WINDOW <= self.top <= self.kept

    @property
    def ours(self) -> Choice:
        """Our policy, asked for what kvpress does."""
        knobs: dict[str, int | float] = {**KNOBS, "kv_budget": self.kept}
        if self.policy == "pyramidkv":
            knobs["beta"] = 1 if self.falls_back else (self.kept - WINDOW) / max(self.top - WINDOW, 1)
        if self.policy == "ada_kv":
            num_safe = max(0, int(self.kept * self.alpha) - WINDOW)
            knobs["floor_fraction"] = (num_safe + 0.5) / (self.kept - WINDOW)  # between whole rows: never rounded off
        return Choice.of(self.policy, **knobs)


CASES = [
    *(Case(policy="snapkv", num_tokens=600, ratio=ratio) for ratio in (0.75, 0.9)),
    *(Case(policy="snapkv", num_tokens=1024, ratio=ratio) for ratio in (0.25, 0.5, 0.875)),
    *(Case(policy="pyramidkv", num_tokens=600, ratio=ratio, beta=beta) for ratio, beta in ((0.5, 20), (0.75, 3))),
    *(
        Case(policy="pyramidkv", num_tokens=1024, ratio=ratio, beta=beta)
        for ratio, beta in ((0.25, 20), (0.5, 5), (0.875, 3))
    ),
    *(  # kvpress falls back
        Case(policy="pyramidkv", num_tokens=num_tokens, ratio=ratio, beta=20)
        for num_tokens, ratio in ((600, 0.75), (1024, 0.75), (600, 0.04))
    ),
    *(
        Case(policy="ada_kv", num_tokens=num_tokens, ratio=ratio, alpha=alpha)
        for num_tokens, ratio, alpha in ((600, 0.75, 0.2), (1024, 0.5, 0.5), (1024, 0.875, 0.2))
    ),
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scored(SnapKV):
    """Remembers the scores of each layer, [H_kv, T]."""

    seen: list[Tensor] = dataclasses.field(default_factory=list)

    def score(self, prompt: Prompt) -> Tensor:
        self.seen.append(super().score(prompt))
        return self.seen[-1]


def prompts() -> Tensors:
    """ "ids.LENGTH" [LENGTH] int32, one after the other from the start of the held-out text."""
    tokenizer, ids = Tokenizer(target_path()), list[int]()
    for document in heldout_texts()[:4]:
        ids += tokenizer.encode(document.text)
    return {f"ids.{len(part)}": torch.tensor(part, dtype=torch.int32) for part in (ids[:600], ids[600:1624])}


def our_scores(ids: Tensor) -> Tensor:
    """[L, H_kv, T - W] of the rows before the window."""
    engine = _engine(Choice.of("snapkv", kv_budget=WINDOW + 1, **KNOBS), len(ids))
    policy = engine.parts.attention.policy = Scored(kv_budget=WINDOW + 1, **KNOBS)
    _prefill(engine, ids)
    return torch.stack(policy.seen)[..., :-WINDOW]


def our_kept(case: Case, ids: Tensor) -> Tensor:
    """[L, H_kv, T] bool: whose rows are in the cache after the prompt."""
    engine = _engine(case.ours, len(ids))
    _prefill(engine, ids)
    attention = engine.parts.attention
    assert isinstance(attention, Attention)
    kept = {}
    for group in attention.store.groups:
        for index, layer in enumerate(group.layers):
            for head, (first, count) in enumerate(group.heads(index, 0, len(ids))):
                positions = group.position[index, 0].flatten()[first : first + count].long()
                kept[layer, head] = torch.zeros(len(ids), dtype=torch.bool).index_fill_(0, positions, True)
    return torch.stack([kept[place] for place in sorted(kept)]).unflatten(0, (NUM_LAYERS, -1))


def _engine(policy: Choice, num_tokens: int) -> Engine:
    config = EngineConfig(
        dtype="fp32",
        max_batch_size=1,
        max_model_len=num_tokens + 1,
        max_step_tokens=MAX_STEP_TOKENS,
        kv=KVConfig(policy=policy),
    )
    return build_engine(ModelSpec(name="bundled", path=str(target_path())), config)


def _prefill(engine: Engine, ids: Tensor) -> None:
    engine.submit(Request(request_id="", prompt_token_ids=tuple(ids.tolist()), sampling=SamplingParams(max_tokens=1)))
    while engine.has_work:
        engine.step()


def relative_difference(ours: Tensor, theirs: Tensor) -> float:
    """Largest of all scores; none of theirs is 0."""
    return float(((ours - theirs).abs() / theirs).max())


def differences(case: Case, ours: Tensor, theirs: Tensor, scores: Tensor) -> list[str]:
    """What of kept rows [L, H_kv, T] nothing above explains; scores [L, H_kv, T - W] are theirs."""
    found = []
    if int(ours.sum()) != ours[..., 0].numel() * case.kept:
        found.append(f"ours keeps {int(ours.sum())} rows")
    if not ours[..., -WINDOW:].all():
        found.append("ours evicts window rows")
    for layer in range(len(ours)):
        for head in range(ours.shape[1]):
            own, other = ours[layer, head, :-WINDOW], theirs[layer, head, :-WINDOW]
            few, many = sorted((int(own.sum()), int(other.sum())))
            ranked = torch.cat((torch.tensor([float("inf")]), scores[layer, head].sort(descending=True).values))
            between = scores[layer, head][own != other]
            if many - few > (case.policy != "snapkv"):
                found.append(f"layer {layer} head {head}: budgets {int(own.sum())}, kvpress {int(other.sum())}")
            elif ((between < ranked[many] * (1 - TOLERANCE)) | (between > ranked[few] * (1 + TOLERANCE))).any():
                found.append(f"layer {layer} head {head}: {len(between)} rows of {many} differ")
    return found


def packed(kept: Tensor) -> Tensor:
    """[..., T] bool as [..., T / 8] uint8, the first row in the lowest bit."""
    return (kept.unflatten(-1, (-1, 8)) << torch.arange(8)).sum(dim=-1).to(torch.uint8)


def unpacked(bits: Tensor) -> Tensor:
    return (bits[..., None] >> torch.arange(8) & 1).flatten(-2).bool()


def budgets_of(case: Case, theirs: Tensor) -> dict[str, list[int]]:
    """Rows per head of each layer: kvpress's, ours as it is asked here, and ours with the same beta."""
    sizes = {"num_layers": NUM_LAYERS, "max_model_len": case.num_tokens}
    matched = PyramidKV(**case.ours.knob_dict)  # type: ignore[arg-type]
    return {
        "kvpress": theirs[:, 0].sum(dim=-1).tolist(),
        "ours_matched_beta": list(matched.budgets(**sizes)),
        "ours_same_beta": list(dataclasses.replace(matched, beta=case.beta).budgets(**sizes)),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("python", type=Path, help="of an environment with kvpress")
    python = parser.parse_args().python
    torch.set_num_threads(1)  # sums in one order: the golden changes when a project does, not with the machine's load
    ids = prompts()
    cases = {case.name: dataclasses.asdict(case) for case in CASES}
    settings = {"model": str(target_path()), "window": WINDOW, "kernel": KERNEL, "cases": cases}
    theirs, signature = ask(python, "kv_selection_kvpress", ids, settings)
    is_other, largest = False, {}
    for name, own in ids.items():
        length = len(own)
        ours, other = our_scores(own), theirs[f"scores.{length}"]
        relative, absolute = relative_difference(ours, other), float((ours - other).abs().max())
        largest[length] = {"absolute": float(f"{absolute:.2g}"), "relative": float(f"{relative:.2g}")}
        is_other |= relative > TOLERANCE
        print(f"kv_selection: scores of {name}: {absolute:.1e}, {relative:.1e} of themselves; allowed {TOLERANCE}")
    budgets, equal_heads = {}, {}
    for case in CASES:
        ours, other = our_kept(case, ids[f"ids.{case.num_tokens}"]), theirs[case.name]
        found = differences(case, ours, other, theirs[f"scores.{case.num_tokens}"])
        is_other |= bool(found)
        num_equal = int((ours == other).all(dim=-1).sum())
        print(f"  {case.name:36} equal in {num_equal} of {ours[..., 0].numel()} heads")
        print("".join(f"    {line}\n" for line in found), end="")
        equal_heads[case.name] = num_equal
        if case.policy == "pyramidkv":
            budgets[case.name] = budgets_of(case, other)
    if is_other:
        return 1
    kept = {case.name: packed(theirs[case.name]) for case in CASES}
    scores = {name: own for name, own in theirs.items() if name.startswith("scores.")}
    facts = {
        "seed": "none: the first tokens of the held-out text",
        "model_sha256": hashlib.sha256((target_path() / "model.safetensors").read_bytes()).hexdigest(),
        "window": WINDOW,
        "kernel": KERNEL,
        "largest_score_differences": largest,
        "num_heads": NUM_LAYERS * theirs[CASES[0].name].shape[1],
        "num_heads_with_equal_rows": equal_heads,
        "budgets": budgets,
        "notes": (__doc__ or "").splitlines(),
    }
    made = provenance({"oracle": "kvpress", **signature, **facts}, "tests/oracles/kv_selection.py")
    keep_tensors("kv_selection", {**ids, **scores, **kept}, {"provenance": made})
    return 0


if __name__ == "__main__":
    sys.exit(main())
