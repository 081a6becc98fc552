"""Distils the draft from the target: soft labels on real text, and on what the target itself says greedily.

    python -m codesign.bundled.distill --work DIR --minutes 20              from the target in target/, into draft/
    python -m codesign.bundled.distill --work DIR --minutes 40 --resume     more of the same

Greedy acceptance is decided on the target's own greedy continuations, so most of the training is there (on-policy
distillation, as in DistillSpec, Zhou et al., 2023, https://arxiv.org/abs/2310.08461, with the roles of student and
teacher data as acceptance needs them: the accepted prefix is always the target's). Each process keeps a pool of
continuations and renews a part of it now and then.
"""

import argparse
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from codesign.bundled import draft_path, heldout_texts, target_path
from codesign.bundled.model import (
    DRAFT,
    Layer,
    Llama,
    greedy_continuations,
    load_pretrained,
    save_pretrained,
    training_dtype,
)
from codesign.bundled.parallel import Trainer
from codesign.bundled.tokenizer import END_OF_TEXT_ID
from codesign.bundled.train import Progress, load_text_ids, token_array

SHARPNESS = 1.5
"""The target's logits are multiplied by this: acceptance asks for its first choice, not for its doubts."""
NUM_MICRO_BATCHES, MICRO_TOKENS = 4, 1024
PROMPT_TOKENS, CONTINUATION_TOKENS, SEQUENCE_TOKENS = range(320, 401), 192, 512
POOL_SEQUENCES, RENEWED_SEQUENCES, USES_PER_RENEWAL = 384, 24, 48
CHECKPOINT_S = 180


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A micro-batch of real text: how often, and its shape."""

    weight: float
    num_sequences: int
    num_tokens: int


TEXT_KINDS = (Kind(weight=0.85, num_sequences=2, num_tokens=512), Kind(weight=0.15, num_sequences=1, num_tokens=1024))


def on_policy_share(share: float) -> float:
    """Of the micro-batches, how many are continuations: none in the first fifth, then most."""
    return 0.0 if share < 0.2 else 0.7


class Source:
    """Micro-batches [B, T] of real text or of greedy continuations; each forked process fills a pool of its own."""

    def __init__(self, target: Llama, text_ids: np.ndarray, seed: int) -> None:
        self.target = target
        self.text_ids = text_ids
        self.rng = random.Random(seed)
        self.pool: list[Tensor] = []
        self.num_uses = 0

    def batch(self, share_on_policy: float) -> Tensor:
        if self.rng.random() < share_on_policy:
            return self._continuations()
        (kind,) = self.rng.choices(TEXT_KINDS, [kind.weight for kind in TEXT_KINDS])
        return self._windows(kind.num_sequences, kind.num_tokens)

    def _windows(self, num_sequences: int, num_tokens: int) -> Tensor:
        starts = [self.rng.randrange(len(self.text_ids) - num_tokens) for _ in range(num_sequences)]
        return torch.from_numpy(
            np.stack([self.text_ids[start : start + num_tokens] for start in starts]).astype(np.int64)
        )

    def _continuations(self) -> Tensor:
        if self.num_uses % USES_PER_RENEWAL == 0:
            prompts = self._windows(RENEWED_SEQUENCES, self.rng.choice(PROMPT_TOKENS))
            self.pool += list(greedy_continuations(self.target, prompts, CONTINUATION_TOKENS))
            self.pool = self.pool[-POOL_SEQUENCES:]
        self.num_uses += 1
        return torch.stack(
            [self.rng.choice(self.pool)[-SEQUENCE_TOKENS:] for _ in range(MICRO_TOKENS // SEQUENCE_TOKENS)]
        )


class DistillationLoss:
    """Cross-entropy of the draft against the target's sharpened distribution, mean over positions, in nats."""

    def __init__(self, target: Llama, draft: Llama) -> None:
        self.target = target
        self.draft = draft
        self.layer: Callable[..., Tensor] = torch.compile(Layer.forward, dynamic=False)
        self.head = torch.compile(distillation_head, dynamic=False)

    def __call__(self, token_ids: Tensor) -> Tensor:
        with torch.no_grad():
            logits = self.target(token_ids)
        body = self.draft.model
        x = body.embed_tokens(token_ids)
        for layer in body.layers:
            x = self.layer(layer, x, self.draft.rotation[:, : token_ids.shape[1]], None)
        loss: Tensor = self.head(body.norm(x), self.draft.vocabulary, logits)
        return loss


def distillation_head(hidden: Tensor, vocabulary: Tensor, target_logits: Tensor) -> Tensor:
    """hidden [B, T, C], vocabulary [V, C], target_logits [B, T, V] -> a scalar."""
    log_probabilities = F.log_softmax(F.linear(hidden, vocabulary), -1)
    return -(F.softmax(target_logits * SHARPNESS, -1) * log_probabilities).sum(-1).mean()


@torch.no_grad()
def start_from_target(draft: Llama, target: Llama) -> None:
    """The draft's vocabulary begins as the target's, seen along its main directions."""
    head = target.vocabulary - target.vocabulary.mean(0)
    directions = torch.linalg.eigh(head.T @ head).eigenvectors[:, -draft.shape.hidden_size :]
    projected = head @ directions
    draft.model.embed_tokens.weight.copy_(projected / projected.std() * 0.05)


@torch.inference_mode()
def agreement(draft: Llama, target: Llama, prompts: Tensor, num_tokens: int) -> float:
    """Share of the target's greedy tokens that are the draft's first choice too: close to the acceptance rate."""
    ids = greedy_continuations(target, prompts, num_tokens)
    predicted = draft(ids[:, :-1]).argmax(-1)[:, -num_tokens:]
    return float((predicted == ids[:, -num_tokens:]).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints, outside the repository")
    parser.add_argument(
        "--minutes", type=float, default=20, help="wall clock of the whole run, what was done before included"
    )
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    arguments.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # before anything runs in parallel: the other processes are forked
    torch.set_flush_denormal(True)
    torch.manual_seed(arguments.seed)
    target, draft = load_pretrained(target_path()), Llama(DRAFT)
    start_from_target(draft, target)
    trainer = Trainer(draft, minutes=arguments.minutes, num_processes=arguments.processes)
    if arguments.resume:
        trainer.load(arguments.work / "draft.pt")
    run(trainer, target, arguments.work, arguments.seed)
    save_pretrained(draft, draft_path(), end_of_text_id=END_OF_TEXT_ID)


def run(trainer: Trainer, target: Llama, work: Path, seed: int) -> None:
    """Distils until the time is up; a line a minute, a checkpoint every few minutes."""
    tokenizer = Tokenizer.from_file(str(target_path() / "tokenizer.json"))
    source = Source(target, load_text_ids(work, tokenizer), seed)
    heldout_ids = token_array([text.text for text in heldout_texts()], tokenizer).astype(np.int64)
    prompts = torch.from_numpy(heldout_ids[: 12 * 4096].reshape(12, 4096)[:, :256].copy())
    loss_function = DistillationLoss(target, trainer.model)
    progress = Progress(trainer)
    saved = time.perf_counter()

    def size_of_step() -> tuple[int, int]:
        return NUM_MICRO_BATCHES, NUM_MICRO_BATCHES * MICRO_TOKENS

    def loss_of(index: int) -> Tensor:
        source.rng.seed(f"{seed} {trainer.num_steps} {index}")
        token_ids = source.batch(on_policy_share(trainer.share))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=training_dtype() == torch.bfloat16):
            return loss_function(token_ids)

    def after_step(loss: float) -> None:
        nonlocal saved
        progress(loss)
        if time.perf_counter() - saved > CHECKPOINT_S or trainer.share >= 1:
            trainer.save(work / "draft.pt")
            progress.log(f"agreement {agreement(trainer.model, target, prompts, 64):.3f} on held-out continuations")
            saved = time.perf_counter()

    progress.log(f"{trainer.model.num_parameters()} parameters")
    trainer.train(size_of_step, loss_of, after_step)


if __name__ == "__main__":
    main()
