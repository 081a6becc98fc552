"""The command line. A verb reads its arguments, imports the stage that does the work, and answers.

Exit status: 0 done; 1 the work failed; 2 the input is wrong; 130 stopped by Ctrl-C. With `--json` stdout holds exactly
one JSON document, also when something is wrong ({"error", "exit_status"}); everything else goes to stderr.
"""

import contextlib
import dataclasses
import json
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from codesign.errors import CodesignError, Unsupported

if TYPE_CHECKING:
    from rich.console import Console

    from codesign.results.record import TrialRecord

SCHEMA_VERSION = 1

app = typer.Typer(
    name="codesign",
    help="Design-space exploration for LLM inference: build each configuration, measure it, choose with evidence.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout, everything else on stderr.")]
ProfilePath = Annotated[Path, typer.Argument(metavar="PROFILE", help="A profile, e.g. profiles/cpu.yaml.")]
StudyPath = Annotated[Path, typer.Argument(metavar="STUDY", help="A study's folder, e.g. reports/cpu-1a2b3c.")]
Model = Annotated[
    str | None, typer.Option(metavar="DIR", help="Instead of the profile's model: a directory, or bundled.")
]


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a verb found.

    Attributes:
        document: for `--json`.
        show: prints the same for a person.
    """

    document: dict[str, Any]
    show: Callable[[], None]
    exit_status: int = 0


@app.command()
def search(
    profile: ProfilePath,
    model: Model = None,
    space: Annotated[Path | None, typer.Option(metavar="FILE", help="Instead of the profile's search space.")] = None,
    trials: Annotated[
        int | None, typer.Option(min=1, help="The study's total; 24 unless there is a budget.", show_default=False)
    ] = None,
    budget: Annotated[
        str | None, typer.Option(metavar="TIME", help="Wall time of this run, e.g. 90s, 20m, 1.5h.")
    ] = None,
    target: Annotated[str, typer.Option(help="What is built and measured.")] = "native",
    name: Annotated[str | None, typer.Option(help="The study's name; by default the profile's and its digest.")] = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where studies are kept.")] = Path("reports"),
    seed: Annotated[int, typer.Option(min=0, help="Of the sampler.")] = 0,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Worker processes, each with its own cores or GPUs.", show_default=False)
    ] = None,
    storage: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            envvar="CODESIGN_STORAGE",
            help="postgresql://USER@HOST/DATABASE, for searches on several machines; the password from PGPASSWORD.",
        ),
    ] = None,
    ray: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Trials as Ray tasks: local, or HOST:PORT of a cluster.")
    ] = None,
    as_json: Json = False,
) -> Answer:
    """Search a profile's space; the same command again goes on where it stopped."""
    from codesign.report.exports import front_document
    from codesign.report.study import Study
    from codesign.search.command import SearchRequest, run_search
    from codesign.search.database import redacted
    from codesign.search.interrupt import Interrupt
    from codesign.search.limits import limits_of

    request = SearchRequest(
        profile=profile,
        model=model,
        space=space,
        limits=limits_of(trials, budget),
        target=target,
        name=name,
        out=out,
        seed=seed,
        storage=storage,
        workers=workers,
        ray=ray,
    )
    interrupt = Interrupt()
    with interrupt.installed():
        folder, result = run_search(request, stderr(), interrupt)
    page = folder.path / "index.html"
    say(f"{result.stopped}; report: {page}")
    if result.was_interrupted:
        say(f"every finished trial is kept; to go on: codesign {shlex.join(redacted(sys.argv[1:]))}")
    study = Study.load(folder.path)
    document = {**front_document(study), "folder": str(folder.path), "report": str(page), "stopped": result.stopped}
    return Answer(
        document,
        lambda: print_front(folder.path),
        exit_status=interrupt.exit_status if result.was_interrupted else 0,
    )


@app.command()
def measure(
    profile: ProfilePath,
    config: Annotated[Path, typer.Option(metavar="FILE", help="An engine configuration, e.g. configs/trial-3.yaml.")],
    tier: Annotated[str, typer.Option(help="screen, confirm or publish: how much is measured.")] = "confirm",
    model: Model = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where the record is written; default below reports/measured/.")
    ] = None,
    as_json: Json = False,
) -> Answer:
    """Measure one configuration with care."""
    from codesign.search.single import measure_one

    path, record = measure_one(profile, config, tier=tier, model=model, out=out, console=stderr())
    say(f"record: {path}")
    document = json.loads(record.to_json())
    return Answer(document, lambda: print_record(record), exit_status=0 if record.outcome.kind == "ok" else 1)


@app.command()
def front(study: StudyPath, as_json: Json = False) -> Answer:
    """Show a study's Pareto front, its named picks, and what runs where."""
    from codesign.report.exports import front_document
    from codesign.report.study import Study
    from codesign.search.folder import find_study
    from codesign.search.lease import running_in
    from codesign.search.where import running_document

    folder = find_study(study)
    document = {**front_document(Study.load(folder)), "running": running_document(running_in(folder / "leases"))}
    return Answer(document, lambda: print_front(folder))


@app.command()
def report(
    studies: Annotated[list[Path], typer.Argument(metavar="STUDY...", help="One study, or several to compare.")],
    as_json: Json = False,
) -> Answer:
    """(Re)write a study's HTML page; with several studies, a page that compares them."""
    from codesign.report.comparison import write_comparison
    from codesign.report.page import write_report
    from codesign.search.folder import find_study

    folders = [find_study(study) for study in studies]
    page = write_report(folders[0]) if len(folders) == 1 else write_comparison(folders)
    return Answer({"schema_version": SCHEMA_VERSION, "report": str(page)}, lambda: print(page))


@app.command()
def export(
    study: StudyPath,
    to: Annotated[str, typer.Option("--to", metavar="TARGET", help="What it is written for.")],
    trial: Annotated[int | None, typer.Option(min=0, help="A trial's number.")] = None,
    pick: Annotated[
        str | None, typer.Option(metavar="NAME", help="A named pick, as `codesign front` lists them.")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Default: inside the study's folder.")] = None,
    weights: Annotated[
        bool, typer.Option("--weights", help="Also write the packed weights as a Hugging Face directory.")
    ] = False,
    as_json: Json = False,
) -> Answer:
    """Write a trial's configuration in the form that a target takes, with the evidence for it."""
    from codesign.registry import TARGETS
    from codesign.search.folder import find_study
    from codesign.search.pick import chosen

    TARGETS.check(to, key="--to")
    folder = find_study(study)
    record = chosen(folder, trial=trial, pick=pick)
    target = out or folder / "export" / f"trial-{record.number}-{to}"
    files = TARGETS.create(to).export(record, folder, target)
    if weights:
        files += _export_weights(record, folder, target / "weights")
    document = {
        "schema_version": SCHEMA_VERSION,
        "trial": record.number,
        "to": to,
        "files": [str(file) for file in files],
    }
    return Answer(document, lambda: print(*files, sep="\n"))


def _export_weights(record: Any, study: Path, target: Path) -> list[Path]:
    from codesign.engine.build import DTYPES
    from codesign.engine.quantize.export import export_checkpoint
    from codesign.spec.engine_config import EngineConfig
    from codesign.spec.profile import load_profile

    config = EngineConfig.from_dict(record.config)
    say(f"packing the weights of trial {record.number}")
    spec = load_profile(study / "profile.yaml").model_spec
    return export_checkpoint(spec, config, target, dtype=DTYPES[config.dtype])


@app.command()
def serve(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG", help="An engine configuration, as export --to native writes it.")
    ],
    profile: Annotated[
        Path | None,
        typer.Option(metavar="PROFILE", help="Names model and hardware; default profile.yaml beside CONFIG."),
    ] = None,
    model: Model = None,
    host: Annotated[str, typer.Option(help="Another than this machine's own needs an API key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8000,
    api_key_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Holds the API key; or set CODESIGN_API_KEY.")
    ] = None,
    allow_host: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="A further name by which clients call this server.")
    ] = None,
    as_json: Json = False,
) -> Answer:
    """Serve one configuration to OpenAI-compatible clients until SIGTERM or Ctrl-C."""
    try:
        from codesign.serve.command import ServeRequest
        from codesign.serve.command import serve as run
    except ModuleNotFoundError as error:
        if error.name not in ("fastapi", "starlette", "uvicorn"):
            raise
        raise Unsupported(
            f"serve needs {error.name}, which is not installed: pip install --editable '.[serve]'"
        ) from None

    asked = ServeRequest(
        config=config,
        profile=profile,
        model=model,
        host=host,
        port=port,
        api_key_file=api_key_file,
        allow_host=allow_host or (),
    )
    document = {"schema_version": SCHEMA_VERSION, **run(asked, say)}
    text = "{ended_by}: served {sequences} sequences, {output_tokens} tokens; {aborted} were cut off"
    return Answer(document, lambda: say(text.format(**document)))


@app.command()
def probe(as_json: Json = False) -> Answer:
    """Measure this machine; prints the `hardware:` section of a profile."""
    from codesign.measure.probe import probe
    from codesign.spec.yaml import dump_yaml

    hardware = probe(say)
    return Answer({"hardware": hardware}, lambda: print(dump_yaml({"hardware": hardware}), end=""))


@app.command()
def check(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Profiles, search spaces, configurations.")],
    as_json: Json = False,
) -> Answer:
    """Check YAML files; says what is wrong and where."""
    from codesign.spec.check import check_file

    results: list[dict[str, Any]] = []
    for file in files:
        try:
            results.append({"file": str(file), "kind": check_file(file), "error": None})
        except CodesignError as error:
            say(str(error))
            results.append({"file": str(file), "kind": None, "error": str(error)})

    def show() -> None:
        for result in results:
            if result["error"] is None:
                print(f"{result['file']}: a valid {result['kind']}")

    wrong = any(result["error"] is not None for result in results)
    return Answer({"schema_version": SCHEMA_VERSION, "files": results}, show, exit_status=2 if wrong else 0)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    as_json = "--json" in given
    sys.stdout.flush()
    real_stdout = os.dup(1)
    try:
        with contextlib.ExitStack() as stack:
            if as_json:  # whatever else prints, also from C, cannot get into the document
                os.dup2(2, 1)
                stack.enter_context(contextlib.redirect_stdout(sys.stderr))
            document, status = _run(given)
        sys.stdout.flush()
        if as_json and document is not None:
            _write(real_stdout, json.dumps(document, allow_nan=False, indent=1) + "\n")
        return status
    except BrokenPipeError:  # the reader has seen enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    finally:
        if as_json:
            os.dup2(real_stdout, 1)
        os.close(real_stdout)


def _run(arguments: Sequence[str]) -> tuple[dict[str, Any] | None, int]:
    try:
        answer = app(list(arguments), prog_name="codesign", standalone_mode=False)
    except CodesignError as error:
        return _failed(str(error), error.exit_status)
    except typer.TyperException as error:
        return _failed(error.format_message(), error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        return _failed("stopped by Ctrl-C", 130)
    except BrokenPipeError:
        raise
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _failed(f"{where}{error.strerror or error}", 1)
    if isinstance(answer, Answer):
        if "--json" not in arguments:
            answer.show()
        return answer.document, answer.exit_status
    return None, answer if isinstance(answer, int) else 0


def _failed(message: str, status: int) -> tuple[dict[str, Any], int]:
    say(f"codesign: {message}")
    return {"schema_version": SCHEMA_VERSION, "error": message, "exit_status": status}, status


def _write(descriptor: int, text: str) -> None:
    left = memoryview(text.encode())
    while left:
        left = left[os.write(descriptor, left) :]


def print_front(folder: Path) -> None:
    from codesign.search.console import print_front

    print_front(folder, stdout())


def print_record(record: "TrialRecord") -> None:
    from codesign.search.console import print_record

    print_record(record, stdout())


def stdout() -> "Console":
    from rich.console import Console

    # Where nobody looks at a screen, a table is as wide as it needs to be.
    return Console(width=None if sys.stdout.isatty() else 200)


def stderr() -> "Console":
    from rich.console import Console

    return Console(stderr=True)


def say(text: str) -> None:
    """One message for a person, on stderr."""
    print(text, file=sys.stderr, flush=True)
