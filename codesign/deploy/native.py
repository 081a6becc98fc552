"""Export to this project's own engine: the configuration that `codesign measure` and `serve` take, with its evidence.

config.yaml     the engine's configuration
profile.yaml    what it was measured for: hardware, model, workload, service level
space.yaml      the search space that the profile names
evidence.json   the trial's record, unchanged
speculation.json  where it speculates: batch size -> number of draft tokens, and the acceptance and costs behind it
README.md       what it is, what it gave, how to measure and serve it
"""

import dataclasses
import json
from pathlib import Path

from codesign.results.files import write_file
from codesign.results.record import TrialRecord
from codesign.spec.yaml import dump_yaml
from codesign.units import format_bytes


@dataclasses.dataclass(frozen=True)
class Native:
    """codesign's own engine."""

    def export(self, record: TrialRecord, study: Path, folder: Path) -> list[Path]:
        """Writes the files above into `folder` and returns their paths.

        Args:
            study: the study's folder, whose profile and space go along.
        Raises:
            WorkError, OSError: they cannot be written.
        """
        folder.mkdir(parents=True, exist_ok=True)
        contents = {
            "config.yaml": dump_yaml(dict(record.config)).encode(),
            "evidence.json": record.to_json().encode(),
            "README.md": readme(record).encode(),
            **{name: (study / name).read_bytes() for name in ("profile.yaml", "space.yaml")},
        }
        speculation = record.resolved.get("speculation")
        if speculation:
            contents["speculation.json"] = (json.dumps(speculation, indent=1, sort_keys=True) + "\n").encode()
        for name, data in contents.items():
            write_file(folder / name, data)
        return [folder / name for name in contents]


def readme(record: TrialRecord) -> str:
    """What the exported configuration is, in Markdown."""
    rows = [
        f"| {name} | {shown(value.value, value.unit)} | {value.statistic or 'single reading'} | {value.num_samples} |"
        for name, value in sorted(record.metrics.items())
    ]
    return "\n".join(
        [
            f"# Trial {record.number} of study {record.study}",
            "",
            f"`config.yaml` builds this engine (digest `{record.config_digest}`).",
            "`evidence.json` is the trial's record, with every request and the machine it ran on.",
            "",
            f"Measured on {record.finished_at}, tier `{record.tier}`:",
            "",
            "| metric | value | statistic | samples |",
            "|---|---|---|---|",
            *rows,
            "",
            "Measure it again, with more care than a search has time for:",
            "",
            "    codesign measure profile.yaml --config config.yaml --tier confirm",
            "",
            "Serve it to OpenAI-compatible clients, with the model that `profile.yaml` names:",
            "",
            "    codesign serve config.yaml",
            "",
        ]
    )


def shown(value: float, unit: str) -> str:
    return format_bytes(value) if unit == "bytes" else f"{value:.4g} {unit}".rstrip()
