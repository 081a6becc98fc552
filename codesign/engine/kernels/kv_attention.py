"""Output tokens attend to a KV cache as it is stored, encoded or not, through the compiled C kernel beside this file.

For native rows it does what fused attention does not: it shows the weights, and heads may differ in length.
"""

import ctypes
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from codesign.engine.kernels import compiled
from codesign.engine.kernels.compiled import Missing, pointer

BLOCK = 32  # rows decoded at a time, and those of a block of paged storage
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class _Call(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("query", "past", "starts", "out", "columns", "scores")),
        *((name, ctypes.c_int32) for name in ("num_slots", "num_heads", "num_groups", "num_tokens", "dim")),
        *((name, ctypes.c_int32) for name in ("num_rows", "num_threads")),
        *((name, ctypes.c_float) for name in ("scale", "decay")),
    )


class _Table(ctypes.Structure):
    _fields_ = (("ids", ctypes.c_void_p), ("strides", ctypes.c_int64 * 2))


class Queries:
    """Queries of one call, with room for what they find.

    Args:
        query: [N, H, D], the tokens of B sequences packed one after the other; D a multiple of 8.
        num_tokens: [B] of each sequence, or of all alike.
        past: [B] rows that every query of a sequence sees, or [B, H_kv] where heads differ; its token t also sees the
            t + 1 rows after them.
        num_rows: R, at least past + num_tokens of each sequence.
        scale: of the softmax.
        want_columns: whether `columns` will be asked for; then sequences have equally many tokens.
        out: where they find it; contiguous.
        scores: fp32, one of each row that `KVAttention.native` is given, in its order, or None. A row's becomes `decay`
            times itself plus the weight that it received, mean of the query group; of sequences with one token each.

    Attributes:
        out: [N, H, D] in the dtype of the query.
        columns: [B, H_kv, num_tokens, R] fp32 softmax weights, mean of the query group; 0 for rows that are not seen.
    """

    def __init__(
        self,
        query: Tensor,
        past: Sequence[int] | Sequence[tuple[int, ...]],
        *,
        num_kv_heads: int,
        num_tokens: int | Sequence[int],
        num_rows: int,
        scale: float,
        want_columns: bool,
        out: Tensor | None = None,
        scores: Tensor | None = None,
        decay: float = 1.0,
    ) -> None:
        _, num_heads, dim = query.shape
        num_slots = len(past)
        counts = (num_tokens,) * num_slots if isinstance(num_tokens, int) else tuple(num_tokens)
        assert sum(counts) == len(query), "as many queries as the sequences have tokens"
        self.query = query.contiguous()
        self.out = torch.empty_like(self.query) if out is None else out
        self._past, self._starts = _past(tuple(past), num_kv_heads), _starts(counts)
        self.columns: Tensor | None = None
        if want_columns:
            assert len(set(counts)) == 1
            self.columns = query.new_empty(num_slots, num_kv_heads, counts[0], num_rows, dtype=torch.float32)
        assert scores is None or max(counts) == 1
        self.scores = scores  # kept until they are written
        self.struct = _Call(
            past=ctypes.addressof(self._past),
            starts=ctypes.addressof(self._starts),
            columns=None if self.columns is None else self.columns.data_ptr(),
            scores=None if scores is None else scores.data_ptr(),
            num_slots=num_slots,
            num_heads=num_kv_heads,
            num_groups=num_heads // num_kv_heads,
            num_tokens=max(counts),
            dim=dim,
            num_rows=num_rows,
            num_threads=torch.get_num_threads(),
            scale=scale,
            decay=decay,
        )

    def attend(self, function: Callable[..., int], *args: object, is_bf16: bool) -> None:
        """Runs a C function, which takes bf16 or else fp32."""
        query = self.query if is_bf16 else self.query.float()
        out = self.out if query.dtype == self.out.dtype else torch.empty_like(query)
        self.struct.query, self.struct.out = query.data_ptr(), out.data_ptr()
        if function(ctypes.byref(self.struct), *args):
            raise MemoryError(f"no memory for attention over {self.struct.num_rows} rows")
        if out is not self.out:
            self.out.copy_(out)


@dataclasses.dataclass(frozen=True)
class KVAttention:
    """The loaded functions. Stored tensors are on the CPU and contiguous from their second dimension on.

    Attributes:
        library: for all dtypes, in 256 bits.
        bf16: the same for queries in bf16, whose products are bf16 dot products; where the machine has them.
    """

    library: ctypes.CDLL
    bf16: ctypes.CDLL | Missing

    def is_bf16(self, name: str, *, head_dim: int, dtype: torch.dtype, group_size: int = 0) -> bool:
        """Whether rows so stored are read by the bf16 kernel for queries of this dtype."""
        has = not isinstance(self.bf16, Missing) and dtype == torch.bfloat16
        return has and head_dim % (64 if name == "int4" else 32) == 0 and group_size % 32 == 0

    def name(self, name: str, *, head_dim: int, dtype: torch.dtype, group_size: int = 0) -> str:
        """For a record: codesign::attend_int8, codesign::attend_int8_bf16."""
        is_bf16 = self.is_bf16(name, head_dim=head_dim, dtype=dtype, group_size=group_size)
        return f"codesign::attend_{name}" + ("_bf16" if is_bf16 else "")

    def beats_sdpa(self, *, head_dim: int, dtype: torch.dtype) -> bool:
        """Whether native rows are read faster than by ATen's fused attention.

        On an EPYC (Zen 4), one core, 2 KV heads of 64, 7 queries each, 16 sequences of 1024 rows: bf16 0.6 against
        2.1 ms, fp16 1.6 against 7.0 ms, fp32 3.9 against 2.5 ms; in bf16 without the bf16 kernel they are even.
        """
        return dtype == torch.float16 or self.is_bf16("native", head_dim=head_dim, dtype=dtype)

    def rows(self, name: str, queries: Queries, key: Sequence[Tensor], value: Sequence[Tensor]) -> None:
        """Rows encoded one by one: "int8" or "fp8" codes [B, H_kv, C, D] with bf16 scales [B, H_kv, C, 1]."""
        self._rows(name, queries, None, key, value)

    def paged_rows(
        self, name: str, queries: Queries, table: Tensor, key: Sequence[Tensor], value: Sequence[Tensor]
    ) -> None:
        """Rows encoded one by one, in blocks as `paged` has them: codes [.., 32, D] with scales [.., 32, 1]."""
        self._rows(name, queries, table, key, value)

    def _rows(
        self, name: str, queries: Queries, table: Tensor | None, key: Sequence[Tensor], value: Sequence[Tensor]
    ) -> None:
        self._run(name, queries, _blocks(table), *map(pointer, (*key, *value)), ctypes.c_int64(key[0].shape[2]))

    def native(
        self, queries: Queries, key: Tensor, value: Tensor, first: ctypes.Array[ctypes.c_int64] | None = None
    ) -> None:
        """Rows [B, H_kv, C, D] as they are; or a sequence's KV head begins at row first [B, H_kv] (`row_starts`) of
        them all."""
        rows, capacity = (pointer(key), pointer(value)), ctypes.c_int64(0 if first else key.shape[2])
        self._run("native", queries, None, first, *rows, capacity, _DTYPES[key.dtype])

    def paged(self, queries: Queries, table: Tensor, key: Tensor, value: Tensor) -> None:
        """Native rows in blocks of 32, each with the rows of every KV head.

        Args:
            table: int32 [B, H_kv, max_blocks] block ids, any strides before the last: heads may share theirs
                (`expand`). Row r of a sequence's head h is key[table[b, h, r // 32], h, r % 32].
            key, value: [num_blocks, H_kv, 32, D], contiguous.
        """
        rows = pointer(key), pointer(value)
        self._run("native", queries, _blocks(table), None, *rows, ctypes.c_int64(0), _DTYPES[key.dtype])

    def int4(
        self,
        queries: Queries,
        num_encoded: Sequence[int],
        encoded: Sequence[Tensor],
        key: Tensor,
        value: Tensor,
        *,
        group_size: int,
    ) -> None:
        """Tokens in int4 groups, then native rows.

        Args:
            num_encoded: [B] tokens of each sequence that lie in groups.
            encoded: codes [B, H_kv, T, D / 2], steps and lows [B, H_kv, T / group_size, D] of the keys; codes, steps
                and lows [B, H_kv, T, D / channels] of the values. channels is a multiple of 8, D of 16.
            key, value: [B, H_kv, C, D] rows after them.
        """
        counts = _numbers(ctypes.c_int32, num_encoded)
        self._run(
            "int4",
            queries,
            counts,
            *map(pointer, (*encoded, key, value)),
            ctypes.c_int64(encoded[0].shape[2]),
            ctypes.c_int64(key.shape[2]),
            group_size,
            key.shape[3] // encoded[-1].shape[3],
            _DTYPES[key.dtype],
            group_size=group_size,
        )

    def _run(self, name: str, queries: Queries, *args: object, group_size: int = 0) -> None:
        is_bf16 = self.is_bf16(name, head_dim=queries.struct.dim, dtype=queries.query.dtype, group_size=group_size)
        library = self.bf16 if is_bf16 else self.library
        by = [ctypes.byref(arg) if isinstance(arg, _Table) else arg for arg in args]
        queries.attend(getattr(library, f"attend_{name}"), *by, is_bf16=is_bf16)


@functools.lru_cache(maxsize=32)
def _past(past: tuple[int, ...] | tuple[tuple[int, ...], ...], num_heads: int) -> ctypes.Array[Any]:
    """[B, H_kv] for C; kept, since every layer of a step asks for the same."""
    every = [count for own in past for count in ([own] * num_heads if isinstance(own, int) else own)]
    return _numbers(ctypes.c_int32, every)


def row_starts(first: Iterable[int]) -> ctypes.Array[ctypes.c_int64]:
    """[B, H_kv] first rows for `KVAttention.native`, from as many numbers."""
    return _numbers(ctypes.c_int64, list(first))


@functools.lru_cache(maxsize=32)
def _starts(counts: tuple[int, ...]) -> ctypes.Array[Any]:
    """[B + 1] for C."""
    return _numbers(ctypes.c_int32, list(itertools.accumulate(counts, initial=0)))


def _numbers(kind: type[ctypes.c_int32] | type[ctypes.c_int64], numbers: Sequence[int]) -> ctypes.Array[Any]:
    """As C takes them; a tensor of so few would take ten times as long to make."""
    return (kind * len(numbers))(*numbers)


def _blocks(table: Tensor | None) -> _Table | None:
    """The caller keeps the table."""
    if table is None:
        return None
    assert table.dtype == torch.int32 and (table.shape[2] < 2 or table.stride(2) == 1)
    return _Table(table.data_ptr(), table.stride()[:2])


def _load_bf16() -> ctypes.CDLL | Missing:
    is_avx512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
    if not (is_avx512 and torch.cpu._is_avx512_bf16_supported() and torch.cpu._is_vnni_supported()):
        return Missing("no BF16 and VNNI instructions")
    return compiled.load("kv_attention_bf16")


@functools.cache
def load() -> KVAttention | Missing:
    """The kernel, tried out against a plain product, or why there is none."""
    library = compiled.load("kv_attention")
    if isinstance(library, Missing):
        return library
    found = KVAttention(library, _load_bf16())
    code = (torch.arange(2 * 3 * 40 * 16) * 37 % 251 - 125).to(torch.int8).view(2, 3, 40, 16)
    scale = (torch.arange(2 * 3 * 40) % 7 + 1).view(2, 3, 40, 1).to(torch.bfloat16) / 512
    query = (torch.arange(2 * 3 * 2 * 16.0) % 11 - 5).view(2, 6, 16)
    queries = Queries(query, [39, 39], num_kv_heads=3, num_tokens=1, num_rows=40, scale=0.25, want_columns=False)
    found.rows("int8", queries, (code, scale), (code, scale))
    row = code.double() * scale.double()
    expected = (query.view(2, 3, 2, 16).double() @ row.mT * 0.25).softmax(dim=-1) @ row
    if not torch.allclose(queries.out.double().view_as(expected), expected, rtol=1e-5, atol=1e-5):
        return Missing("the compiled kernel attends wrongly on this machine")
    return found


def usable(*, head_dim: int, device: torch.device) -> KVAttention | Missing:
    """The kernel for heads of this size on this device, or why it cannot be used."""
    if device.type != "cpu":
        return Missing(f"written for the CPU, not {device.type}")
    if head_dim % 8:
        return Missing(f"written for heads of a multiple of 8, not {head_dim}")
    return load()
