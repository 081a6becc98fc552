import errno
import signal
from typing import get_args

import pytest
import torch

from codesign.errors import InputError, Unsupported
from codesign.measure.taxonomy import (
    REPORTABLE,
    Exit,
    outcome_of_exception,
    outcome_of_exit,
    printable,
    reported_outcome,
)
from codesign.results.record import OutcomeKind


class NumericalError(Exception):
    pass


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (MemoryError(), "oom"),
        (torch.OutOfMemoryError("CUDA out of memory"), "oom"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes"),
            "oom",
        ),
        (RuntimeError("std::bad_alloc"), "oom"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "oom"),
        (RuntimeError("CUDA error: out of memory"), "oom"),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), "cuda_fatal"),
        (torch.AcceleratorError("CUDA error: device-side assert triggered"), "cuda_fatal"),
        (RuntimeError("CUBLAS_STATUS_EXECUTION_FAILED when calling cublasGemmEx"), "cuda_fatal"),
        (NumericalError("NaN logits"), "numerical"),
        (FloatingPointError("nan"), "numerical"),
        (Unsupported("int3 on this device"), "unsupported"),
        (InputError("unknown", key="kv.policy"), "unsupported"),
        (OSError(errno.ENOSPC, "No space left on device"), "crashed"),
        (RuntimeError("shape mismatch"), "crashed"),
        (ValueError("out of memory of the reader"), "crashed"),
        (SystemExit(0), "crashed"),
    ],
    ids=lambda value: repr(value)[:50],
)
def test_an_exception_is_typed_by_its_cause(error: BaseException, kind: str) -> None:
    assert outcome_of_exception(error).kind == kind


def test_a_crash_carries_the_end_of_its_traceback() -> None:
    try:
        raise KeyError("no_such_layer")
    except KeyError as error:
        outcome = outcome_of_exception(error)

    assert "test_taxonomy.py" in outcome.detail
    assert outcome.detail.rstrip().endswith("KeyError: 'no_such_layer'")


@pytest.mark.parametrize(
    ("number", "oom_kills", "kind"),
    [
        (signal.SIGKILL, 0, "killed_by_os"),
        (signal.SIGKILL, 1, "oom"),
        (signal.SIGTERM, 1, "killed_by_os"),
        (signal.SIGXCPU, 0, "killed_by_os"),
        (signal.SIGSEGV, 1, "crashed"),
        (signal.SIGABRT, 0, "crashed"),
        (signal.SIGBUS, 0, "crashed"),
        (60, 0, "killed_by_os"),
    ],
)
def test_a_signal_is_typed_by_who_sends_such_signals(number: int, oom_kills: int, kind: str) -> None:
    assert outcome_of_exit(Exit(status=None, signal=number), kernel_oom_kills=oom_kills).kind == kind


@pytest.mark.parametrize("status", [0, 1, 255])
def test_an_exit_without_a_report_is_a_crash_whatever_its_status(status: int) -> None:
    outcome = outcome_of_exit(Exit(status=status, signal=None), kernel_oom_kills=1)

    assert outcome.kind == "crashed"
    assert str(status) in outcome.detail


def test_a_child_cannot_report_what_only_its_parent_can_know() -> None:
    kinds = set(get_args(OutcomeKind))
    accepted = {kind for kind in kinds if reported_outcome({"kind": kind, "detail": ""})}

    assert accepted == REPORTABLE
    assert kinds - REPORTABLE == {"ok", "hang", "killed_by_os", "protocol", "harness"}


@pytest.mark.parametrize(
    "message", [{}, {"kind": "oom"}, {"kind": ["oom"], "detail": ""}, {"kind": "oom", "detail": 1}]
)
def test_a_malformed_report_is_none(message: dict[str, object]) -> None:
    assert reported_outcome(message) is None


def test_a_long_report_is_cut_to_its_end() -> None:
    outcome = reported_outcome({"kind": "crashed", "detail": "x" * 10_000 + "the cause"})

    assert outcome is not None
    assert len(outcome.detail) == 4000
    assert outcome.detail.endswith("the cause")


def test_nothing_in_a_text_can_steer_a_terminal() -> None:
    assert printable("a\tb\n\x1b[31mred\x07\x9b\u202e") == "a\tb\n\ufffd[31mred\ufffd\ufffd\ufffd"
