"""Engine: requests in, tokens out, one step at a time. It never reads a clock: whoever measures it does."""

import dataclasses
from collections.abc import Mapping
from collections.abc import Sequence as Items
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from codesign.engine.attention.paged import PagedAttention
from codesign.engine.attention.switched import AnyAttention
from codesign.engine.kernels.pieces import describe
from codesign.engine.kv.paged import BlockUse
from codesign.engine.memory import device_memory
from codesign.engine.models.decoder import Decoder
from codesign.engine.quantize.linear import Linear, Workspace
from codesign.engine.runner import Figures, SingleRunner
from codesign.engine.sampling import logprobs
from codesign.engine.sequence import Sequence, StepOutput
from codesign.engine.speculate.exact import verify
from codesign.engine.speculate.speculation import Speculation
from codesign.engine.step import BLOCK_TOKENS, NO_DRAFTS, StepPlan
from codesign.errors import InputError, Unsupported
from codesign.spec.engine_config import EngineConfig
from codesign.spec.request import Request, SamplingParams


class Scheduler(Protocol):
    """What a scheduler member's `start` gives."""

    @property
    def has_work(self) -> bool: ...

    def add(self, sequence: Sequence) -> None: ...

    def abort(self, request_id: str) -> bool: ...

    def decoding(self) -> list[Sequence]: ...

    def plan(self, drafts: Mapping[str, Items[int]] = NO_DRAFTS) -> tuple[StepPlan, list[Sequence]]: ...

    def commit(self, sampled: Items[Sequence], tokens: Items[Items[int]]) -> list[StepOutput]: ...

    def stats(self) -> dict[str, int]: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineParts:
    """What `build_engine` puts together.

    Attributes:
        speculation: None where one output token comes at a time.
        resolved: what the build derived from the configuration.
        phases: phase -> seconds.
    """

    config: EngineConfig
    model: Decoder
    attention: AnyAttention
    scheduler: Scheduler
    runner: SingleRunner
    workspace: Workspace
    device: torch.device
    num_slots: int
    eos_token_ids: frozenset[int]
    speculation: Speculation | None
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
        self._release_drafts([request_id])
        return self.parts.scheduler.abort(request_id)

    def warm_prefix(self, token_ids: Items[int]) -> int:
        """Computes the beginning that many prompts will have, with no output, and leaves it to the prefix cache, which
        keeps it until it needs the room for something newer.

        Returns how many of the tokens are kept: whole blocks.

        Raises:
            InputError: no tokens, too many for `max_model_len`, or tokens outside the vocabulary.
            Unsupported: the configuration has no prefix cache.
            ValueError: the engine has requests, whose steps would mix with these.
        """
        parts, limit = self.parts, self.parts.config.max_model_len
        if not parts.config.prefix_cache:
            raise Unsupported("warming a prefix needs `prefix_cache: true`: this configuration would forget it at once")
        if self.has_work:
            raise ValueError("the engine still has requests")
        if not 1 <= len(token_ids) < limit:
            raise InputError(f"a prefix has 1 to {limit - 1} tokens (max_model_len {limit}), got {len(token_ids)}")
        prefix = tuple(token_ids)
        check_tokens(prefix, self.vocab_size, "prefix")
        only_token = SamplingParams(max_tokens=1)
        parts.scheduler.add(Sequence(Request(request_id="", prompt_token_ids=prefix, sampling=only_token)))
        while parts.scheduler.has_work:
            plan, ending = parts.scheduler.plan()
            parts.runner.run(plan)
            parts.scheduler.commit(ending, [[0] for _ in ending])
        return len(prefix) // BLOCK_TOKENS * BLOCK_TOKENS

    def step(self) -> list[StepOutput]:
        """Runs one step: every token that it gave. Empty when there is no work or only prompt chunks were run.

        Raises:
            NumericalError: NaN or infinite logits; the engine is of no use afterwards.
        """
        parts = self.parts
        speculation = parts.speculation
        drafts = speculation.propose(parts.scheduler.decoding()) if speculation is not None else {}
        plan, sampled = parts.scheduler.plan({request_id: draft.token_ids for request_id, draft in drafts.items()})
        if not plan.slots:
            return []
        logits = parts.runner.run(plan)
        verdicts = verify(logits, plan.num_logits, sampled, drafts)
        if speculation is not None and verdicts:
            speculation.observe(verdicts, plan.num_logits)
        outputs = parts.scheduler.commit(sampled, [verdict.token_ids for verdict in verdicts])
        outputs = self._with_logprobs(outputs, plan, sampled, logits)
        finished = [output.request_id for output in outputs if output.finish_reason]
        self._request_ids.difference_update(finished)
        self._release_drafts(finished)
        return outputs

    def _release_drafts(self, request_ids: Items[str]) -> None:
        if self.parts.speculation is not None:
            for request_id in request_ids:
                self.parts.speculation.release(request_id)

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
        ranks = parts.runner.of_ranks("bytes", self.own("bytes"))
        resolved = dict(parts.resolved)
        if len(ranks) > 1:
            resolved["bytes_per_rank"] = ranks
        graphs = parts.runner.graphs
        layer_kernels = {linear.kernel: None for layer in parts.model.layers for linear in _linears(layer)}
        return {
            "resolved": resolved,
            "bytes": {name: sum(own[name] for own in ranks) for name in ranks[0]},
            "kernels": {
                "weights": ", ".join(layer_kernels),
                "head": parts.model.head.kernel,
                "attention": parts.attention.kernel,
                "fused": describe(parts.model.pieces, has_qk_norm=parts.model.shape.has_qk_norm),
                "graphs": "none" if graphs is None else graphs.kernel,
            },
            "phases": dict(parts.phases),
        }

    def device_memory(self) -> dict[str, int]:
        """The CUDA allocator's figures in bytes, all ranks' added, each at its own peak; none on a CPU."""
        ranks = self.parts.runner.of_ranks("device_memory", self.own("device_memory"))
        return {name: sum(own[name] for own in ranks) for name in ranks[0]}

    def own(self, figures: Figures) -> dict[str, int]:
        """Of this process alone: bytes by part, or the CUDA allocator's."""
        parts = self.parts
        if figures == "device_memory":
            return device_memory(parts.device)
        return {
            "weights": parts.model.num_bytes,
            "kv": parts.attention.kv_bytes,
            "kv_staging": parts.attention.staging_bytes,
            "workspace": parts.workspace.num_bytes,
            **({} if parts.speculation is None else parts.speculation.proposer.num_bytes()),
        }

    def stats(self) -> dict[str, int]:
        """Counters since the start, also of graphs where steps are replayed; of a paged cache also its blocks as they
        are now."""
        graphs = self.parts.runner.graphs
        return self.parts.scheduler.stats() | ({} if graphs is None else graphs.stats())

    def kv_use(self) -> BlockUse | None:
        """What the blocks of a paged cache hold at this moment, on all ranks; None where it is not paged."""
        attention = self.parts.attention
        if not isinstance(attention, PagedAttention):
            return None
        use, ranks = attention.kv_use, self.parts.resolved["block_bytes"] / attention.block_bytes
        return dataclasses.replace(use, shared_bytes=round(use.shared_bytes * ranks))

    def device_busy_us(self) -> int:
        """Microseconds that the device spent inside steps since the last call, by CUDA events; 0 on a CPU."""
        speculation = self.parts.speculation
        drafting = 0 if speculation is None else speculation.proposer.device_busy_us()
        return self.parts.runner.device_busy_us() + drafting

    def speculation_stats(self) -> dict[str, Any]:
        """What became of drafts since the build, and the table of batch size -> K, as plain data; empty without any."""
        return {} if self.parts.speculation is None else self.parts.speculation.stats()

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
