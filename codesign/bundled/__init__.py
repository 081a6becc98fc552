"""A small trained model pair that ships with the package: a target, its draft, and texts to judge them on.

Only paths and texts here, nothing heavy: every stage may import this package. The recipe that made the files is
beside it (`corpus`, `tokenizer`, `train`, `distill`, `evaluate`) and needs torch.
"""

import json
from dataclasses import dataclass
from pathlib import Path

DATA = Path(__file__).parent / "data"


@dataclass(frozen=True, kw_only=True)
class Document:
    """A file of the standard library (`name` relative to its folder) or a pydoc topic."""

    name: str
    text: str


def target_path() -> Path:
    """Folder of the target model in Hugging Face format."""
    return Path(__file__).parent / "target"


def draft_path() -> Path:
    """Folder of the draft model in Hugging Face format; same tokenizer as the target."""
    return Path(__file__).parent / "draft"


def calibration_texts() -> list[Document]:
    """Texts for calibrating quantizers; never used for training, never for judging."""
    return _read("calibration")


def heldout_texts() -> list[Document]:
    """Texts for judging quality; the training text holds none of them nor a near-duplicate."""
    return _read("heldout")


def _read(name: str) -> list[Document]:
    with (DATA / f"{name}.jsonl").open(encoding="utf-8") as lines:
        return [Document(**json.loads(line)) for line in lines]
