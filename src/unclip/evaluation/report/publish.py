"""Write everything that an evaluation leaves: files, printed tables and a logger's entries."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unclip.evaluation.report.html import render_report, render_sweep
from unclip.evaluation.report.results import Report, main_score, write_results
from unclip.evaluation.report.sweep_plot import write_curves
from unclip.evaluation.report.tables import (
    by_reason,
    format_duration,
    format_table,
    score_table,
)
from unclip.files import atomic_write, write_text


def publish(
    report: Report, out: Path, *, sweep: bool = False, loggers: Sequence[Any] = ()
) -> float | None:
    """Write the report to OUT, print its tables, and return the protocol's main number.

    Args:
        report: the evaluation.
        out: the folder; the summary of a sweep is written to its parent.
        sweep: whether the folder is one job of a sweep.
        loggers: Lightning loggers.
    """
    path = write_results(report.results, out / "results.json")
    if report.folder is not None:
        write_samples(report, out / "samples.csv")
    curves = write_curves(out.parent) if sweep else []
    plots = [curve for curve in curves if curve.suffix == ".png"]
    write_text(out / "report.html", render_report(report, curves=plots))
    for logger in loggers:
        log_report(logger, report)
    print(f"{summarize(report)}\n\nresults: {path}\nreport: {out / 'report.html'}")
    if sweep:
        tables = [curve for curve in curves if curve.suffix == ".csv"]
        write_text(out.parent / "report.html", render_sweep(out.parent, plots, tables))
        print(f"sweep: {out.parent / 'report.html'}")
    return main_score(report.results)


def summarize(report: Report) -> str:
    """Return the text that is printed at the end: all tables, what is missing, image paths."""
    results, parts = report.results, []
    if results["scores"]:
        parts.append(f"{report.key}\n{format_table(score_table(results['scores']))}")
    for result in report.found.results.values():
        parts += [f"{title}\n{format_table(table)}" for title, table in result.tables.items()]
    missing = by_reason(results["not_available"])
    parts += [f"not available: {names}: {reason}" for reason, names in missing.items()]
    if results["paths"]:
        parts.append("\n".join(["images:", *(f"  {path}" for path in results["paths"])]))
    parts.append(f"evaluated in {format_duration(results['seconds']['total'])}")
    return "\n\n".join(parts)


def write_samples(report: Report, path: Path) -> None:
    """Write one CSV row per image: id, prompt, seed, file, and its own scores."""
    columns = report.rows
    with atomic_write(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "prompt", "seed", "file", *columns])
        for k, row in enumerate(report.folder.rows):
            values = [f"{float(column[k]):.6g}" for column in columns.values()]
            writer.writerow([row.id, row.prompt, row.seed, row.path.as_posix(), *values])


def log_report(logger: Any, report: Report) -> None:
    """Log scores by their key and, if the logger can, tables and the best and worst images."""
    results, key = report.results, report.key
    logger.log_hyperparams({"key": key, **results["protocol"], "made_with": results["made_with"]})
    logger.log_metrics({f"{key}/{name}": one["value"] for name, one in results["scores"].items()})
    if hasattr(logger, "log_table"):
        tables = {"scores": score_table(results["scores"])} if results["scores"] else {}
        for result in report.found.results.values():
            tables |= result.tables
        for title, table in tables.items():
            logger.log_table(key=f"{key}/{title}", columns=table.head, data=table.rows)
    if hasattr(logger, "log_image"):
        for title, chosen in report.best_and_worst().items():
            logger.log_image(
                key=f"{key}/{title}",
                images=[str(row.path) for row, _ in chosen],
                caption=[row.prompt or row.id for row, _ in chosen],
            )
    logger.save()
    logger.finalize("success")
