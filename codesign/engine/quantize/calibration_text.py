"""Which tokens a quantiser may look at: the bundled calibration text, which no quality figure is computed on."""

import hashlib
import random
from pathlib import Path

import torch
from torch import Tensor

from codesign.bundled import calibration_texts
from codesign.engine.models.tokenizer import Tokenizer
from codesign.errors import Unsupported
from codesign.spec.model import ModelSpec

NUM_SEQUENCES, NUM_TOKENS = 32, 512
_SEED = 20261123


def calibration_digest(model: ModelSpec) -> str:
    """Of the texts and the tokenizer that calibration would use."""
    digest = hashlib.sha256(f"{_SEED} {NUM_SEQUENCES} {NUM_TOKENS}".encode())
    if model.path is not None:
        for document in calibration_texts():
            digest.update(document.text.encode())
        tokenizer = Path(model.path) / "tokenizer.json"
        digest.update(tokenizer.read_bytes() if tokenizer.is_file() else b"")
    return digest.hexdigest()


def calibration_ids(model: ModelSpec, vocab_size: int, max_positions: int) -> Tensor:
    """[S, T] int64: windows of the calibration text; random tokens where the weights are random too.

    Raises:
        Unsupported: trained weights without a tokenizer.
    """
    rng, num_tokens = random.Random(_SEED), min(NUM_TOKENS, max_positions)
    if not model.has_trained_weights:
        return torch.tensor([rng.choices(range(vocab_size), k=num_tokens) for _ in range(NUM_SEQUENCES)])
    path = Path(model.path or "")
    if not (path / "tokenizer.json").is_file():
        raise Unsupported(
            f"{path}: a weight method that is calibrated on text needs its tokenizer.json; use method rtn or hqq"
        )
    tokenizer = Tokenizer(path)
    ids: list[int] = []
    for document in calibration_texts():
        ids += tokenizer.encode(document.text)
    starts = [rng.randrange(len(ids) - num_tokens) for _ in range(NUM_SEQUENCES)]
    return torch.tensor([ids[start : start + num_tokens] for start in starts])
