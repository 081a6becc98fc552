"""What a study is a study of: the resolved profile, space and objectives, as plain data with one digest."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from codesign.spec.metrics import Objective
from codesign.spec.profile import Profile
from codesign.spec.space import SearchSpace


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


def inputs_of(
    profile: Profile, space: SearchSpace, objectives: tuple[Objective, ...], *, target: str, seed: int
) -> Inputs:
    """The inputs of a study of `profile` over `space`."""
    return Inputs(
        stem=profile.name,
        model=profile.model_spec.name,
        parts={"profile": dict(profile.sections), "space": dict(space.plain), "target": target},
        objectives=objectives,
        seed=seed,
    )


def _written(model: Mapping[str, Any]) -> Any:
    """A model's section as a person writes it."""
    if "architecture" in model:
        return {"name": model["name"], "weights": "random", "seed": model["seed"], **model["architecture"]}
    return model.get("path", "bundled")


def profile_document(sections: Mapping[str, Any]) -> dict[str, Any]:
    """Resolved sections as a profile that can be loaded again, beside a `space.yaml`."""
    models = {name: _written(sections[name]) for name in ("model", "draft") if name in sections}
    return {
        **sections,
        **models,
        "objectives": [
            {item["metric"]: item["statistic"]} if item["statistic"] else item["metric"]
            for item in sections["objectives"]
        ],
        "search_space": "space.yaml",
    }
