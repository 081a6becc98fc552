"""What a study is a study of: the resolved profile, space and objectives, as plain data with one digest."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from codesign.spec.metrics import Objective


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inputs:
    """Attributes:
    stem: of the profile's file; begins the default name.
    model: as shown to people.
    parts: section -> plain data that decides whether two studies are the same: profile, space, target.
    objectives: those that this machine can give.
    seed: of the sampler; not part of the digest, so a study may go on with another.
    """

    stem: str
    model: str
    parts: Mapping[str, Any]
    objectives: tuple[Objective, ...]
    seed: int = 0

    @property
    def digest(self) -> str:
        """Sixteen hex digits of the parts."""
        text = json.dumps(self.parts, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def identity_hash(*parts: object) -> str:
    """Twenty hex digits that name one combination of parts."""
    return hashlib.sha256("/".join(str(part) for part in parts).encode()).hexdigest()[:20]
