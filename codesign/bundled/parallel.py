"""One model trained by a few single-threaded processes that share its parameters.

    claim micro-batches, add gradients to the own row | wait | step the own parameters with the sum of rows | wait | ...

Threads inside each operation wait for each other thousands of times a step, and on a machine shared with other work
the slowest core then sets the pace; processes wait twice a step, and micro-batches are claimed one by one, so that a
slow core only claims fewer.
"""

import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from codesign.bundled.model import Llama
from codesign.bundled.optimizer import FlatState, shared_zeros

PAUSE_S = 60
"""A step that took longer was stopped by somebody; the clock counts no more than this of it."""
WEIGHT_DECAY = 0.02
MUON_LR = 0.02
BASE_LR = {"embed_tokens": 0.01, "lm_head": 0.004, "norm": 0.004}
"""Adam's learning rates by part of the parameter's name; every other matrix is Muon's."""


class Trainer:
    """The model, its optimizer state and its clock: what a checkpoint holds.

    The caller must have set torch to one thread before anything ran in parallel, because the other processes are
    forked.
    """

    def __init__(self, model: Llama, *, minutes: float, num_processes: int) -> None:
        self.model = model
        self.state = FlatState(model, BASE_LR, MUON_LR, num_processes)
        self.minutes = minutes
        self.num_processes = num_processes
        self.counts = shared_zeros(3, dtype=torch.float64)  # steps, tokens, seconds
        self.losses = shared_zeros(num_processes)
        self.context = torch.multiprocessing.get_context("fork")
        self.barrier = self.context.Barrier(num_processes)
        self.next_micro_batch = self.context.Value("i", 0)

    @property
    def num_steps(self) -> int:
        return int(self.counts[0])

    @property
    def num_tokens(self) -> int:
        return int(self.counts[1])

    @property
    def elapsed_minutes(self) -> float:
        return float(self.counts[2]) / 60

    @property
    def share(self) -> float:
        """Of the planned time, how much has passed."""
        return self.elapsed_minutes / self.minutes

    def train(
        self,
        size_of_step: Callable[[], tuple[int, int]],
        loss_of: Callable[[int], Tensor],
        after_step: Callable[[float], None],
    ) -> None:
        """Steps until the time is up.

        Args:
            size_of_step: how many micro-batches the next step has, and how many tokens.
            loss_of: index of a micro-batch -> its mean loss; called in whichever process claims it.
            after_step: called in process 0 with the step's loss, while the others go on with the next gradients.
        """
        others = [
            self.context.Process(target=self._work, args=(process, size_of_step, loss_of, None), daemon=True)
            for process in range(1, self.num_processes)
        ]
        for other in others:
            other.start()
        self._work(0, size_of_step, loss_of, after_step)
        for other in others:
            other.join()

    def _work(
        self,
        process: int,
        size_of_step: Callable[[], tuple[int, int]],
        loss_of: Callable[[int], Tensor],
        after_step: Callable[[float], None] | None,
    ) -> None:
        self.state.use_gradients_of(self.model, process)
        owned = self.state.slots[process :: self.num_processes]
        last = time.perf_counter()
        while self.share < 1:
            num_micro_batches, num_tokens = size_of_step()
            step, factor = self.num_steps, learning_rate_factor(self.share, self.num_steps)
            self.losses[process] = 0
            while (index := self._claim()) < num_micro_batches:
                loss = loss_of(index) / num_micro_batches
                loss.backward()  # type: ignore[no-untyped-call]
                self.losses[process] += loss.item()
            self.barrier.wait()
            self.state.step(owned, factor, step, weight_decay=WEIGHT_DECAY)
            loss_of_step = float(self.losses.sum())
            if process == 0:
                now = time.perf_counter()
                self.counts += torch.tensor([1, num_tokens, min(now - last, PAUSE_S)], dtype=torch.float64)
                self.next_micro_batch.value = 0
                last = now
            self.barrier.wait()
            self.state.gradients[process].zero_()
            if after_step:
                after_step(loss_of_step)

    def _claim(self) -> int:
        with self.next_micro_batch.get_lock():
            self.next_micro_batch.value += 1
            return int(self.next_micro_batch.value) - 1

    def save(self, path: Path) -> None:
        """Writes the checkpoint whole or not at all."""
        buffers = {name: getattr(self.state, name) for name in ("values", "first", "second")}
        torch.save({**buffers, "counts": self.counts}, path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)

    def load(self, path: Path) -> None:
        """Takes over parameters, optimizer state and clock."""
        state = torch.load(path)
        for name in ("values", "first", "second"):
            getattr(self.state, name).copy_(state[name])
        self.counts.copy_(state["counts"])


def learning_rate_factor(share: float, step: int) -> float:
    """Warm-up over 40 steps, flat for 40 % of the time, then linearly to 3 %."""
    decay = 1.0 if share < 0.4 else 1.0 - 0.97 * (share - 0.4) / 0.6
    return min(1.0, (step + 1) / 40) * max(0.03, decay)
