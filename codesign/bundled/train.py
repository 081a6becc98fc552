"""Trains the target: Muon and AdamW in fp32, everything scheduled by the share of the wall clock that has passed.

    python -m codesign.bundled.train --work DIR --minutes 95             from nothing
    python -m codesign.bundled.train --work DIR --minutes 180 --resume   more of the same, from the last checkpoint
    python -m codesign.bundled.train --work DIR --export                 write the checkpoint to target/ and stop

Sequences grow from 256 to 2048 tokens: short ones teach the language cheaply, long ones teach positions and long-range copying. A
machine shared with other work only gets fewer tokens, not a broken schedule.
"""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from codesign.bundled import heldout_texts, target_path
from codesign.bundled.corpus import train_texts
from codesign.bundled.model import TARGET, Layer, Llama, save_pretrained
from codesign.bundled.optimizer import FlatState
from codesign.bundled.retrieval import retrieval_prompt
from codesign.bundled.sampling import Batch, Sampler
from codesign.bundled.tokenizer import END_OF_TEXT_ID

MUON_LR, WEIGHT_DECAY = 0.02, 0.02
BASE_LR = {"embed_tokens": 0.01, "lm_head": 0.004, "norm": 0.004}
"""Adam's learning rates by part of the parameter's name; every other matrix is Muon's."""
REPORT_S, CHECKPOINT_S = 60, 240


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What a step looks like until the share `until` of the time has passed. Shares of retrieval and repeated sequences: see `Sampler`."""

    until: float
    num_micro_batches: int
    micro_sequences: int
    num_tokens: int
    retrieval: float
    repeat: float

    @property
    def num_tokens_per_step(self) -> int:
        return self.num_micro_batches * self.micro_sequences * self.num_tokens


STAGES = (
    Stage(until=0.15, num_micro_batches=4, micro_sequences=4, num_tokens=256, retrieval=0.4, repeat=0.15),
    Stage(until=0.35, num_micro_batches=6, micro_sequences=4, num_tokens=256, retrieval=0.45, repeat=0.05),
    Stage(until=0.62, num_micro_batches=8, micro_sequences=2, num_tokens=512, retrieval=0.4, repeat=0.0),
    Stage(until=0.9, num_micro_batches=8, micro_sequences=1, num_tokens=1024, retrieval=0.4, repeat=0.0),
    Stage(until=1.0, num_micro_batches=4, micro_sequences=1, num_tokens=2048, retrieval=0.4, repeat=0.0),
)


def learning_rate_factor(share: float, step: int) -> float:
    """Warm-up over 40 steps, flat for 40 % of the time, then linearly to 3 %."""
    decay = 1.0 if share < 0.4 else 1.0 - 0.97 * (share - 0.4) / 0.6
    return min(1.0, (step + 1) / 40) * max(0.03, decay)


class CompiledLoss:
    """Weighted mean cross-entropy of a batch. One layer and the head are compiled, not the whole model: seconds for each new shape."""

    def __init__(self, model: Llama) -> None:
        self.model = model
        self.layer = torch.compile(Layer.forward, dynamic=False)
        self.head = torch.compile(head_loss, dynamic=False)

    def __call__(self, batch: Batch) -> Tensor:
        body = self.model.model
        x = body.embed_tokens(batch.token_ids)
        rotation = self.model.rotation[:, : batch.token_ids.shape[1]]
        for layer in body.layers:
            x = self.layer(layer, x, rotation, None)
        loss: Tensor = self.head(body.norm(x), self.model.vocabulary, batch.labels, batch.weights)
        return loss


def head_loss(hidden: Tensor, vocabulary: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Nats per unit of weight; hidden [B, T, C], vocabulary [V, C]."""
    losses = F.cross_entropy(F.linear(hidden, vocabulary).flatten(0, 1), labels.flatten(), reduction="none")
    return (losses * weights.flatten()).sum() / weights.sum()


class Trainer:
    """The model, its optimizer state and its clock, shared by `num_processes` single-threaded processes.

    Each step is cut into micro-batches that the processes claim one by one: on a shared machine the processes wait for each other once a
    step, not at every operation as threads would.
    """

    def __init__(self, minutes: float, num_processes: int, seed: int) -> None:
        self.model = Llama(TARGET)
        self.state = FlatState(self.model, BASE_LR, MUON_LR, num_processes)
        self.minutes = minutes
        self.num_processes = num_processes
        self.seed = seed
        self.counts = torch.zeros(3, dtype=torch.float64).share_memory_()  # steps, tokens, seconds
        self.losses = torch.zeros(num_processes).share_memory_()
        context = torch.multiprocessing.get_context("fork")
        self.barrier = context.Barrier(num_processes)
        self.next_micro_batch = context.Value("i", 0)

    @property
    def step_count(self) -> int:
        return int(self.counts[0])

    @property
    def share(self) -> float:
        return float(self.counts[2]) / (60 * self.minutes)

    @property
    def stage(self) -> Stage:
        return next((stage for stage in STAGES if self.share < stage.until), STAGES[-1])

    def work(self, process: int, sampler: Sampler, after_step: Callable[[], None]) -> None:
        """Steps until the time is up. `after_step` runs in process 0 while the others go on with the next gradients."""
        self.state.use_gradients_of(self.model, process)
        owned = self.state.slots[process :: self.num_processes]
        loss_function = CompiledLoss(self.model)
        last = time.perf_counter()
        while self.share < 1:
            stage, step = self.stage, self.step_count
            while (index := self._claim()) < stage.num_micro_batches:
                sampler.rng.seed(f"{self.seed} {step} {index}")
                batch = sampler.batch(
                    stage.micro_sequences, stage.num_tokens, retrieval=stage.retrieval, repeat=stage.repeat
                )
                loss = loss_function(batch) / stage.num_micro_batches
                loss.backward()
                self.losses[process] += loss.item()
            factor = learning_rate_factor(self.share, step)
            self.barrier.wait()
            self.state.step(owned, factor, step, weight_decay=WEIGHT_DECAY)
            if process == 0:
                now = time.perf_counter()
                self.counts += torch.tensor([1, stage.num_tokens_per_step, now - last], dtype=torch.float64)
                self.next_micro_batch.value = 0
                last = now
            self.barrier.wait()
            self.state.gradients[process].zero_()
            if process == 0:
                after_step()

    def _claim(self) -> int:
        with self.next_micro_batch.get_lock():
            self.next_micro_batch.value += 1
            return int(self.next_micro_batch.value) - 1

    def save(self, path: Path) -> None:
        state = {
            "values": self.state.values,
            "first": self.state.first,
            "second": self.state.second,
            "counts": self.counts,
        }
        torch.save(state, path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)

    def load(self, path: Path) -> None:
        state = torch.load(path)
        for name in ("values", "first", "second"):
            getattr(self.state, name).copy_(state[name])
        self.counts.copy_(state["counts"])


@torch.inference_mode()
def quick_evaluation(model: Llama, heldout_ids: Tensor, tokenizer: Tokenizer, num_tokens: int) -> str:
    """Held-out perplexity over 16 windows of `num_tokens`, and exact retrieval of 24 numbers at two distances."""
    windows = heldout_ids[: 16 * (num_tokens + 1)].view(16, num_tokens + 1)
    losses = [F.cross_entropy(model(window[None, :-1])[0], window[1:]).item() for window in windows]
    parts = [f"perplexity {np.exp(np.mean(losses)):.2f} at {num_tokens}"]
    for distance in (num_tokens // 4, num_tokens * 4 // 5):
        prompts = [
            retrieval_prompt(
                lambda text: tokenizer.encode(text).ids, heldout_ids.tolist(), distance_tokens=distance, seed=seed
            )
            for seed in range(24)
        ]
        num_right = 0
        for prompt in prompts:
            ids = torch.tensor([prompt.token_ids + prompt.answer_ids])
            predicted = model.hidden(ids)[0, -len(prompt.answer_ids) - 1 : -1] @ model.vocabulary.T
            num_right += bool((predicted.argmax(-1) == ids[0, -len(prompt.answer_ids) :]).all())
        parts.append(f"retrieval {num_right}/24 at {distance}")
    return ", ".join(parts)


def token_array(texts: list[str], tokenizer: Tokenizer) -> np.ndarray:
    """All texts as one uint16 array, each opened by the end-of-text token."""
    encoded = tokenizer.encode_batch(texts)
    return np.concatenate([np.array([END_OF_TEXT_ID, *encoding.ids], dtype=np.uint16) for encoding in encoded])


def load_text_ids(work: Path, tokenizer: Tokenizer) -> np.ndarray:
    """The training split as one array, cached in the work folder."""
    cache = work / "train.npy"
    if not cache.exists():
        np.save(cache, token_array(train_texts(), tokenizer))
    array: np.ndarray = np.load(cache)
    return array


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints, outside the repository")
    parser.add_argument(
        "--minutes", type=float, default=95, help="wall clock of the whole run, what was done before included"
    )
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--export", action="store_true")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    arguments.work.mkdir(parents=True, exist_ok=True)
    checkpoint = arguments.work / "target.pt"
    torch.set_num_threads(1)  # before anything runs in parallel: the other processes are forked
    torch.set_flush_denormal(True)
    torch.manual_seed(arguments.seed)
    trainer = Trainer(arguments.minutes, arguments.processes, arguments.seed)
    if arguments.resume or arguments.export:
        trainer.load(checkpoint)
    if not arguments.export:
        run(trainer, arguments.work)
        trainer.save(checkpoint)
    save_pretrained(trainer.model, target_path(), end_of_text_id=END_OF_TEXT_ID)


def run(trainer: Trainer, work: Path) -> None:
    """Trains until the time is up; a line a minute, an evaluation and a checkpoint every few minutes."""
    tokenizer = Tokenizer.from_file(str(target_path() / "tokenizer.json"))
    sampler = Sampler(load_text_ids(work, tokenizer), tokenizer)
    heldout_ids = torch.from_numpy(token_array([text.text for text in heldout_texts()], tokenizer).astype(np.int64))
    log(f"{trainer.model.num_parameters()} parameters, {len(sampler.text_ids)} tokens of text")
    others = [
        torch.multiprocessing.get_context("fork").Process(
            target=trainer.work, args=(process, sampler, lambda: None), daemon=True
        )
        for process in range(1, trainer.num_processes)
    ]
    for other in others:
        other.start()
    losses: list[float] = []
    saved = reported = time.perf_counter()
    tokens_before = float(trainer.counts[1])

    def after_step() -> None:
        nonlocal saved, reported, tokens_before
        losses.append(float(trainer.losses.sum()) - sum(losses))
        now = time.perf_counter()
        if now - reported > REPORT_S:
            rate = (float(trainer.counts[1]) - tokens_before) / (now - reported)
            log(
                f"{float(trainer.counts[2]) / 60:6.1f} min  step {trainer.step_count}  {float(trainer.counts[1]) / 1e6:.3f} M tokens"
                f"  {rate:.0f} tokens/s  length {trainer.stage.num_tokens}  loss {np.mean(losses):.3f}"
            )
            losses.clear()
            trainer.losses.zero_()
            tokens_before, reported = float(trainer.counts[1]), now
        if now - saved > CHECKPOINT_S or trainer.share >= 1:
            trainer.save(work / "target.pt")
            log(quick_evaluation(trainer.model, heldout_ids, tokenizer, trainer.stage.num_tokens))
            saved = time.perf_counter()

    trainer.work(0, sampler, after_step)
    for other in others:
        other.join()


def log(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S', time.gmtime())} {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
