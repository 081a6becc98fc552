"""Whether a study that goes on is still measured in the same world: device, torch, model weights.

Numbers from two machines do not belong on one front, so a study refuses to go on elsewhere.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from codesign.errors import InputError
from codesign.results.record import TrialRecord


def check_same_world(records: Sequence[TrialRecord], here: Mapping[str, Any], study: object) -> None:
    """Compares what the study's trials ran on with `here` (by `measure.provenance`).

    Raises:
        InputError: they differ; the text says in what.
    """
    changed = difference(records, here)
    if changed is not None:
        raise InputError(
            f"its trials were measured in another world ({changed}), so new ones could not be compared with them; "
            "start a study of its own with --name",
            file=study,
            key="--name",
        )


def difference(records: Sequence[TrialRecord], here: Mapping[str, Any]) -> str | None:
    """In what `here` is another world than that of the latest record that names its own; None where it is not."""
    known = (record.provenance for record in reversed(records) if record.outcome.kind != "harness")
    before = next((provenance for provenance in known if "versions" in provenance), None)
    if before is None or "versions" not in here:
        return None
    then, now = _world(before), _world(here)
    changed = [f"{name} was {then[name]}, is {now.get(name)}" for name in then if then[name] != now.get(name)]
    return "; ".join(changed) or None


def _world(provenance: Mapping[str, Any]) -> dict[str, str]:
    machine = provenance.get("machine", {})
    world = {
        "processor": f"{machine.get('cpu')} with {machine.get('cores')} cores",
        "GPU": ", ".join(sorted({gpu.get("name", "?") for gpu in provenance.get("gpus", ())})) or "none",
        "torch": str(provenance.get("versions", {}).get("torch")),
        "model": str(provenance.get("model", {}).get("digest")),
    }
    if provenance.get("device") == "cpu":
        cores = provenance.get("placement", {}).get("cores", machine.get("cores"))
        world["share of the processor"] = f"{cores} cores"
    if "draft" in provenance:
        world["draft"] = str(provenance["draft"].get("digest"))
    return world
