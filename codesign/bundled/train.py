"""Trains the target: Muon and Adam on fp32 master weights, scheduled by the share of the wall clock that has passed.

    python -m codesign.bundled.train --work DIR --minutes 95             from nothing
    python -m codesign.bundled.train --work DIR --minutes 180 --resume   more of the same, from the last checkpoint
    python -m codesign.bundled.train --work DIR --export                 write the checkpoint to target/ and stop

Sequences grow from 256 to 2048 tokens: short ones teach the language cheaply, long ones teach positions and
long-range copying. A machine shared with other work only gets fewer tokens, not a broken schedule.
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
from codesign.bundled.model import TARGET, Layer, Llama, save_pretrained, training_dtype
from codesign.bundled.parallel import Trainer
from codesign.bundled.retrieval import retrieval_prompt
from codesign.bundled.sampling import Batch, Sampler
from codesign.bundled.tokenizer import END_OF_TEXT_ID

REPORT_S, CHECKPOINT_S = 60, 240


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What a step is like until the share `until` of the time has passed; `retrieval`, `repeat`: see `Sampler`."""

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
    Stage(until=0.12, num_micro_batches=4, micro_sequences=4, num_tokens=256, retrieval=0.4, repeat=0.2),
    Stage(until=0.30, num_micro_batches=6, micro_sequences=4, num_tokens=256, retrieval=0.4, repeat=0.2),
    Stage(until=0.66, num_micro_batches=6, micro_sequences=2, num_tokens=512, retrieval=0.5, repeat=0.05),
    Stage(until=0.90, num_micro_batches=6, micro_sequences=1, num_tokens=1024, retrieval=0.5, repeat=0.0),
    Stage(until=0.97, num_micro_batches=4, micro_sequences=1, num_tokens=1536, retrieval=0.5, repeat=0.0),
    Stage(until=1.0, num_micro_batches=4, micro_sequences=1, num_tokens=2048, retrieval=0.5, repeat=0.0),
)


class CompiledLoss:
    """Weighted mean cross-entropy of a batch.

    One layer and the head are compiled, not the whole model: seconds, not minutes, for each new shape.
    """

    def __init__(self, model: Llama) -> None:
        self.model = model
        self.layer: Callable[..., Tensor] = torch.compile(Layer.forward, dynamic=False)
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
    trainer = Trainer(Llama(TARGET), minutes=arguments.minutes, num_processes=arguments.processes)
    if arguments.resume or arguments.export:
        trainer.load(checkpoint)
    if not arguments.export:
        run(trainer, arguments.work, arguments.seed)
        trainer.save(checkpoint)
    save_pretrained(trainer.model, target_path(), end_of_text_id=END_OF_TEXT_ID)


def run(trainer: Trainer, work: Path, seed: int) -> None:
    """Trains until the time is up; a line a minute, an evaluation and a checkpoint every few minutes."""
    tokenizer = Tokenizer.from_file(str(target_path() / "tokenizer.json"))
    sampler = Sampler(load_text_ids(work, tokenizer), tokenizer)
    heldout_ids = torch.from_numpy(token_array([text.text for text in heldout_texts()], tokenizer).astype(np.int64))
    loss_function = CompiledLoss(trainer.model)
    progress = Progress(trainer)
    saved = time.perf_counter()

    def stage() -> Stage:
        return next((stage for stage in STAGES if trainer.share < stage.until), STAGES[-1])

    def size_of_step() -> tuple[int, int]:
        return stage().num_micro_batches, stage().num_tokens_per_step

    def loss_of(index: int) -> Tensor:
        now = stage()
        sampler.rng.seed(f"{seed} {trainer.num_steps} {index}")
        batch = sampler.batch(now.micro_sequences, now.num_tokens, retrieval=now.retrieval, repeat=now.repeat)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=training_dtype() == torch.bfloat16):
            return loss_function(batch)

    def after_step(loss: float) -> None:
        nonlocal saved
        progress(loss)
        if time.perf_counter() - saved > CHECKPOINT_S or trainer.share >= 1:
            trainer.save(work / "target.pt")
            progress.log(quick_evaluation(trainer.model, heldout_ids, tokenizer, stage().num_tokens))
            saved = time.perf_counter()

    progress.log(f"{trainer.model.num_parameters()} parameters, {len(sampler.text_ids)} tokens of text")
    trainer.train(size_of_step, loss_of, after_step)


class Progress:
    """A line to stderr once a minute."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.losses: list[float] = []
        self.reported, self.tokens_before = time.perf_counter(), trainer.num_tokens

    def __call__(self, loss: float) -> None:
        self.losses.append(loss)
        now, trainer = time.perf_counter(), self.trainer
        if now - self.reported > REPORT_S:
            rate = (trainer.num_tokens - self.tokens_before) / (now - self.reported)
            self.log(
                f"{trainer.elapsed_minutes:6.1f} of {trainer.minutes:g} min  step {trainer.num_steps}"
                f"  {trainer.num_tokens / 1e6:.3f} M tokens  {rate:.0f} tokens/s  loss {np.mean(self.losses):.3f}"
            )
            self.losses.clear()
            self.reported, self.tokens_before = now, trainer.num_tokens

    def log(self, line: str) -> None:
        print(f"{time.strftime('%H:%M:%S', time.gmtime())} {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
