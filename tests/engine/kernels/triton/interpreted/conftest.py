"""For the child process of test_interpreted.py only: nothing here may import triton when other tests are collected."""

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _interpreter_with_bf16() -> Iterator[None]:
    """Triton 3.7 interprets bf16 as the integers of its bits in casts from integers and in `tl.dot`, and truncates.

    Replaced here: casts to and from bf16 go through torch, products of bf16 are products of the same values in fp32.
    """
    assert os.environ["TRITON_INTERPRET"] == "1", "run by test_interpreted.py"
    import triton.language as tl
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    cast, dot = builder.cast_impl, builder.create_dot

    def wide(value: Any) -> Any:
        if value.dtype.scalar != tl.bfloat16:
            return value
        return handle(torch.from_numpy(value.data.copy()).view(torch.bfloat16).float().numpy(), tl.float32)

    def cast_impl(self: Any, value: Any, to: Any) -> Any:
        if to.scalar != tl.bfloat16:
            return cast(self, wide(value), to)
        exact = cast(self, wide(value), tl.float32)
        return handle(torch.from_numpy(exact.data.copy()).bfloat16().view(torch.uint16).numpy(), tl.bfloat16)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, wide(a), wide(b), *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "cast_impl", cast_impl)
        patch.setattr(builder, "create_dot", create_dot)
        yield
