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
        "resolved": dict(record.resolved),
        "monitor": dict(record.monitor),
        "trust": trust,
        "provenance": {key: value for key, value in record.provenance.items() if key not in shared},
        "commands": f"codesign measure {study.shell_path}/profile.yaml --config {config_file}\n"
        f"codesign export {study.shell_path} --trial {record.number} --to native",
    }
