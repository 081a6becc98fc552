"""The report of a study: index.html, trials.csv and front.json in its folder, each written in one piece."""

import json
from pathlib import Path

from codesign.report.exports import front_document, trials_csv
from codesign.report.render import encoded, render
from codesign.report.study import Study
from codesign.report.view import page_context
from codesign.results.files import write_file


def write_report(study_dir: Path) -> Path:
    """(Re)writes the report from the records and returns the path of index.html.

    Raises:
        InputError: `study_dir` is no study.
        WorkError: the folder cannot be read or written.
    """
    study = Study.load(study_dir)
    write_file(study_dir / "trials.csv", encoded(trials_csv(study)))
    front = json.dumps(front_document(study), allow_nan=False, indent=1)
    write_file(study_dir / "front.json", encoded(front + "\n"))
    page = study_dir / "index.html"
    write_file(page, encoded(render("page.html", **page_context(study))))
    return page
