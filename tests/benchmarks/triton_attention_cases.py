"""The attention kernels as triton_compile.py compiles them: the rule's blocks, every codec, with and without extras."""

from collections.abc import Iterator
from typing import Any

import torch
from triton_case import Case  # beside this script

from codesign.engine.kernels.triton import column_sums
from codesign.engine.kernels.triton.combine import columns_kernel, combine_kernel
from codesign.engine.kernels.triton.decode import decode_kernel
from codesign.engine.kernels.triton.decode_int4 import decode_int4_kernel
from codesign.engine.kernels.triton.splits import MAX_SPLITS, decode_config
from codesign.engine.step import BLOCK_TOKENS

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
STORED = {"int8": "*i8", "fp8": "*u8"}
FOUND = {"sums_ptr": "*fp32", "largest_ptr": "*fp32", "total_ptr": "*fp32", "counts_ptr": "*i32", "scale": "fp32"}
# Query groups of 4 and 8 with one token or a few, which fill 16, 32 and 64 queries of a program.
QUERIES = (4, 32, 64)


def attention_cases(*, is_quick: bool) -> Iterator[Case]:
    dtypes = ("bf16",) if is_quick else tuple(DTYPES)
    for dtype in dtypes:
        for codec in ("native", "int8", "fp8"):
            for num_queries in QUERIES[:1] if is_quick or dtype == "fp32" else QUERIES:
                for head_dim in (128,) if is_quick else (64, 128):
                    yield decode_case(dtype, codec, num_queries, head_dim, extras="counts+slots")
                    yield decode_case(dtype, codec, num_queries, head_dim, extras="counts+table")
        for extras in () if is_quick else ("mask", "counts", "counts+slots+columns", "mask+columns"):
            yield decode_case(dtype, "native", 4, 128, extras=extras)
        for head_dim in (128,) if is_quick else (64, 128):
            for num_queries in QUERIES[:1] if is_quick or dtype == "fp32" else QUERIES[:2]:
                yield int4_case(dtype, num_queries, head_dim)
            yield from prompt_cases(dtype, head_dim, is_causal=True)
        if not is_quick:
            yield from prompt_cases(dtype, 128, is_causal=False)
        constants = {"HEAD_DIM": 128, "BLOCK_D": 128, "MAX_SPLITS": 2 * MAX_SPLITS}
        pointers = {**FOUND, "out_ptr": f"*{dtype}", "lse_ptr": "*fp32"}
        yield Case(f"combine {dtype} D128", combine_kernel, pointers, constants, {})
    pointers = {"scores_ptr": "*fp32", "lse_ptr": "*fp32", "counts_ptr": "*i32", "out_ptr": "*fp32"}
    yield Case("columns", columns_kernel, pointers, {"HAS_COUNTS": True, "BLOCK_R": 256}, {})


def rule(
    dtype: str, num_queries: int, head_dim: int, most_at_once: int = 64
) -> tuple[dict[str, int], dict[str, int], str]:
    """Block sizes, launch options and both in words, for a device of 108 multiprocessors."""
    config = decode_config(
        num_planes=256,
        num_queries=num_queries,
        num_rows=4096,
        head_dim=head_dim,
        dtype=DTYPES[dtype],
        num_processors=108,
        most_at_once=most_at_once,
    )
    blocks = {"BLOCK_M": config.block_m, "BLOCK_R": config.block_r}
    words = f"{config.block_m}x{config.block_r}, {config.num_warps} warps, {config.num_stages} stages"
    return blocks, config.options(), words


def decode_case(dtype: str, codec: str, num_queries: int, head_dim: int, *, extras: str) -> Case:
    block, options, words = rule(dtype, num_queries, head_dim)
    rows, of_row = STORED.get(codec, f"*{dtype}"), "*bf16" if codec in STORED else f"*{dtype}"
    pointers = {
        **FOUND,
        **dict.fromkeys(("query_ptr", "mask_ptr"), f"*{dtype}"),
        **dict.fromkeys(("key_ptr", "value_ptr"), rows),
        **dict.fromkeys(("key_scale_ptr", "value_scale_ptr"), of_row),
        "scores_ptr": "*fp32",
        **dict.fromkeys(("table_ptr", "slots_ptr"), "*i32"),
    }
    constants: dict[str, Any] = {
        **block,
        "CODEC": codec,
        "HAS_COUNTS": "counts" in extras,
        "TABLE_ROWS": BLOCK_TOKENS if "table" in extras else 0,
        "HAS_SLOTS": "slots" in extras,
        "HAS_MASK": "mask" in extras,
        "HAS_SCORES": "columns" in extras,
        "HEAD_DIM": head_dim,
        "BLOCK_D": head_dim,
        "HAS_ASM": True,
        "mask_stride_r": 1,
    }
    return Case(f"decode_{codec} {dtype} D{head_dim} {extras}: {words}", decode_kernel, pointers, constants, options)


def int4_case(dtype: str, num_queries: int, head_dim: int) -> Case:
    block, options, words = rule(dtype, num_queries, head_dim, most_at_once=32)
    ranges = ("key_step_ptr", "key_low_ptr", "value_step_ptr", "value_low_ptr")
    codes = ("key_code_ptr", "value_code_ptr")
    pointers = {**FOUND, **dict.fromkeys(ranges, "*fp16"), **dict.fromkeys(codes, "*u8"), "query_ptr": f"*{dtype}"}
    constants = {**block, "GROUP": 32, "CHANNELS": 32, "HEAD_DIM": head_dim}
    name = f"decode_int4 {dtype} D{head_dim} g32: {words}"
    return Case(name, decode_int4_kernel, pointers, constants, options)


def prompt_cases(dtype: str, head_dim: int, *, is_causal: bool) -> Iterator[Case]:
    block_m, block_r, options = column_sums.blocks(DTYPES[dtype], head_dim)
    pointers = {**dict.fromkeys(("query_ptr", "key_ptr", "mask_ptr"), f"*{dtype}"), "lse_ptr": "*fp32", "scale": "fp32"}
    constants = {
        "IS_CAUSAL": is_causal,
        "HAS_MASK": not is_causal,
        "HEAD_DIM": head_dim,
        "BLOCK_D": head_dim,
        "BLOCK_M": block_m,
        "BLOCK_R": block_r,
        "mask_stride_r": 1,
    }
    kind = "causal" if is_causal else "mask"
    words = (
        f"{dtype} D{head_dim} {kind}: {block_m}x{block_r}, {options['num_warps']} warps, {options['num_stages']} stages"
    )
    yield Case(f"prompt_lse {words}", column_sums.lse_kernel, pointers, constants, options)
    yield Case(
        f"prompt_sums {words}",
        column_sums.sums_kernel,
        {**pointers, "out_ptr": "*fp32", "log2_decay": "fp32"},
        constants,
        options,
    )
