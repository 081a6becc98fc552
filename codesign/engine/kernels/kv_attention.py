"""Output tokens attend to a KV cache as it is stored, encoded or not, through the compiled C kernel beside this file.

For native rows it does what fused attention does not: it shows the weights, and heads may differ in length.
"""

import ctypes
import dataclasses
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from codesign.engine.kernels import compiled
from codesign.engine.kernels.compiled import Missing, pointer

BLOCK = 32  # rows decoded at a time, and those of a block of paged storage
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class _Call(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("query", "past", "out", "scores", "largest", "sum", "scratch")),
        *((name, ctypes.c_int32) for name in ("num_slots", "num_heads", "num_queries", "num_tokens", "dim")),
        *((name, ctypes.c_int32) for name in ("num_rows", "num_threads")),
        ("scale", ctypes.c_float),
    )


class _Table(ctypes.Structure):
    _fields_ = (("ids", ctypes.c_void_p), ("strides", ctypes.c_int64 * 2))


class Queries:
    """Queries of one call, with room for what they find.

    Args:
        query: [B, H_kv, M, D], M = query group x num_tokens, tokens last; D a multiple of 8.
        past: [B] rows that every query of a sequence sees, or [B, H_kv] where heads differ; its token t also sees the
            t + 1 rows after them.
        num_rows: R, at least max(past) + num_tokens.
        scale: of the softmax.
        want_weights: whether `weights` will be asked for.
    """

    def __init__(
        self,
        query: Tensor,
        past: Sequence[int] | Sequence[Sequence[int]],
        *,
        num_tokens: int,
        num_rows: int,
        scale: float,
        want_weights: bool,
    ) -> None:
        num_slots, num_heads, num_queries, dim = query.shape
        self._dtype = query.dtype
        self._query = query.float().contiguous()
        own_past = torch.tensor(past, dtype=torch.int32)
        self._past = own_past.view(num_slots, -1).expand(-1, num_heads).contiguous()
        self._out = torch.empty_like(self._query)
        self._largest, self._sum = self._query.new_empty(2, *query.shape[:3], 1)
        self._scores: Tensor | None = None
        if want_weights:
            self._scores = self._query.new_full((*query.shape[:3], num_rows), float("-inf"))
        num_threads = torch.get_num_threads()
        self._scratch = self._query.new_empty(num_threads, BLOCK * (2 * dim + num_queries))
        self.struct = _Call(
            query=self._query.data_ptr(),
            past=self._past.data_ptr(),
            out=self._out.data_ptr(),
            scores=None if self._scores is None else self._scores.data_ptr(),
            largest=self._largest.data_ptr(),
            sum=self._sum.data_ptr(),
            scratch=self._scratch.data_ptr(),
            num_slots=num_slots,
            num_heads=num_heads,
            num_queries=num_queries,
            num_tokens=num_tokens,
            dim=dim,
            num_rows=num_rows,
            num_threads=num_threads,
            scale=scale,
        )

    @property
    def out(self) -> Tensor:
        """[B, H_kv, M, D] in the dtype of the query."""
        return self._out.to(self._dtype)

    @property
    def weights(self) -> Tensor | None:
        """[B, H_kv, M, R] fp32 softmax weights where they were wanted; 0 for rows that are not seen."""
        return None if self._scores is None else (self._scores - self._largest).exp_().div_(self._sum)


@dataclasses.dataclass(frozen=True)
class KVAttention:
    """The loaded functions. Stored tensors are on the CPU and contiguous from their second dimension on."""

    library: ctypes.CDLL

    def rows(self, name: str, queries: Queries, key: Sequence[Tensor], value: Sequence[Tensor]) -> None:
        """Rows encoded one by one: "int8" or "fp8" codes [B, H_kv, C, D] with bf16 scales [B, H_kv, C, 1]."""
        self._rows(name, queries, None, key, value)

    def paged_rows(
        self, name: str, queries: Queries, table: Tensor, key: Sequence[Tensor], value: Sequence[Tensor]
    ) -> None:
        """Rows encoded one by one, in blocks as `paged` has them: codes [.., 32, D] with scales [.., 32, 1]."""
        self._rows(name, queries, _blocks(table), key, value)

    def _rows(
        self, name: str, queries: Queries, table: _Table | None, key: Sequence[Tensor], value: Sequence[Tensor]
    ) -> None:
        function = getattr(self.library, f"attend_{name}")
        by = None if table is None else ctypes.byref(table)
        pointers = [pointer(part) for part in (*key, *value)]
        function(ctypes.byref(queries.struct), by, *pointers, ctypes.c_int64(key[0].shape[2]))

    def paged(self, queries: Queries, table: Tensor, key: Tensor, value: Tensor) -> None:
        """Native rows in blocks of 32, each with the rows of every KV head.

        Args:
            table: int32 [B, H_kv, max_blocks] block ids, any strides before the last: heads may share theirs
                (`expand`). Row r of a sequence's head h is key[table[b, h, r // 32], h, r % 32].
            key, value: [num_blocks, H_kv, 32, D], contiguous.
        """
        by = ctypes.byref(_blocks(table))
        self.library.attend_paged(ctypes.byref(queries.struct), by, pointer(key), pointer(value), _DTYPES[key.dtype])

    def native(self, queries: Queries, first: Sequence[Sequence[int]], key: Tensor, value: Tensor) -> None:
        """Rows as they are: those of a sequence's KV head begin at row first [B, H_kv] of key and value."""
        starts = torch.tensor(first, dtype=torch.int64)
        pointers = [pointer(part) for part in (starts, key, value)]
        self.library.attend_native(ctypes.byref(queries.struct), *pointers, _DTYPES[key.dtype])

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
        counts = torch.tensor(num_encoded, dtype=torch.int32)
        self.library.attend_int4(
            ctypes.byref(queries.struct),
            *map(pointer, (counts, *encoded, key, value)),
            ctypes.c_int64(encoded[0].shape[2]),
            ctypes.c_int64(key.shape[2]),
            group_size,
            key.shape[3] // encoded[-1].shape[3],
            _DTYPES[key.dtype],
        )


def _blocks(table: Tensor) -> _Table:
    """The caller keeps the table."""
    assert table.dtype == torch.int32 and (table.shape[2] < 2 or table.stride(2) == 1)
    return _Table(table.data_ptr(), table.stride()[:2])


@functools.cache
def load() -> KVAttention | Missing:
    """The kernel, tried out against a plain product, or why there is none."""
    library = compiled.load("kv_attention")
    if isinstance(library, Missing):
        return library
    found = KVAttention(library)
    code = (torch.arange(2 * 3 * 40 * 16) * 37 % 251 - 125).to(torch.int8).view(2, 3, 40, 16)
    scale = (torch.arange(2 * 3 * 40) % 7 + 1).view(2, 3, 40, 1).to(torch.bfloat16) / 512
    query = (torch.arange(2 * 3 * 2 * 16.0) % 11 - 5).view(2, 3, 2, 16)
    queries = Queries(query, [39, 39], num_tokens=1, num_rows=40, scale=0.25, want_weights=False)
    found.rows("int8", queries, (code, scale), (code, scale))
    row = code.double() * scale.double()
    expected = (query.double() @ row.mT * 0.25).softmax(dim=-1) @ row
    if not torch.allclose(queries.out.double(), expected, rtol=1e-5, atol=1e-5):
        return Missing("the compiled kernel attends wrongly on this machine")
    return found


def usable(*, head_dim: int, device: torch.device) -> KVAttention | Missing:
    """The kernel for heads of this size on this device, or why it cannot be used."""
    if device.type != "cpu":
        return Missing(f"written for the CPU, not {device.type}")
    if head_dim % 8:
        return Missing(f"written for heads of a multiple of 8, not {head_dim}")
    return load()
