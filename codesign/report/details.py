"""Everything about one trial, as text that page.js puts into its panel when a person opens it."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from codesign.report.cards import changed
from codesign.report.labels import Labels
from codesign.report.show import full, listed, number, visible_deep
from codesign.report.study import Study
from codesign.results.record import TrialRecord
from codesign.spec.metrics import METRICS
from codesign.spec.yaml import dump_yaml
from codesign.units import format_bytes, format_seconds

_ORDER = {name: position for position, name in enumerate(METRICS)}


def details(study: Study, labels: Labels) -> list[dict[str, Any]]:
    shared = study.shared_provenance
    return [detail(study, record, labels, shared) for record in study.records]


def table_of_drafts(record: TrialRecord) -> dict[str, Any]:
    """Batch size -> how many tokens are drafted there, the smallest first; empty where that does not adapt."""
    said = record.resolved.get("speculation")
    table = said.get("table") if isinstance(said, Mapping) else None
    if not isinstance(table, Mapping):
        return {}
    return {size: table[size] for size in sorted(table, key=lambda size: (len(size), size))}


def drafting(record: TrialRecord) -> dict[str, Any]:
    """What speculation came to; whatever the record says of it is shown, since a child wrote it."""
    said = record.resolved.get("speculation")
    if not isinstance(said, Mapping):
        return {}
    drafts = {f"drafts at batch size {size}": count for size, count in table_of_drafts(record).items()}
    return drafts | {str(name).replace("_", " "): value for name, value in said.items() if name != "table"}


def detail(study: Study, record: TrialRecord, labels: Labels, shared: Mapping[str, Any]) -> dict[str, Any]:
    config_file = f"{study.shell_path}/configs/trial-{record.number}.yaml"
    names = sorted(record.metrics, key=lambda name: (_ORDER.get(name, len(_ORDER)), name))
    changes = {name: changed(study, record, name) for name in names}
    finish_reasons = Counter(str(request.finish_reason) for request in record.requests)
    trust = dict(record.trust)
    if record.requests:
        trust["requests"] = listed([f"{count} ended by {reason}" for reason, count in finish_reasons.most_common()])
    return {
        "uid": record.uid,
        "title": f"#{record.number} {labels.of(record.config)}",
        "kind": record.outcome.kind,
        "failure": "" if record.outcome.kind == "ok" else record.outcome.detail or "no detail was recorded",
        "warnings": list(record.warnings),
        "metrics": {name: full(record.metrics[name], record.tier) for name in names},
        "changes": {name: found["text"] for name, found in changes.items() if found},
        "violations": {
            name: f"{number(100 * amount)} % over: broken"
            if amount > 0
            else f"kept, {number(-100 * amount)} % to spare"
            for name, amount in sorted(record.violations.items())
        },
        "config": dump_yaml(visible_deep(record.config)),
        "bytes": {part: format_bytes(count) for part, count in record.bytes.items()},
        "phases": {phase: format_seconds(seconds) for phase, seconds in record.phases.items()},
        "kernels": dict(record.kernels),
        "resolved": {name: value for name, value in record.resolved.items() if name != "speculation"},
        "speculation": drafting(record),
        "monitor": dict(record.monitor),
        "trust": trust,
        "provenance": {key: value for key, value in record.provenance.items() if key not in shared},
        "commands": f"codesign measure {study.shell_path}/profile.yaml --config {config_file}\n"
        f"codesign export {study.shell_path} --trial {record.number} --to native",
    }
