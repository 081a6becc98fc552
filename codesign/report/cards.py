"""The named picks as cards: what each gives, what it costs, and how it stands to the unmodified configuration."""

from collections.abc import Mapping
from typing import Any

from codesign.report.compare import change
from codesign.report.labels import Labels
from codesign.report.show import interval, quantity, spoken, visible
from codesign.report.study import Study
from codesign.report.verdict import pick_tie
from codesign.results.record import TrialRecord

MARKS = {"better": "▲", "worse": "▼", "tie": "≈", "unknown": "?"}


def cards(study: Study, labels: Labels, rows: Mapping[str, int]) -> list[dict[str, Any]]:
    """One card per picked trial, the unmodified first; a trial picked twice has one card with both names."""
    by_trial: dict[int, list[str]] = {}
    for pick, number_ in study.picks.items():
        by_trial.setdefault(number_, []).append(pick)
    found = []
    for number_, picks in by_trial.items():
        record = study.trial(number_)
        state = "" if record.is_feasible else record.outcome.kind if record.outcome.kind != "ok" else "breaks a limit"
        if "baseline" in picks and len(by_trial) == 1:
            picks = ["baseline"]  # alone it is the best in everything, which says nothing
        named = [pick for pick in picks if pick != "baseline"]
        found.append(
            {
                "names": ", ".join(
                    ("unmodified" if p == "baseline" else p).replace("_", " ") for p in picks
                ).capitalize(),
                "number": number_,
                "row": rows[record.uid],
                "label": labels.of(record.config),
                "tier": record.tier,
                "state": state,
                "metrics": card_metrics(study, record),
                "tie": " ".join(filter(None, (pick_tie(study, pick, record) for pick in picks))),
                "command": f"codesign export {study.shell_path} --pick {named[0]} --to native" if named else "",
            }
        )
    return found


def card_metrics(study: Study, record: TrialRecord) -> list[dict[str, Any]]:
    """The objectives, then speed, memory and quality that are none, so that no card shows speed without quality."""
    wanted = [objective.metric for objective in study.objectives]
    wanted += ["throughput_tokens_per_s", "tpot_ms", "peak_memory_bytes", "kl_divergence", "retrieval_accuracy"]
    found = []
    for name in dict.fromkeys(wanted):
        metric = record.metrics.get(name)
        if metric is None:
            continue
        ranges = interval(metric.low, metric.high, metric.unit)
        found.append(
            {
                "name": spoken(name),
                "value": quantity(metric.value, metric.unit),
                "basis": " ".join(filter(None, (ranges, visible(metric.statistic), f"n={metric.num_samples}"))),
                "change": changed(study, record, name),
            }
        )
    return found


def changed(study: Study, record: TrialRecord, name: str) -> dict[str, str] | None:
    """Against the unmodified configuration, as one of all that are; None for itself and what was not measured."""
    baseline = study.baseline
    if baseline is None or record.uid == baseline.uid:
        return None
    found = change(record, baseline, name, num_compared=study.num_compared)
    if found is None:
        return None
    return {
        "judgement": found.judgement,
        "text": f"{MARKS[found.judgement]} {found.text()}",
        "size": f"{MARKS[found.judgement]} {found.size}",
        "spread": found.spread,
    }
