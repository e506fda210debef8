"""What an evaluation leaves behind: results.json, samples.csv, report.html, curves, a logger's."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unclip.evaluation.curve import write_curve
from unclip.evaluation.evaluation import Outcome
from unclip.evaluation.folder import write_beside
from unclip.evaluation.page import page, sweep_page
from unclip.evaluation.report import summary, write_results
from unclip.evaluation.tracking import track


def publish(
    outcome: Outcome, out: Path, *, sweep: bool = False, loggers: Sequence[Any] = ()
) -> float | None:
    """Writes all of it into OUT, prints the tables, and returns the headline's number.

    Args:
        outcome: of an evaluation.
        out: the folder; a sweep's summary is written into the one above.
        sweep: whether the folder is one job of a sweep.
        loggers: Lightning's.
    """
    path = write_results(outcome.results, out / "results.json")
    write_samples(outcome, out / "samples.csv")
    curves = write_curve(out.parent) if sweep else []
    drawn = [curve for curve in curves if curve.suffix == ".png"]
    html = page(outcome, curves=drawn)
    write_beside(out / "report.html", html.encode())
    for logger in loggers:
        track(logger, outcome)
    print(f"{summary(outcome.results)}\n\nresults: {path}\nreport: {out / 'report.html'}")
    if sweep:
        tables = [curve for curve in curves if curve.suffix == ".csv"]
        html = sweep_page(out.parent, drawn, tables)
        write_beside(out.parent / "report.html", html.encode())
        print(f"sweep: {out.parent / 'report.html'}")
    return headline(outcome.results)


def headline(results: dict[str, Any]) -> float | None:
    """The distance in the protocol's own network, which a sweep would minimise."""
    network = results["protocol"]["network"]
    name = "fid" if network == "inception" else f"fd_{network}"
    score = results["scores"].get(name)
    return None if score is None else score["value"]


def write_samples(outcome: Outcome, path: Path) -> Path:
    """A line for each picture: id, prompt, seed, file, and every score that it has by itself."""
    columns = rows_of(outcome)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "prompt", "seed", "file", *columns])
        for k, row in enumerate(outcome.folder.rows):
            values = [f"{float(column[k]):.6g}" for column in columns.values()]
            writer.writerow([row.id, row.prompt, row.seed, row.path.as_posix(), *values])
    return path


def rows_of(outcome: Outcome) -> dict[str, Any]:
    """The scores that are means over pictures, picture by picture."""
    return {
        name: score.rows
        for name, score in outcome.scored.scores.items()
        if score.rows is not None and len(score.rows) == len(outcome.folder.rows)
    }
