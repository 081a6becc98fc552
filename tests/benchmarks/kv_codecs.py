"""What does a KV codec cost or save in a decode step? Every codec at the same batch and length, measured in turns;
attention and KV store only, random rows.

    python tests/benchmarks/kv_codecs.py [--rounds 40] [--threads 2] [--batch 8] [--tokens 2048] [--dtype fp32]

Prints one JSON document: per codec the kernel, bytes, median milliseconds per step and their ratio to native.
"""

import argparse
import json
import platform
import statistics
import time

import torch

from codesign.engine.attention.layer import Attention
from codesign.engine.attention.rope import Rope
from codesign.engine.batch import Batch
from codesign.engine.step import StepPlan, decode_plan
from codesign.registry import ATTENTION, KV_CODECS, KV_POLICIES

CPU = torch.device("cpu")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Case:
    """`batch` sequences decoding over and over at the same length: nothing is ever accepted."""

    def __init__(self, codec: str, args: argparse.Namespace) -> None:
        self.args, dtype = args, DTYPES[args.dtype]
        self.attention = Attention(
            num_layers=args.layers,
            num_heads=args.heads,
            num_kv_heads=args.kv_heads,
            head_dim=args.head_dim,
            scale=args.head_dim**-0.5,
            rope=Rope(1 / 10000 ** (torch.arange(0, args.head_dim, 2) / args.head_dim)),
            policy=KV_POLICIES.create("full"),
            codec=KV_CODECS.create(codec),
            backend=ATTENTION.create(args.backend),
            num_slots=args.batch,
            max_model_len=args.tokens,
            max_query_len=1,
            dtype=dtype,
            device=CPU,
        )
        heads = (args.heads, args.kv_heads, args.kv_heads)
        self.qkv = [torch.randn(args.tokens, own, args.head_dim).to(dtype) for own in heads]
        length = args.tokens - 1
        for slot in range(args.batch):
            self.run(
                StepPlan(
                    slots=(slot,),
                    query_lens=(length,),
                    token_ids=(0,) * length,
                    positions=tuple(range(length)),
                    is_prompt=(True,),
                    is_prompt_end=(True,),
                )
            )
        self.commits: tuple[tuple[int, int], ...] = ()

    def run(self, plan: StepPlan) -> float:
        """Seconds of one step."""
        batch = Batch.of(plan, CPU)
        q, k, v = (part[: len(plan.token_ids)] for part in self.qkv)
        start = time.perf_counter()
        self.attention.begin(batch)
        for layer in range(self.args.layers):
            self.attention(layer, q, k, v, batch)
        self.attention.end(batch)
        return time.perf_counter() - start

    def step(self) -> float:
        slots = range(self.args.batch)
        plan = decode_plan(slots, [0] * len(slots), [self.args.tokens - 1] * len(slots), commits=self.commits)
        self.commits = tuple((slot, 0) for slot in slots)
        return self.run(plan)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"rounds": 40, "threads": 2, "layers": 4, "heads": 8, "kv-heads": 2, "head-dim": 64}
    for name, default in {**sizes, "batch": 8, "tokens": 2048}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--backend", choices=ATTENTION.names(), default="sdpa")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="fp32")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    cases = {name: Case(name, args) for name in KV_CODECS.names()}
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for round_number in range(args.rounds + 3):
        for name, case in cases.items():
            taken = case.step()
            if round_number >= 3:
                seconds[name].append(taken)
    median = {name: statistics.median(own) for name, own in seconds.items()}
    report = {
        "args": vars(args),
        "machine": f"{platform.processor() or platform.machine()}, torch {torch.__version__}",
        "codecs": {
            name: {
                "kernel": case.attention.kernel,
                "kv_bytes": case.attention.kv_bytes,
                "step_ms": round(median[name] * 1e3, 3),
                "step_to_native": round(median[name] / median["native"], 3),
            }
            for name, case in cases.items()
        },
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
