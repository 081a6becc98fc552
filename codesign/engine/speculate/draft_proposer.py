"""DraftProposer: a small model drafts for all sequences at once, on a cache of its own with the target's slots."""

from collections.abc import Mapping
from collections.abc import Sequence as Items

import torch
from torch import Tensor

from codesign.engine.attention.switched import AnyAttention, make_attention
from codesign.engine.graphs import CudaRecorder, Graphs
from codesign.engine.kv.codecs.native import Native
from codesign.engine.kv.policies.full import Full
from codesign.engine.models.decoder import Decoder
from codesign.engine.models.rope_scaling import rope_of
from codesign.engine.models.shape import ModelShape
from codesign.engine.runner import SingleRunner
from codesign.engine.sampling import draw, laws, likeliest
from codesign.engine.sequence import Sequence
from codesign.engine.speculate.draft_plans import CATCH_UP_TOKENS, DraftPlans
from codesign.engine.speculate.exact import PROPOSAL, Draft
from codesign.engine.speculate.proposer import Target
from codesign.registry import ATTENTION


class DraftProposer:
    """One plan ingests what the draft has not seen and proposes the first token of each sequence; one more plan gives
    each further token. Tokens are drawn as the request asks, from a stream of its own, and their laws are kept.
    """

    def __init__(self, decoder: Decoder, shape: ModelShape, target: Target) -> None:
        self._decoder, self._shape, self._target = decoder, shape, target
        self.slot_bytes = self._attention(1).kv_bytes
        self._kv_bytes = 0

    def allocate(self, num_slots: int) -> None:
        attention = self._attention(num_slots)
        self._kv_bytes = attention.kv_bytes
        device, graphs = self._target.device, None
        if self._target.config.kernels.graphs:
            graphs = Graphs(CudaRecorder(device), self._target.workspace)
        self._runner = SingleRunner(self._decoder, attention, device, graphs)
        self._plans = DraftPlans(num_slots, self._target.config.max_step_tokens)

    def propose(self, wanted: Items[tuple[Sequence, int]]) -> dict[str, Draft]:
        counts = {own.slot: count for own, count in wanted}
        plan, proposing = self._plans.first([own for own, _ in wanted])
        logits = self._runner.run(plan)
        tokens: dict[str, list[int]] = {own.request_id: [] for own in proposing}
        drawn_from: dict[str, list[Tensor]] = {own.request_id: [] for own in proposing}
        while proposing:
            token_ids = self._draw(logits, proposing, drawn_from)
            going_on = []
            for own, token_id in zip(proposing, token_ids, strict=True):
                tokens[own.request_id].append(token_id)
                # what comes after a token that ends the output is of no use
                if len(tokens[own.request_id]) < counts[own.slot] and token_id not in own.stop_ids:
                    going_on.append((own, token_id))
            going_on.sort(key=lambda item: item[0].slot)
            proposing = [own for own, _ in going_on]
            if proposing:
                logits = self._runner.run(self._plans.next(proposing, [token_id for _, token_id in going_on]))
        return {
            request_id: Draft(tuple(own), torch.stack(drawn_from[request_id]) if drawn_from[request_id] else None)
            for request_id, own in tokens.items()
        }

    @staticmethod
    def _draw(logits: Tensor, sequences: Items[Sequence], drawn_from: dict[str, list[Tensor]]) -> list[int]:
        """One token per row of logits [R, V]; adds the laws [V] of those that were drawn."""
        token_ids = likeliest(logits)
        rows = [row for row, own in enumerate(sequences) if own.sampling.temperature > 0]
        if rows:
            own = [sequences[row] for row in rows]
            law = laws(logits[rows], [s.sampling for s in own])
            drawn = draw(law, [s.stream_for(PROPOSAL) for s in own])
            for index, (row, token_id) in enumerate(zip(rows, drawn, strict=True)):
                token_ids[row] = token_id
                drawn_from[own[index].request_id].append(law[index])
        return token_ids

    def release(self, request_id: str) -> None:
        self._plans.release(request_id)

    def num_bytes(self) -> Mapping[str, int]:
        return {"draft_weights": self._decoder.num_bytes, "draft_kv": self._kv_bytes}

    def device_busy_us(self) -> int:
        return self._runner.device_busy_us()

    def _attention(self, num_slots: int) -> AnyAttention:
        shape, target = self._shape, self._target
        backend = target.config.attention
        return make_attention(
            num_layers=shape.num_layers,
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            scale=shape.head_dim**-0.5,
            rope=rope_of(shape.rope, shape.head_dim),
            policy=Full(),
            codec=Native(),
            backend=ATTENTION.create(backend.name, key="attention", **backend.knob_dict),
            num_slots=num_slots,
            max_model_len=target.config.max_model_len,
            max_query_len=CATCH_UP_TOKENS,
            dtype=target.dtype,
            device=target.device,
            pieces=target.pieces,
        )
