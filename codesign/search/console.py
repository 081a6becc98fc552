"""Tables for a person at a terminal: a study's front, one trial's record."""

from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from codesign.report.details import table_of_drafts
from codesign.report.show import quantity, visible
from codesign.report.study import Study
from codesign.report.tables import labels_of
from codesign.results.record import TrialRecord
from codesign.search.lease import running_in
from codesign.search.where import placement_text, where


def print_front(folder: Path, console: Console) -> None:
    """The front, the unmodified configuration beside it, the named picks, and what runs where."""
    study = Study.load(folder)
    labels = labels_of(study)
    named: dict[int, list[str]] = {}
    for pick, number in study.picks.items():
        named.setdefault(number, []).append(pick)
    table = Table(title=Text(f"{study.name}: {len(study.front)} on the front of {len(study.records)} trials"))
    places = {record.uid: placement_text(record) for record in study.records}
    is_spread = len({*places.values()}) > 1
    headings = ["trial", "configuration", *(objective.label for objective in study.objectives), "tier", "pick"]
    for heading in headings + ["measured on"] * is_spread:
        table.add_column(Text(heading))
    shown = list(study.front)
    if study.baseline is not None and study.baseline.uid not in {record.uid for record in shown}:
        shown.append(study.baseline)
    for record in shown:
        values = [record.metrics.get(objective.metric) for objective in study.objectives]
        cells = [
            str(record.number),
            labels.of(record.config),
            *("" if value is None else quantity(value.value, value.unit) for value in values),
            record.tier,
            ", ".join(named.get(record.number, ())),
            *[places[record.uid]] * is_spread,
        ]
        table.add_row(*(Text(cell) for cell in cells))
    console.print(table)
    for lease in running_in(folder / "leases"):
        text = f"running: trial {lease.number}, {labels.of(lease.config)}, on {where(lease)}, since {lease.since}"
        console.print(Text(text), soft_wrap=True)


def print_record(record: TrialRecord, console: Console) -> None:
    """Every metric of one trial, with what it rests on."""
    table = Table(title=Text(f"{record.outcome.kind}, tier {record.tier}"))
    for heading in ("metric", "value", "statistic", "samples", "95 % interval"):
        table.add_column(heading)
    for name, metric in record.metrics.items():
        interval = "" if metric.low is None or metric.high is None else f"{metric.low:.4g} to {metric.high:.4g}"
        table.add_row(name, quantity(metric.value, metric.unit), metric.statistic, str(metric.num_samples), interval)
    console.print(table)
    drafts = [f"{size} -> {count}" for size, count in table_of_drafts(record).items()]
    if drafts:
        console.print(Text(visible(f"drafts by batch size: {', '.join(drafts)}")))
    if record.outcome.kind != "ok":
        console.print(Text(f"{record.outcome.kind}: {record.outcome.detail}"))
    for warning in record.warnings:
        console.print(Text(f"warning: {warning}"))
