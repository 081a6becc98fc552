"""RankRunner: runs StepPlans on one of several ranks. Rank 0 broadcasts each plan and is given the logits.

    rank 0     tell the plan,  replay it,  logits
    others     hear the plan,  replay it

    replay:    for each micro-batch: receive x from the stage before, run own layers on own cache, send x on

Every rank has the whole plan and a cache of its own, which the plan alone drives; so nothing else has to be told. What
comes is asked for before it is needed and what goes is waited for at the end, so that stages overlap.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from codesign.engine.batch import Batch
from codesign.engine.parallel.failure import Disconnected
from codesign.engine.parallel.links import Pending
from codesign.engine.parallel.micro_batches import micro_batches
from codesign.engine.parallel.plan_ints import from_ints, to_ints
from codesign.engine.parallel.stage import Stage
from codesign.engine.parallel.team import Team
from codesign.engine.runner import FIGURES, CachedAttention, Figures, SingleRunner
from codesign.engine.step import StepPlan

_STEP, _FIGURES, _LOG, _END = range(4)


@dataclasses.dataclass(frozen=True)
class Event:
    """What a rank did for one micro-batch: "wait" for the stage before, or "run" its layers; nanoseconds of the
    machine's monotonic clock, so events of ranks on one machine compare."""

    what: str
    micro_batch: int
    begin_ns: int
    end_ns: int


class RankRunner(SingleRunner):
    """Attributes:
    events: of the last step.
    """

    def __init__(self, stage: Stage, attention: CachedAttention, team: Team, *, num_micro_batches: int) -> None:
        super().__init__(stage, attention, team.device)
        self._stage, self._team, self._links = stage, team, team.links
        self._num_micro_batches = num_micro_batches
        self._dtype = stage.layer_list[0].input_norm.weight.dtype
        self._is_in_step = False
        self.events: list[Event] = []

    # Rank 0.

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> Tensor:
        """Logits [len(plan.logits_rows), vocab_size] fp32.

        Raises:
            RankDied: a signal ended another rank.
            MemoryError, Unsupported, NumericalError, RuntimeError: what another rank failed with.
        """
        self._is_in_step = True  # and if an exception ends it, the others are somewhere in the middle of it
        try:
            self._links.tell([_STEP, *to_ints(plan)])
            logits = self._replay(plan)
        except Disconnected:
            self._team.others.raise_failure()
            raise
        self._is_in_step = False
        assert logits is not None, "rank 0 is one of the last stage"
        return logits[:, : self._stage.shape.vocab_size].float()

    def of_ranks(self, figures: Figures, own: Mapping[str, int]) -> list[dict[str, int]]:
        self._links.tell([_FIGURES, FIGURES.index(figures)])
        return self._links.collect(own)

    def logs(self) -> list[dict[str, Any]]:
        """Of each rank: its place, the events of the last step, and what it sent since the last call."""
        self._links.tell([_LOG])
        return self._links.collect(self._log())

    def close(self) -> None:
        if not self._is_in_step:
            try:
                self._links.tell([_END])
                self._team.others.end()
            except Disconnected:  # it ends all the same
                pass
        self._team.close()

    # Every other rank.

    @torch.inference_mode()
    def serve(self, own: Callable[[Figures], Mapping[str, int]]) -> None:
        """Does what rank 0 says, until it says that this is the end.

        Args:
            own: gives this rank's figures.
        """
        while True:
            message = self._links.hear()
            match message[0]:
                case 0:  # _STEP
                    self._replay(from_ints(message[1:]))
                case 1:  # _FIGURES
                    self._links.collect(own(FIGURES[message[1]]))
                case 2:  # _LOG
                    self._links.collect(self._log())
                case _:
                    return

    # Everybody.

    def _replay(self, plan: StepPlan) -> Tensor | None:
        """[rows, padded vocabulary] on rank 0, None on others."""
        begin = self._event()
        plans, part = micro_batches(plan, self._num_micro_batches), self._stage.part
        hidden = part.whole.hidden_size
        coming = (
            []
            if part.is_first
            else [
                self._links.receive((len(own.token_ids), hidden), self._dtype, index) for index, own in enumerate(plans)
            ]
        )
        going: list[Pending] = []
        logits: list[Tensor] = []
        self.events = []
        for index, own in enumerate(plans):
            x = None if part.is_first else self._logged("wait", index, coming[index].wait)
            out = self._logged("run", index, functools.partial(self._run, own, x))
            if not part.is_last:
                going.append(self._links.send(out, index))
            elif (columns := self._links.gather_columns(out)) is not None:
                logits.append(columns)
        for sent in going:
            sent.wait()
        end = self._event()
        if begin is not None and end is not None:
            self._steps.append((begin, end))
        return torch.cat(logits) if logits else None

    def _run(self, plan: StepPlan, x: Tensor | None) -> Tensor:
        """What goes to the next stage, or this rank's columns of the logits."""
        batch = Batch.of(plan, self._device)
        self._attention.begin(batch)
        x = self._stage.run(batch, self._attention, self._stage.embed(batch.token_ids) if x is None else x)
        self._attention.end(batch)
        return self._stage.logits(x, plan.logits_rows) if self._stage.part.is_last else x

    def _logged(self, what: str, micro_batch: int, work: Callable[[], Tensor]) -> Tensor:
        begin_ns = time.perf_counter_ns()
        found = work()
        self.events.append(Event(what, micro_batch, begin_ns, time.perf_counter_ns()))
        return found

    def _log(self) -> dict[str, Any]:
        links = self._links
        counts, links.counts = links.counts, {}
        return {
            "rank": links.rank,
            "stage": links.stage,
            "tensor_rank": links.tensor_rank,
            "events": [dataclasses.astuple(event) for event in self.events],
            "counts": counts,
        }
