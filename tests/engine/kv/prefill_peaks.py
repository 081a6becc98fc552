"""Run by itself: how far resident memory rises while H2O prefills prompts of growing length. One JSON document."""

import json
from pathlib import Path

import torch

from codesign.engine.attention import weights
from codesign.engine.attention.layer import Attention
from codesign.engine.attention.rope import Rope
from codesign.engine.batch import Batch
from codesign.engine.memory import reset_peak_memory
from codesign.engine.step import StepPlan
from codesign.registry import ATTENTION, KV_CODECS, KV_POLICIES

CPU = torch.device("cpu")
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, BUDGET = 2, 1, 16, 64
SMALL_TILE, WHOLE = 1 << 19, 1 << 40  # scores per tile: 2 MiB, and no tiles at all
# name -> (tokens per chunk, scores per tile, prompt lengths)
CASES = {
    "whole": (16384, SMALL_TILE, (2048, 4096, 8192, 16384)),
    "chunked": (512, SMALL_TILE, (2048, 4096, 8192, 16384)),
    "untiled": (16384, WHOLE, (1024, 2048, 4096)),
}


def resident_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) << 10


def prefill(num_tokens: int, chunk: int) -> None:
    attention = Attention(
        num_layers=1,
        num_heads=NUM_HEADS,
        num_kv_heads=NUM_KV_HEADS,
        head_dim=HEAD_DIM,
        scale=HEAD_DIM**-0.5,
        rope=Rope(1 / 10000 ** (torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)),
        policy=KV_POLICIES.create("h2o", kv_budget=BUDGET),
        codec=KV_CODECS.create("native"),
        backend=ATTENTION.create("sdpa"),
        num_slots=1,
        max_model_len=num_tokens + 1,
        max_query_len=1,
        dtype=torch.float32,
        device=CPU,
    )
    for first in range(0, num_tokens, chunk):
        length = min(chunk, num_tokens - first)
        plan = StepPlan(
            slots=(0,),
            query_lens=(length,),
            token_ids=(0,) * length,
            positions=tuple(range(first, first + length)),
            is_prompt=(True,),
            is_prompt_end=(first + length == num_tokens,),
        )
        batch = Batch.of(plan, CPU)
        attention.begin(batch)
        q, k, v = (torch.randn(length, heads, HEAD_DIM) for heads in (NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS))
        attention(0, q, k, v, batch)
        attention.end(batch)
    assert attention.store.groups[0].rows_after(num_tokens) == BUDGET


def peaks(chunk: int, tile_scores: int, lengths: tuple[int, ...]) -> list[int]:
    """Bytes that each prompt adds to the process at its worst."""
    weights._TILE_SCORES = tile_scores
    grown = []
    for num_tokens in lengths:
        before = resident_bytes("VmRSS")
        reset_peak_memory()
        prefill(num_tokens, chunk)
        grown.append(resident_bytes("VmHWM") - before)
    return grown


if __name__ == "__main__":
    torch.set_num_threads(1)
    with torch.inference_mode():
        for chunk, _, _ in CASES.values():
            prefill(600, chunk)  # what is loaded at first use is not the prompt's
        print(json.dumps({name: peaks(*case) for name, case in CASES.items()}))
