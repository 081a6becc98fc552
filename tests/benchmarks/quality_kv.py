"""What each KV policy and codec costs in quality: retrieval and KL for every policy x budget x codec.

    python tests/benchmarks/quality_kv.py [--model DIR] [--samples 16] [--sequences 8]

Every configuration is built and judged as a trial does it (`measure.quality`): a prompt is prefilled, the policy cuts
it, the rest is forced through the step loop. Writes reports/benchmarks/quality_kv.json (with every sample's score) and
.md; exits 1 when a required check does not hold. Members are taken from the registry; what cannot be built is listed
with its reason.
"""

import argparse
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from codesign.bundled import heldout_texts, target_path
from codesign.engine.build import build_engine
from codesign.engine.engine import Engine
from codesign.engine.models.load import read_config
from codesign.engine.models.tokenizer import Tokenizer
from codesign.errors import CodesignError
from codesign.measure.provenance import provenance
from codesign.measure.quality import run_suite
from codesign.measure.ruler import TASKS
from codesign.measure.suite import ASKED, RULER_LENGTHS, ruler_items
from codesign.registry import KV_CODECS, KV_POLICIES
from codesign.spec.engine_config import Choice, EngineConfig, KVConfig, Scalar
from codesign.spec.model import ModelSpec
from tests.benchmarks.quality_kv_report import (
    BUDGETS,
    COMPARED_BUDGET,
    FULL,
    GRID_LENGTH,
    NEEDLES,
    Result,
    checks,
    report,
)
from tests.benchmarks.quality_kv_rows import kept_rows

REPORTS = Path(__file__).parents[2] / "reports" / "benchmarks"
PREFILL = 0.75  # share of a held-out sequence that is prompt
EXPLAINED = ("streaming_llm", "h2o", "snapkv")  # whose kept rows are looked at
Knobs = dict[str, Scalar]
Asked = Mapping[str, int]  # in which ways each task is asked -> of how many samples


# A window as long as the question, six to nine tokens: the queries of 24 more tokens of code outvote it. The paper's 32
# are measured beside it. Neighbourhoods of seven hold the five digits.
_WINDOW: Knobs = {"window_tokens": 8, "kernel_size": 7}
# Label -> (member, knobs beside the budget). Members that are not named here are taken with their defaults.
VARIANTS: dict[str, tuple[str, Knobs]] = {
    "streaming_llm": ("streaming_llm", {}),
    "h2o none": ("h2o", {"score_norm": "none"}),
    "h2o query_count": ("h2o", {"score_norm": "query_count"}),
    "h2o decayed": ("h2o", {"score_norm": "decayed", "decay": 0.99}),
    "snapkv": ("snapkv", _WINDOW),
    "snapkv w32": ("snapkv", {}),
    "pyramidkv": ("pyramidkv", _WINDOW),
    "ada_kv": ("ada_kv", _WINDOW),
    "r_kv": ("r_kv", {"buffer_tokens": 16}),  # the default of 128 would be all that the smaller budgets have
}


def variants() -> dict[str, tuple[str, Knobs]]:
    """Every registered policy but `full`, under one label or several."""
    registered = KV_POLICIES.names()
    named = {label: variant for label, variant in VARIANTS.items() if variant[0] in registered}
    known = {"full", *(name for name, _ in named.values())}
    return {**named, **{name: (name, {}) for name in registered if name not in known}}


class Judge:
    """Builds and judges configurations at one length."""

    def __init__(self, model: Path, length: int, *, num_samples: int, num_sequences: int, scratch: Path) -> None:
        self._spec = ModelSpec(name=model.name, path=str(model))
        self.length, self._reference = length, scratch / f"{length}.npy"
        encode = Tokenizer(model).encode
        texts = [encode(document.text) for document in heldout_texts()]
        filler = [token for ids in texts for token in ids]
        self._items = ruler_items(encode, filler, lengths=[length], count=num_samples, seed=1)
        long_enough = [ids for ids in texts if len(ids) >= length]
        self._sequences = [long_enough[number % len(long_enough)][-length:] for number in range(num_sequences)]

    def build(
        self, policy: Choice, codec: str, *, max_model_len: int | None = None, max_batch_size: int = 16
    ) -> Engine:
        kv = KVConfig(policy=policy, codec=Choice(codec))
        length = max_model_len or self.length
        return build_engine(self._spec, EngineConfig(kv=kv, max_model_len=length, max_batch_size=max_batch_size))

    def items(self, tasks: Sequence[str], asked: Asked) -> list[dict[str, Any]]:
        return [
            item
            for task, (way, count) in itertools.product(tasks, asked.items())
            for item in [item for item in self._items if (item["task"], item["asked"]) == (task, way)][:count]
        ]

    def __call__(
        self, policy: Choice, codec: str = "native", *, tasks: Sequence[str], asked: Asked, text: bool = True
    ) -> dict[str, Any]:
        """Per-sample scores, or why it cannot be built; the first text that is judged must be that of `FULL`."""
        try:
            engine = self.build(policy, codec)
        except CodesignError as refusal:
            return {"refused": str(refusal)}
        items = self.items(tasks, asked)
        scores = self.scores(engine, items, text=text)
        answers: dict[str, dict[str, dict[str, list[Any]]]] = {}
        for item, exact, log_prob in zip(items, scores["is_exact"], scores["log_prob"], strict=True):
            own = answers.setdefault(item["task"], {}).setdefault(item["asked"], {"is_exact": [], "log_prob": []})
            own["is_exact"].append(exact)
            own["log_prob"].append(log_prob)
        facts = engine.facts()
        rows = facts["resolved"]["kv_budget_tokens"]
        found = {"answers": answers, "rows": sum(rows) / len(rows), "kv_bytes": facts["bytes"]["kv"]}
        return {**found, **{name: scores[name] for name in ("kl", "top1", "nll") if text}}

    def scores(self, engine: Engine, items: Sequence[dict[str, Any]], *, text: bool) -> dict[str, Any]:
        sequences = self._sequences if text else []
        suite: dict[str, Any] = {
            "text": {"sequences": sequences, "num_prefill": round(PREFILL * self.length)},
            "retrieval": [],
            "ruler": items,
        }
        if text and not self._reference.exists():
            run_suite(engine, {**suite, "ruler": [], "write_reference": str(self._reference)}, lambda: None)
        return run_suite(engine, {**suite, "reference": str(self._reference)} if text else suite, lambda: None)

    def keeps_all(self, name: str, knobs: Knobs, scratch: Path) -> bool | str:
        """Whether a policy whose budget holds every token gives the logits of `full`, bit for bit; or why not built.

        There is room for one more token than any sequence has, so the policy does manage the rows: as a fraction of
        1.0 it would not be asked. PyramidKV keeps all of them only without its slope.
        """
        logits, items = [], self.items(NEEDLES, {"after_output": 2})
        try:
            own = {**knobs, "beta": 1} if name == "pyramidkv" else knobs
            for choice in (FULL, Choice.of(name, kv_budget=self.length, **own)):
                engine = self.build(choice, "native", max_model_len=self.length + 1)
                path = scratch / "keep_all.npy"
                text = {"sequences": self._sequences[:2], "num_prefill": round(PREFILL * self.length)}
                suite = {"text": text, "retrieval": [], "ruler": items, "write_reference": str(path)}
                answers = run_suite(engine, suite, lambda: None)["log_prob"]
                logits.append((np.load(path), answers))
        except CodesignError as refusal:
            return str(refusal)
        (full, full_answers), (kept, kept_answers) = logits
        return bool(np.array_equal(full, kept)) and full_answers == kept_answers


def longest_context(model: Path) -> int:
    return int(read_config(model)["max_position_embeddings"])


def run(args: argparse.Namespace, scratch: Path) -> Result:
    """Everything that is measured, as plain JSON."""
    count = args.samples
    twice, in_prompt = {"in_prompt": 2 * count, "after_output": count}, {"in_prompt": count}
    judges = {
        length: Judge(args.model, length, num_samples=2 * count, num_sequences=args.sequences, scratch=scratch)
        for length in RULER_LENGTHS
        if length <= longest_context(args.model)
    }
    counts = {length: max(1, count * 1024 // max(1024, length)) for length in judges}
    grid = judges.pop(GRID_LENGTH)
    found: Result = {"lengths": [GRID_LENGTH, *judges], "grid": {}, "kept": {}}
    choices = {
        label: {budget: Choice.of(name, kv_budget=budget, **knobs) for budget in BUDGETS}
        for label, (name, knobs) in variants().items()
    }

    for codec in sorted(KV_CODECS.names(), key=lambda name: (name != "native", name)):
        is_native = codec == "native"
        of_full, of_others = (twice, twice) if is_native else (dict.fromkeys(ASKED, count), in_prompt)
        own = found["grid"][codec] = {"full": {"": grid(FULL, codec, tasks=NEEDLES, asked=of_full)}}
        for label, budgets in choices.items():
            own[label] = {
                str(budget): grid(choice, codec, tasks=NEEDLES, asked=of_others) for budget, choice in budgets.items()
            }
            say(f"{codec}: {label}")
    compared = {"full": FULL, **{label: budgets[COMPARED_BUDGET] for label, budgets in choices.items()}}
    others = [task for task in TASKS if task not in NEEDLES]
    found["other_tasks"] = {
        label: grid(choice, tasks=others, asked=dict.fromkeys(ASKED, count), text=False)
        for label, choice in compared.items()
    }
    say("other tasks")
    found["full"] = {
        str(length): judge(FULL, tasks=list(TASKS), asked=dict.fromkeys(ASKED, counts[length]), text=False)
        for length, judge in judges.items()
    }
    found["other_lengths"] = {
        label: {
            str(length): judge(choice, tasks=NEEDLES, asked={"in_prompt": counts[length]}, text=False)
            for length, judge in judges.items()
        }
        for label, choice in compared.items()
        if label != "full"
    }
    say("other lengths")
    found["keep_all"] = {label: grid.keeps_all(name, knobs, scratch) for label, (name, knobs) in variants().items()}
    for label, (name, _) in variants().items():
        if name in EXPLAINED:
            engine = grid.build(compared[label], "native", max_batch_size=1)
            found["kept"][label] = kept_rows(engine, grid.items(NEEDLES, in_prompt))
    return found


def say(line: str) -> None:
    print(f"{time.perf_counter() - STARTED:7.1f} s  {line}", file=sys.stderr, flush=True)


STARTED = time.perf_counter()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=target_path())
    parser.add_argument(
        "--samples", type=int, default=16, help="of each task; twice as many where policies are compared"
    )
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--out", type=Path, default=REPORTS / "quality_kv.json")
    args = parser.parse_args()
    if (longest := longest_context(args.model)) < GRID_LENGTH:
        parser.error(f"{args.model}: its context is {longest} tokens, the grid has {GRID_LENGTH}")
    model = ModelSpec(
        name="the bundled target" if args.model == target_path() else args.model.name, path=str(args.model)
    )
    origin = provenance(model, "cpu")
    with tempfile.TemporaryDirectory() as scratch:
        results = run(args, Path(scratch))
    facts = {
        "command": " ".join(["python tests/benchmarks/quality_kv.py", *sys.argv[1:]]),
        "date": datetime.now(UTC).date().isoformat(),
        "num_samples": args.samples,
        "num_sequences": args.sequences,
        "wall_s": time.perf_counter() - STARTED,
        **origin,
    }
    document = {"facts": facts, "results": results}
    args.out.write_text(json.dumps(document) + "\n")  # before anything is concluded: a long run is not lost
    found = checks(results)
    args.out.write_text(json.dumps({**document, "checks": found}) + "\n")
    args.out.with_suffix(".md").write_text(report(results, found, facts))
    print(args.out.with_suffix(".md").read_text())
    return 0 if all(check["holds"] for check in found if check["is_required"]) else 1


if __name__ == "__main__":
    sys.exit(main())
