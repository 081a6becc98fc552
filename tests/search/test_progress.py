"""What a person sees on stderr."""

import dataclasses
import io

from rich.console import Console

from codesign.search.lease import Lease
from codesign.search.limits import Limits
from codesign.search.progress import ConsoleProgress, label
from codesign.spec.engine_config import Choice, EngineConfig
from tests.search.fake_measure import OBJECTIVES, record_of
from tests.search.test_objective import identity

DEFAULT = EngineConfig().resolve()
OTHER = dataclasses.replace(DEFAULT, max_batch_size=2)


def lines(*, is_terminal: bool) -> str:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=is_terminal, width=200)
    progress = ConsoleProgress(console, OBJECTIVES, DEFAULT)
    with progress.shown():
        progress.begin((), Limits(trials=3))
        for number, (config, kind) in enumerate([(DEFAULT, "ok"), (OTHER, "ok"), (OTHER, "oom")]):
            progress.trial(identity(number), config)
            progress.phase(identity(number).uid, "measure", 0.5)
            progress.finished(record_of(identity(number), config, kind, "[red]too much[/red]\nmore"))  # type: ignore[arg-type]
    return stream.getvalue()


def test_each_finished_trial_is_one_plain_line_where_there_is_no_terminal() -> None:
    text = lines(is_terminal=False)

    shown = text.splitlines()
    assert len(shown) == 3
    assert shown[0].startswith("trial 0 | unmodified | ")
    assert "max_batch_size=2" in shown[1]
    assert "done 2/3, front 2" in shown[1]
    assert "\x1b" not in text


def test_a_failure_is_shown_as_text_with_its_cause() -> None:
    assert "oom: [red]too much[/red] |" in lines(is_terminal=False)


def test_a_terminal_gets_a_live_line_with_the_phase() -> None:
    assert "\x1b[" in lines(is_terminal=True)


def test_the_live_view_says_what_runs_where_here_and_elsewhere() -> None:
    progress = ConsoleProgress(Console(file=io.StringIO(), width=200), OBJECTIVES, DEFAULT)
    progress.begin((), Limits(trials=9))
    progress.trial(identity(0), DEFAULT, "cores 0-3")
    progress.trial(identity(1), OTHER, "Ray")
    progress.phase("u0", "measure", 0.5)
    progress.moved("u1", "Ray node n7, worker 12")
    far = Lease(worker="w", host="n9", boot_id="b", pid=7, pid_start_ticks=1, uid="u2", number=2, place="cores 4-7")
    progress.elsewhere([dataclasses.replace(far, config=OTHER.to_dict())])
    lines = progress._lines().plain.splitlines()

    assert lines[0].startswith("trial 0: unmodified | cores 0-3 | measure 50%")
    assert lines[1].startswith("trial 1: max_batch_size=2 | Ray node n7, worker 12 | start")
    assert lines[2] == "trial 2: max_batch_size=2 | n9, search 7, cores 4-7"
    assert lines[3].startswith("done 0/9")


def test_a_configuration_is_named_by_what_differs_from_the_unmodified_one() -> None:
    config = dataclasses.replace(DEFAULT, weights=Choice.of("int4", group_size=128, method="rtn"))

    assert label(config, DEFAULT) == "weights=int4 weights.int4.group_size=128"
    assert label(DEFAULT, DEFAULT) == "unmodified"
