"""Whole engines whose steps are replayed give the tokens of those whose steps are run, whatever comes and goes.

The device that records is a stand-in: a recording is the forward pass with the batch and the attention's step that it
was made with, and replaying it runs that again, whatever step has begun meanwhile. So what a step has in Python is as
old as the recording, and only what is copied into its tensors is new, as on a device. That it reads and writes the same
memory each time, makes no tensor of Python's numbers and asks for no tensor's content is checked beside.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import GridExecutor

from codesign.engine.attention import calls
from codesign.engine.build import build_engine
from codesign.engine.engine import Engine
from codesign.engine.graphs import Graphs, Work
from codesign.engine.models.tiny import tiny_spec
from codesign.engine.runner import SingleRunner
from codesign.spec.engine_config import EngineConfig
from tests.engine.driving import finish, generate, request

aten = torch.ops.aten
# What cannot be recorded: tensors made of Python's numbers, and Python asking what is in a tensor.
FORBIDDEN = {aten.lift_fresh, aten.item, aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.is_nonzero}


class Recordable(TorchDispatchMode):
    """Attributes:
    outside: addresses that operations were given and had not allocated themselves.
    """

    now: ClassVar["Recordable | None"] = None

    def __init__(self) -> None:
        super().__init__()
        self.outside: set[int] = set()
        self._own: set[int] = set()
        self._kept: list[Tensor] = []  # so that no address comes twice

    def given(self, values: Any) -> None:
        self.outside |= addresses(values) - self._own

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket not in FORBIDDEN, f"{func} between begin and end of a step"
        self.given((args, kwargs))
        found = func(*args, **(kwargs or {}))
        self._own |= addresses(found) - self.outside
        self._kept += [own for own in tree_leaves(found) if isinstance(own, Tensor)]
        return found


def addresses(values: Any) -> set[int]:
    """Of the memory of all tensors."""
    tensors = (own for own in tree_leaves(values) if isinstance(own, Tensor) and own.layout == torch.strided)
    return {own.untyped_storage().data_ptr() for own in tensors if own.numel()}


def record(work: Work) -> Work:
    outside: list[set[int]] = []

    def replay() -> None:
        with Recordable() as mode:
            Recordable.now = mode
            work()
        Recordable.now = None
        outside.append(mode.outside)
        assert len(mode.outside) > 20 and outside[-1] == outside[0], "other memory than in the recording"

    return replay


def engine_of(*, is_replaying: bool, **config: Any) -> Engine:
    """What is compared with runs the reference attention, which is fast here; that it agrees is tested elsewhere."""
    attention = "triton" if is_replaying else "eager"
    plain = {"dtype": "fp32", "max_batch_size": 3, "max_model_len": 64, "attention": attention, **config}
    shape = {"num_attention_heads": 2, "num_key_value_heads": 1, "hidden_size": 32, "intermediate_size": 64}
    engine = build_engine(tiny_spec(**shape), EngineConfig.from_dict(plain))
    if not is_replaying:
        return engine
    parts = engine.parts
    graphs = Graphs(record, parts.workspace)
    return Engine(dataclasses.replace(parts, runner=SingleRunner(parts.model, parts.attention, parts.device, graphs)))


def traffic(engine: Engine) -> dict[str, list[int]]:
    """Five requests for three slots, of which the middle one is free first, and one that comes while others run."""
    for name, num_prompt, num_tokens in (("a", 5, 32), ("b", 20, 5), ("c", 14, 14), ("d", 3, 9), ("e", 26, 12)):
        engine.submit(request(name, num_prompt, num_tokens, ignore_eos=True))
    early = [output for _ in range(12) for output in engine.step()]
    engine.submit(request("late", 9, 10, ignore_eos=True))
    found = finish(engine)
    for output in reversed(early):
        found.setdefault(output.request_id, []).insert(0, output.token_id)
    return found


@pytest.fixture(autouse=True)
def _small_buckets(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(calls, "LEAST_FIXED_ROWS", 16)
    run = GridExecutor.__call__

    def kernel(self: GridExecutor, *args: Any, **kwargs: Any) -> None:
        if Recordable.now is not None:
            Recordable.now.given((args, kwargs))
        with _disable_current_modes():  # what the interpreter does is the device's work
            run(self, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", kernel)
    yield


BOUNDED = {"kv_budget": 24, "window_tokens": 8, "num_sink_tokens": 2}
RECENT = {"kv_budget": 20, "window_tokens": 4, "buffer_tokens": 1, "importance_weight": 1.0, "kernel_size": 1}
CASES: dict[str, dict[str, Any]] = {
    "dense": {},
    "paged": {"kv": {"layout": "paged"}},
    "paged fp8, chunks": {"kv": {"layout": "paged", "codec": "fp8"}, "max_step_tokens": 12},
    "snapkv": {"kv": {"policy": {"name": "snapkv", **BOUNDED}}},
    "pyramidkv int8": {"kv": {"policy": {"name": "pyramidkv", **BOUNDED}, "codec": "int8"}},
    "ada_kv": {"kv": {"policy": {"name": "ada_kv", **BOUNDED}}},
    "h2o": {"kv": {"policy": {"name": "h2o", "kv_budget": 24, "score_norm": "decayed", "decay": 0.9}}},
    "r_kv": {"kv": {"policy": {"name": "r_kv", **RECENT}}},
    "fused": {"kernels": {"fused": True}},
    "drafts": {"speculate": {"name": "ngram", "num_draft_tokens": 3, "adaptive": False}},
    "static": {"scheduler": "static"},
}


@pytest.mark.parametrize("case", CASES)
def test_tokens_are_the_same(case: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    plain, replayed = (engine_of(is_replaying=value, **CASES[case]) for value in (False, True))

    assert traffic(replayed) == traffic(plain)
    found = replayed.stats()
    assert found["graphs_captured"] >= 2 and found["steps_replayed"] > 10


@pytest.mark.parametrize("weights", ["int8", {"name": "int4", "group_size": 32}])
def test_products_with_packed_weights_can_be_recorded(
    weights: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    asked = request("a", 3, 6, ignore_eos=True)
    plain, replayed = (engine_of(is_replaying=value, weights=weights) for value in (False, True))

    assert generate(replayed, asked) == generate(plain, asked)
    assert replayed.stats()["steps_replayed"] == 4
