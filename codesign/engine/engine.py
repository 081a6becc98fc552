"""Engine: requests in, tokens out, one step at a time. It never reads a clock: whoever measures it does."""

import dataclasses
from collections.abc import Mapping
from collections.abc import Sequence as Items
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from codesign.engine.attention.layer import Attention
from codesign.engine.attention.switched import SwitchedAttention
from codesign.engine.kernels.pieces import describe
from codesign.engine.models.decoder import Decoder
from codesign.engine.quantize.linear import Linear, Workspace
from codesign.engine.runner import SingleRunner
from codesign.engine.sampling import logprobs, sample
from codesign.engine.sequence import Sequence, StepOutput
from codesign.engine.step import NO_DRAFTS, StepPlan
from codesign.errors import InputError
from codesign.spec.engine_config import EngineConfig
from codesign.spec.request import Request


class Scheduler(Protocol):
    """What a scheduler member's `start` gives."""

    @property
    def has_work(self) -> bool: ...

    def add(self, sequence: Sequence) -> None: ...

    def abort(self, request_id: str) -> bool: ...

    def decoding(self) -> list[Sequence]: ...

    def plan(self, drafts: Mapping[str, Items[int]] = NO_DRAFTS) -> tuple[StepPlan, list[Sequence]]: ...

    def commit(self, sampled: Items[Sequence], tokens: Items[Items[int]]) -> list[StepOutput]: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineParts:
    """What `build_engine` puts together.

    Attributes:
        resolved: what the build derived from the configuration.
        phases: phase -> seconds.
    """

    config: EngineConfig
    model: Decoder
    attention: Attention | SwitchedAttention
    scheduler: Scheduler
    runner: SingleRunner
    workspace: Workspace
    device: torch.device
    num_slots: int
    eos_token_ids: frozenset[int]
    resolved: Mapping[str, Any]
    phases: Mapping[str, float]


class Engine:
    """One built configuration.

    engine.submit(request);  while engine.has_work: outputs = engine.step()
    """

    def __init__(self, parts: EngineParts) -> None:
        self._parts: EngineParts | None = parts
        self._request_ids: set[str] = set()

    @property
    def parts(self) -> EngineParts:
        if self._parts is None:
            raise RuntimeError("the engine is closed")
        return self._parts

    @property
    def has_work(self) -> bool:
        return self.parts.scheduler.has_work

    @property
    def num_slots(self) -> int:
        """Most sequences in one step: `max_batch_size`, or what `kv_memory_bytes` has room for."""
        return self.parts.num_slots

    @property
    def vocab_size(self) -> int:
        return self.parts.model.shape.vocab_size

    def submit(self, request: Request) -> None:
        """Queues a request.

        Raises:
            InputError: too long for `max_model_len`, tokens outside the vocabulary, or an id that is in use.
        """
        limit, num_prompt = self.parts.config.max_model_len, len(request.prompt_token_ids)
        if num_prompt + request.sampling.max_tokens > limit:
            raise InputError(
                f"request {request.request_id!r}: {num_prompt} prompt tokens and {request.sampling.max_tokens} output "
                f"tokens exceed max_model_len {limit}"
            )
        check_tokens(request.prompt_token_ids, self.vocab_size, f"request {request.request_id!r}")
        if request.request_id in self._request_ids:
            raise InputError(f"request {request.request_id!r} is already in the engine")
        self._request_ids.add(request.request_id)
        self.parts.scheduler.add(Sequence(request, eos_token_ids=self.parts.eos_token_ids))

    def abort(self, request_id: str) -> bool:
        """Drops a request; no further output comes for it. Whether it was still in the engine."""
        self._request_ids.discard(request_id)
        return self.parts.scheduler.abort(request_id)

    def step(self) -> list[StepOutput]:
        """Runs one step: every token that it gave. Empty when there is no work or only prompt chunks were run.

        Raises:
            NumericalError: NaN or infinite logits; the engine is of no use afterwards.
        """
        parts = self.parts
        plan, sampled = parts.scheduler.plan()
        if not plan.slots:
            return []
        logits = parts.runner.run(plan)
        token_ids = sample(logits, [s.sampling for s in sampled], [s.stream for s in sampled]) if sampled else []
        outputs = parts.scheduler.commit(sampled, [[token_id] for token_id in token_ids])
        outputs = self._with_logprobs(outputs, plan, sampled, logits)
        self._request_ids.difference_update(output.request_id for output in outputs if output.finish_reason)
        return outputs

    def _with_logprobs(
        self, outputs: list[StepOutput], plan: StepPlan, sampled: Items[Sequence], logits: Tensor
    ) -> list[StepOutput]:
        """Adds what requests want to know; the outputs of one are its first logits rows, in order."""
        wanted: dict[str, tuple[int, int]] = {}  # request id -> next row, how many of the likeliest
        row = 0
        for own, count in zip(sampled, plan.num_logits, strict=True):
            if own.sampling.logprobs is not None:
                wanted[own.request_id] = row, own.sampling.logprobs
            row += count
        if not wanted:
            return outputs
        found = []
        for output in outputs:
            if output.request_id in wanted:
                row, num_likeliest = wanted[output.request_id]
                wanted[output.request_id] = row + 1, num_likeliest
                output = dataclasses.replace(output, logprobs=logprobs(logits[row], output.token_id, num_likeliest))
            found.append(output)
        return found

    def facts(self) -> dict[str, Any]:
        """What was built, as plain data: resolved settings, bytes by part, kernels, phases in seconds."""
        parts = self.parts
        ranks = parts.runner.rank_bytes(self.own_bytes())
        resolved = dict(parts.resolved)
        if len(ranks) > 1:
            resolved["bytes_per_rank"] = ranks
        layer_kernels = {linear.kernel: None for layer in parts.model.layers for linear in _linears(layer)}
        return {
            "resolved": resolved,
            "bytes": {name: sum(own[name] for own in ranks) for name in ranks[0]},
            "kernels": {
                "weights": ", ".join(layer_kernels),
                "head": parts.model.head.kernel,
                "attention": parts.attention.kernel,
                "fused": describe(parts.model.pieces, has_qk_norm=parts.model.shape.has_qk_norm),
            },
            "phases": dict(parts.phases),
        }

    def own_bytes(self) -> dict[str, int]:
        """What this process holds, by part."""
        parts = self.parts
        return {
            "weights": parts.model.num_bytes,
            "kv": parts.attention.kv_bytes,
            "kv_staging": parts.attention.staging_bytes,
            "workspace": parts.workspace.num_bytes,
        }

    def device_busy_us(self) -> int:
        """Microseconds that the device spent inside steps since the last call, by CUDA events; 0 on a CPU."""
        return self.parts.runner.device_busy_us()

    def close(self) -> None:
        """Lets go of weights and cache, and ends other ranks; a second call does nothing."""
        parts, self._parts = self._parts, None
        if parts is not None:
            parts.runner.close()


def check_tokens(token_ids: tuple[int, ...] | list[int], vocab_size: int, what: str) -> None:
    """Raises InputError naming the first token outside the vocabulary."""
    if min(token_ids) < 0 or max(token_ids) >= vocab_size:
        bad = next(token for token in token_ids if not 0 <= token < vocab_size)
        raise InputError(f"{what}: token {bad} is outside the vocabulary of {vocab_size}")


def _linears(layer: nn.Module) -> list[Linear]:
    return [part for part in layer.children() if isinstance(part, Linear)]
