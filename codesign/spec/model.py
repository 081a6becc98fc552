"""ModelSpec: which model a study builds, resolved to something local, as plain data that crosses to the child."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """Exactly one of `path` and `architecture` is set.

    Attributes:
        name: as shown to people ("bundled", the directory's name, the hub id with revision).
        path: local Hugging Face directory.
        architecture: the keys of a Hugging Face config.json; weights are random with `seed` (speed only, no quality).
        draft: a smaller model with the same tokenizer, for speculation.
    """

    name: str
    path: str | None = None
    architecture: Mapping[str, Any] | None = None
    seed: int = 0
    draft: "ModelSpec | None" = None

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Self:
        """What `dataclasses.asdict` wrote."""
        draft = plain.get("draft")
        return cls(**{**plain, "draft": None if draft is None else cls.from_dict(draft)})

    def __post_init__(self) -> None:
        if (self.path is None) == (self.architecture is None):
            raise ValueError("a model is a path or an architecture with random weights, exactly one of the two")

    @property
    def has_trained_weights(self) -> bool:
        return self.path is not None
