"""Whether a study that goes on is still measured in the same world: device, torch, model weights.

Numbers from two machines do not belong on one front, so a study refuses to go on elsewhere.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from codesign.errors import InputError
from codesign.results.record import TrialRecord


def check_same_world(records: Sequence[TrialRecord], here: Mapping[str, Any], study: object) -> None:
    """Compares what the study's latest trial ran on with `here` (both by `measure.provenance`).

    Raises:
        InputError: they differ; the text says in what.
    """
    before = next((record.provenance for record in reversed(records) if "versions" in record.provenance), None)
    if before is None:
        return
    then, now = _world(before), _world(here)
    changed = [f"{name} was {then[name]}, is {now.get(name)}" for name in then if then[name] != now.get(name)]
    if changed:
        raise InputError(
            f"its trials were measured in another world ({'; '.join(changed)}), so new ones could not be compared with "
            "them; start a study of its own with --name",
            file=study,
            key="--name",
        )


def _world(provenance: Mapping[str, Any]) -> dict[str, str]:
    machine = provenance.get("machine", {})
    found = {
        "processor": f"{machine.get('cpu')} with {machine.get('cores')} cores",
        "GPUs": ", ".join(gpu.get("name", "?") for gpu in provenance.get("gpus", ())) or "none",
        "torch": str(provenance.get("versions", {}).get("torch")),
        "model": str(provenance.get("model", {}).get("digest")),
    }
    if "draft" in provenance:
        found["draft"] = str(provenance["draft"].get("digest"))
    return found
