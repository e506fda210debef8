"""Write everything that an evaluation leaves: files, a page, printed tables, logger entries."""

from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from unclip.evaluation.measurement import Table
from unclip.evaluation.report.results import Report, main_score, write_results
from unclip.evaluation.report.sweep_plot import write_curves
from unclip.evaluation.report.tables import Section, format_table, not_available, render, write_csv
from unclip.files import write_text


def publish(
    report: Report, out: Path, *, sweep: bool = False, loggers: Sequence[Any] = ()
) -> float | None:
    """Write the report to OUT, print its tables, and return the protocol's main number.

    If OUT is one job of a sweep, a summary of the sweep is written to its parent. `loggers` are
    Lightning's.
    """
    path, page = write_results(report.results, out / "results.json"), out / "report.html"
    write_samples(report, out / "samples.csv")
    summary = write_curves(out.parent) if sweep else []
    curves = {title: image for one in summary for title, image in one.images.items()}
    write_text(page, render_report(report, Section("Guidance", images=curves)))
    for logger in loggers:
        log_report(logger, report)
    print(f"{summarize(report)}\n\nresults: {path}\nreport: {page}")
    if sweep:
        write_text(out.parent / page.name, render(f"Sweep of {out.parent.name}", summary))
        print(f"sweep: {out.parent / page.name}")
    return main_score(report.results)


def render_report(report: Report, curves: Section | None = None) -> str:
    """Render an evaluation's page, with the curves of its sweep."""
    results, (scores, *others) = report.results, report.sections
    about = Section(notes=[_about(results)] if results["key"] else [])
    settings = Section("Settings", tables={"": _settings(results)})
    sections = [about, scores, curves or Section(), *others, settings]
    return render(f"Evaluation of {results['model'] or results['generated']}", sections)


def _about(results: Mapping[str, Any]) -> str:
    """Describe the protocol."""
    protocol = results["protocol"]
    left_out = "".join(
        f" {sum(kinds.values())} bad samples of {split} were left out."
        for split, kinds in results.get("bad_samples", {}).items()
    )
    return (
        f"Protocol {protocol['name']}: {results['n']:,} images of {protocol['resolution']} px, "
        f"captions of {protocol['split']} ({protocol['captions'].replace('_', ' ')}), compared "
        f"with {results['n_reference']:,} images of {protocol['reference']}.{left_out} Only "
        f"numbers with the same key are comparable: {results['key']}"
    )


def _settings(results: Mapping[str, Any]) -> Table:
    """Return what the numbers depend on."""
    made = {name: value for name, value in results["made_with"].items() if name != "protocol"}
    for stage, sampling in made.pop("sampling", {}).items():
        words = ", ".join(f"{name} {value}" for name, value in sampling.items())
        made[f"{stage} sampled with"] = words
    made |= {f"protocol.{name}": value for name, value in results["protocol"].items()}
    made |= {**results["versions"], "device": results["device"], "seconds": results["seconds"]}
    return Table(["setting", "value"], [[name, str(value)] for name, value in made.items()])


def summarize(report: Report) -> str:
    """Return the text that is printed at the end: all tables, what is missing, image paths."""
    results = report.results
    parts = [
        f"{title}\n{format_table(table)}"
        for section in report.sections
        for title, table in section.tables.items()
    ]
    parts += not_available(results["not_available"])
    if results["paths"]:
        parts.append("\n".join(["images:", *(f"  {path}" for path in results["paths"])]))
    parts.append(f"evaluated in {timedelta(seconds=round(results['seconds']['total']))}")
    return "\n\n".join(parts)


def write_samples(report: Report, path: Path) -> None:
    """Write one CSV row per image of the protocol: id, prompt, seed, file, and its own scores."""
    if report.folder is None:
        return
    columns, rows = report.rows, []
    for k, row in enumerate(report.folder.rows):
        values = [f"{float(column[k]):.6g}" for column in columns.values()]
        rows.append([row.id, row.prompt, row.seed, row.path.as_posix(), *values])
    write_csv(Table(["id", "prompt", "seed", "file", *columns], rows), path)


def log_report(logger: Any, report: Report) -> None:
    """Log scores by their key and, if the logger can, all tables and images of the report."""
    results, key = report.results, report.key
    logger.log_hyperparams({"key": key, **results["protocol"], "made_with": results["made_with"]})
    logger.log_metrics({f"{key}/{name}": one["value"] for name, one in results["scores"].items()})
    for section in report.sections:
        if hasattr(logger, "log_table"):
            for title, table in section.tables.items():
                logger.log_table(key=f"{key}/{title}", columns=table.head, data=table.rows)
        if hasattr(logger, "log_image"):
            for title, image in section.images.items():
                shown = str(image) if isinstance(image, Path) else image
                logger.log_image(key=f"{key}/{title}", images=[shown])
    logger.save()
    logger.finalize("success")
