"""Does a ragged decode step cost the sum of its lengths? One 2048-token sequence alone, with seven of 64 tokens beside
it, and eight of 2048 tokens, measured in turns; attention and KV store only, the least favourable part of a step.

    python tests/benchmarks/ragged_attention.py [--rounds 40] [--threads 2] [--heads 12 --kv-heads 2 --layers 8]

Prints one JSON document: medians in milliseconds per step, and their ratios to the long sequence alone.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Sequence

import torch

from codesign.engine.attention.layer import Attention
from codesign.engine.attention.rope import Rope
from codesign.engine.batch import Batch
from codesign.engine.step import StepPlan, decode_plan
from codesign.registry import ATTENTION, KV_CODECS, KV_POLICIES

CPU = torch.device("cpu")
CASES = {"long_alone": [2048], "long_and_seven_short": [2048] + [64] * 7, "eight_long": [2048] * 8}


class Case:
    """One batch of sequences, decoding over and over at the same lengths: nothing is ever accepted."""

    def __init__(self, lengths: Sequence[int], args: argparse.Namespace) -> None:
        self.args, self.lengths = args, lengths
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[args.dtype]
        self.attention = Attention(
            num_layers=args.layers,
            num_heads=args.heads,
            num_kv_heads=args.kv_heads,
            head_dim=64,
            scale=0.125,
            rope=Rope(1 / 10000 ** (torch.arange(0, 64, 2) / 64)),
            policy=KV_POLICIES.create("full"),
            codec=KV_CODECS.create("native"),
            backend=ATTENTION.create(args.backend),
            num_slots=len(lengths),
            max_model_len=2304,
            max_query_len=1,
            dtype=dtype,
            device=CPU,
        )
        self.qkv = [torch.randn(4096, heads, 64).to(dtype) for heads in (args.heads, args.kv_heads, args.kv_heads)]
        for slot, length in enumerate(lengths):
            self.run(
                StepPlan(
                    slots=(slot,),
                    query_lens=(length - 1,),
                    token_ids=(0,) * (length - 1),
                    positions=tuple(range(length - 1)),
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
        slots = range(len(self.lengths))
        plan = decode_plan(slots, [0] * len(slots), [own - 1 for own in self.lengths], commits=self.commits)
        self.commits = tuple((slot, 0) for slot in slots)
        return self.run(plan)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rounds", 40), ("threads", 2), ("layers", 8), ("heads", 6), ("kv-heads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--backend", choices=ATTENTION.names(), default="sdpa")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    cases = {name: Case(lengths, args) for name, lengths in CASES.items()}
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
        "step_ms": {name: round(own * 1e3, 3) for name, own in median.items()},
        "ratio_to_long_alone": {name: round(own / median["long_alone"], 3) for name, own in median.items()},
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
