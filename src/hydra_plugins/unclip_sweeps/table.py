"""The table at the end of a sweep, printed and written to summary.csv: jobs, best first."""

import csv
from collections.abc import Sequence
from pathlib import Path

from hydra_plugins.unclip_sweeps.jobs import Outcome, select


def write_table(folder: Path, outcomes: Sequence[Outcome]) -> str:
    """Write FOLDER/summary.csv and return the same table as text.

    The column after the overrides is named by the `objective` of the jobs. Their `direction`
    decides the order.
    """
    config = outcomes[0].job.config
    objective = select(config, "objective") or "objective"
    sign = 1 if select(config, "direction") == "minimize" else -1
    varying = _varying(outcomes)
    header = ["job", *varying, objective, "minutes", "state"]
    ranked = sorted(
        outcomes, key=lambda o: (o.value is None, sign * (o.value or 0.0), o.job.number)
    )
    rows = [
        [
            str(outcome.job.number),
            *(_settings(outcome).get(key, "") for key in varying),
            "" if outcome.value is None else f"{outcome.value:.6g}",
            f"{outcome.seconds / 60:.2f}",
            "done" if outcome.code == 0 else f"failed ({outcome.code})",
        ]
        for outcome in ranked
    ]
    with open(folder / "summary.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = [
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in [header, *rows]
    ]
    return "\n".join([*lines, f"(also in {folder / 'summary.csv'})"])


def _settings(outcome: Outcome) -> dict[str, str]:
    return dict(word.partition("=")[::2] for word in outcome.job.overrides)


def _varying(outcomes: Sequence[Outcome]) -> list[str]:
    """Return the keys whose values differ between jobs, or all keys of a single job."""
    all_settings = [_settings(outcome) for outcome in outcomes]
    keys = dict.fromkeys(key for settings in all_settings for key in settings)
    differing = [key for key in keys if len({settings.get(key) for settings in all_settings}) > 1]
    return differing if len(outcomes) > 1 else list(keys)
