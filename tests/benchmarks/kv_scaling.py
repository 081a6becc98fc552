"""Memory and speed of decode steps against context, `full` beside every KV policy and codec, on this CPU.

    python tests/benchmarks/kv_scaling.py [--contexts 1024 ... 32768] [--rounds 5] [--batch 24] [--threads 1]

A random-weights Qwen2 with fused kernels decodes `batch` sequences that stand at the end of their context. Nothing is
prefilled: random rows go in as a finished prompt does, chosen by the policy and stored by `LayerGroup.admit`. Then
whole steps (plan, run, commit of the step before), cases in turns within a round, several steps each; a round's figure
is the median of its steps. Three cases at most at a time, and `full` beside them in each of their rounds, so that a
share is of the same seconds and memory holds them at a batch at which one would think of a budget (11 GiB of rows at
24 x 32768). Three clocks: the step, the attention calls in it, and attention's `begin` and `end`
(commit, eviction, indices). Then the codecs again with one query per KV head instead of four, since a codec saves
bytes and not arithmetic. One thread, since what Python does between calls has only one.

Required of every case: rows of keys and values take what the budget or the bits of the codec promise, within 3 %. And
of every policy: from 8192 tokens on its attention takes the share of full's time that its bytes are of full's, within
15 %. Listed, not required: what a case keeps beside rows, and the time of codecs. A miss comes with the two figures
that explain it: the part of the time that no byte costs (a line through the shortest and the longest context), and the
time of one more byte beside full's.

Writes reports/benchmarks/kv_scaling.json, .md and .svg; exits 1 when something required is missed.
"""

import argparse
import dataclasses
import gc
import json
import os
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import torch
from kv_fill import beside_rows, fill  # beside this script
from kv_scaling_report import LEAST_CONTEXT, checks, svg, table
from torch import Tensor

from codesign.engine.attention.layer import Attention
from codesign.engine.attention.switched import SwitchedAttention, make_attention
from codesign.engine.batch import Batch
from codesign.engine.build import build_engine
from codesign.engine.kernels.pieces import choose
from codesign.engine.models.decoder import Decoder
from codesign.engine.models.rope_scaling import rope_of
from codesign.engine.models.tiny import tiny_config
from codesign.engine.runner import SingleRunner
from codesign.engine.step import decode_plan
from codesign.measure.provenance import code_state, machine
from codesign.registry import ATTENTION, KV_CODECS, KV_POLICIES
from codesign.spec.engine_config import EngineConfig, KernelsConfig
from codesign.spec.model import ModelSpec

REPORTS = Path(__file__).parents[2] / "reports" / "benchmarks"
CPU, DTYPE = torch.device("cpu"), torch.bfloat16
POLICIES = ("streaming_llm", "h2o", "snapkv", "pyramidkv", "ada_kv", "r_kv", "dynamic")
BUDGETS = (0.1, 0.25)
CODEC_BITS = {"native": 16.0, "int8": 8 + 16 / 64, "int4": 4 + 2 * 16 / 32}  # of a value, with its scale or range
MODEL = {  # heads as those of Llama-3 8B; the rest small, since it is not what is looked at
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 4096,
}
WARM_UP_STEPS = 3
# On a busy machine one thread's own time is the steadier figure; with several threads it means nothing.
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """budget None: unbounded."""

    policy: str = "full"
    codec: str = "native"
    budget: float | None = None

    @property
    def name(self) -> str:
        parts = [self.policy, *([] if self.codec == "native" else [self.codec])]
        return " ".join(parts + ([] if self.budget is None else [f"{self.budget:g}"]))

    def promised_share(self, num_slots: int) -> float:
        """Of the bytes of `full`: what budget and bits say, nothing beside the rows."""
        share = 1.0 if self.budget is None else self.budget
        if self.policy == "dynamic":
            num_full = max(1, int(0.25 * num_slots + 0.5))
            share = (num_full + (num_slots - num_full) * share) / num_slots
        return share * CODEC_BITS[self.codec] / CODEC_BITS["native"]


CODECS = [Setting(codec=codec) for codec in CODEC_BITS]
BUDGETED = [Setting(policy=policy, budget=budget) for budget in BUDGETS for policy in POLICIES]
# Alive at a time, beside full.
CODEC_GROUPS = [CODECS[1:]]
GROUPS = [*CODEC_GROUPS, *(BUDGETED[first : first + 3] for first in range(0, len(BUDGETED), 3))]


class TimedAttention:
    """What the runner calls, with the seconds of one step in `calls_s` and in begin and end, `around_s`."""

    def __init__(self, attention: Attention | SwitchedAttention, now: Callable[[], float]) -> None:
        self.attention, self._now = attention, now
        self.calls_s = self.around_s = 0.0

    def begin(self, batch: Batch) -> None:
        started = self._now()
        self.attention.begin(batch)
        self.calls_s, self.around_s = 0.0, self._now() - started

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, batch: Batch) -> Tensor:
        started = self._now()
        out = self.attention(layer, q, k, v, batch)
        self.calls_s += self._now() - started
        return out

    def end(self, batch: Batch) -> None:
        started = self._now()
        self.attention.end(batch)
        self.around_s += self._now() - started


class Case:
    """`batch` sequences with `num_tokens` tokens each, ready to decode."""

    def __init__(
        self, setting: Setting, model: Decoder, args: argparse.Namespace, *, context: int, num_tokens: int
    ) -> None:
        shape = model.shape
        knobs = {} if setting.budget is None else {"kv_budget": setting.budget}
        self.setting, self.args, self.now = setting, args, CLOCKS[args.clock]
        self.attention = make_attention(
            num_layers=shape.num_layers,
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            scale=shape.head_dim**-0.5,
            rope=rope_of(shape.rope, shape.head_dim),
            policy=KV_POLICIES.create(setting.policy, **knobs),
            codec=KV_CODECS.create(setting.codec),
            backend=ATTENTION.create("sdpa"),
            num_slots=args.batch,
            max_model_len=context,
            max_query_len=1,
            dtype=DTYPE,
            device=CPU,
            pieces=choose(True, dtype=DTYPE, device=CPU),
        )
        for part in self.parts:
            fill(part, num_tokens, num_heads=shape.num_heads)
        self.timed = TimedAttention(self.attention, self.now)
        self.runner = SingleRunner(model, self.timed, CPU)
        self.position, self.commits = num_tokens, list[tuple[int, int]]()
        self.rescoring_ms = self._named_ahead()
        for _ in range(WARM_UP_STEPS):
            self.step()

    @property
    def parts(self) -> list[Attention]:
        return self.attention.parts if isinstance(self.attention, SwitchedAttention) else [self.attention]

    def step(self) -> tuple[float, float, float]:
        """Milliseconds of one step, of its attention calls, and of what attention does around them."""
        slots = range(self.args.batch)
        started = self.now()
        plan = decode_plan(slots, [7] * len(slots), [self.position] * len(slots), commits=self.commits)
        logits = self.runner.run(plan)
        taken = self.now() - started
        if not logits.isfinite().all():
            raise RuntimeError(f"{self.setting.name}: logits that are not finite")
        self.position, self.commits = self.position + 1, [(slot, 1) for slot in slots]
        return taken * 1e3, self.timed.calls_s * 1e3, self.timed.around_s * 1e3

    def rewind(self, num_tokens: int) -> None:
        """Back to so many tokens, for a case that keeps every row; and warmed up again."""
        (part,) = self.parts
        part.store.commit(self.commits)
        for slot in range(self.args.batch):
            part.store.truncate(slot, num_tokens)
        self.position, self.commits = num_tokens, []
        for _ in range(WARM_UP_STEPS):
            self.step()

    def _named_ahead(self) -> float:
        """Milliseconds to score the rows of one sequence, for a policy that does so once in `lookahead` steps, else 0.

        The victims are every sequence's: they all hold the same rows.
        """
        taken = 0.0
        for part in self.parts:
            slots, position = list(range(len(part.store.num_tokens))), part.store.num_tokens[0]
            for group in part.store.groups:
                if group.queue is None:
                    continue
                started = self.now()
                group.replace(part.policy, [(0, position)], 1)
                taken += (self.now() - started) * 1e3
                group.queue.fill(slots, group.queue.named[:, :1].expand(-1, len(slots), -1, -1))
        return taken

    def encoded_share(self, context: int) -> float:
        """Of a sequence's tokens: the others, the newest of a codec of groups, are native and counted beside rows."""
        codec = self.parts[0].codec
        return codec.encoded_tokens(context) / context if codec.group_size else 1.0

    def facts(self) -> dict[str, Any]:
        parts, setting = self.parts, self.setting
        queues = [group.queue.length for part in parts for group in part.store.groups if group.queue is not None]
        between = min(queues, default=None)
        return {
            "case": setting.name,
            **dataclasses.asdict(setting),
            "kernel": self.attention.kernel,
            "kv_bytes": self.attention.kv_bytes,
            "beside_rows_bytes": beside_rows(parts),
            "rescoring_ms_per_sequence": self.rescoring_ms,
            "steps_between_rescorings": between,
            "rescoring_ms_per_step": self.rescoring_ms * self.args.batch / between if between else 0.0,
        }


def measure(
    model: Decoder, groups: list[list[Setting]], context: int, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """One result per setting; that of full, of all rounds, comes first."""
    num_tokens = context - 1 - WARM_UP_STEPS - args.rounds * args.steps
    full = Case(Setting(), model, args, context=context, num_tokens=num_tokens)
    every_round, results = [], []
    for number, group in enumerate(groups):
        others = [Case(setting, model, args, context=context, num_tokens=num_tokens) for setting in group]
        if number:
            full.rewind(num_tokens)
        rounds = _in_turns([full, *others], args)
        every_round += rounds[0]
        results += [
            {**_result(case, own, context, args), "full_beside": _times(rounds[0])}
            for case, own in zip(others, rounds[1:], strict=True)
        ]
        del others
        gc.collect()
    return [_result(full, every_round, context, args), *results]


def _in_turns(cases: list[Case], args: argparse.Namespace) -> list[list[tuple[float, ...]]]:
    """Of each case and round the medians over its steps."""
    taken: list[list[tuple[float, ...]]] = [[] for _ in cases]
    for number in range(args.rounds):
        order = range(len(cases)) if number % 2 == 0 else reversed(range(len(cases)))
        for index in order:
            steps = [cases[index].step() for _ in range(args.steps)]
            taken[index].append(tuple(median(own) for own in zip(*steps, strict=True)))
    return taken


def _times(rounds: list[tuple[float, ...]]) -> dict[str, list[float]]:
    step, calls, around = ([round(value, 4) for value in own] for own in zip(*rounds, strict=True))
    return {"step_ms": step, "attention_ms": calls, "around_ms": around}


def _result(case: Case, rounds: list[tuple[float, ...]], context: int, args: argparse.Namespace) -> dict[str, Any]:
    part = case.parts[0]
    num_layers, num_kv_heads = len(part.kv_budget_tokens), part.store.groups[0].key[0].shape[2]
    full_bytes = 2 * num_layers * num_kv_heads * part.store.head_dim * DTYPE.itemsize * args.batch * context
    return {
        "context": context,
        **case.facts(),
        "promised_bytes": full_bytes * case.setting.promised_share(args.batch),
        "encoded_share": case.encoded_share(context),
        **_times(rounds),
    }


def clock_us(now: Callable[[], float]) -> float:
    """What timing one attention call adds to it."""
    timed = TimedAttention(lambda *_: None, now)  # type: ignore[arg-type]
    started = time.perf_counter()
    for _ in range(10_000):
        timed(0, None, None, None, None)  # type: ignore[arg-type]
    return (time.perf_counter() - started) * 1e2


def build(shape: dict[str, int], args: argparse.Namespace) -> Decoder:
    longest = max(args.contexts)
    config = tiny_config("Qwen2ForCausalLM", **shape, num_hidden_layers=args.layers, max_position_embeddings=longest)
    engine = build_engine(
        ModelSpec(name="random", architecture=config),
        EngineConfig(max_batch_size=1, max_model_len=64, kernels=KernelsConfig(fused=True)),
        num_threads=args.threads,
    )
    return engine.parts.model


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024 << power for power in range(6)])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="of each case in a round")
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: this process's time; needs --threads 1")
    parser.add_argument("--out", type=Path, default=REPORTS / "kv_scaling.json")
    args = parser.parse_args()
    if args.clock == "cpu" and args.threads != 1:
        parser.error("--clock cpu needs --threads 1")
    started, load_before = time.perf_counter(), os.getloadavg()[0]
    long = [context for context in args.contexts if context >= LEAST_CONTEXT]
    parts = [
        (MODEL, GROUPS, args.contexts),
        (MODEL | {"num_attention_heads": MODEL["num_key_value_heads"]}, CODEC_GROUPS, [min(args.contexts), *long]),
    ]
    found: list[list[dict[str, Any]]] = []
    for shape, groups, contexts in parts:
        model, results = build(shape, args), []
        for context in dict.fromkeys(contexts):
            results += measure(model, groups, context, args)
            gc.collect()
            print(f"{context}: done after {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
        found.append(results)
    facts = {
        "command": " ".join(["python tests/benchmarks/kv_scaling.py", *sys.argv[1:]]),
        "date": datetime.now(UTC).date().isoformat(),
        "code": code_state(),
        "torch": torch.__version__,
        "machine": dict(machine()),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "num_threads": args.threads,
        "clock": args.clock,
        "clock_us_per_call": round(clock_us(CLOCKS[args.clock]), 2),
        "num_rounds": args.rounds,
        "steps_per_round": args.steps,
        "batch_size": args.batch,
        "contexts": args.contexts,
        "dtype": "bf16",
        "model": {**MODEL, "num_hidden_layers": args.layers},
        "load_average_before_and_after": [round(load_before, 2), round(os.getloadavg()[0], 2)],
        "seconds": round(time.perf_counter() - started),
    }
    document = {"facts": facts, "checks": checks(*found), "results": found[0], "one_query": found[1]}
    args.out.write_text(json.dumps(document, indent=1) + "\n")
    args.out.with_suffix(".svg").write_text(svg(document))
    args.out.with_suffix(".md").write_text(table(document, args.out.with_suffix(".svg").name))
    print(args.out.with_suffix(".md").read_text())
    return 0 if all(check["met"] for check in document["checks"] if check["required"]) else 1


if __name__ == "__main__":
    with torch.inference_mode():
        status = main()
    sys.exit(status)
