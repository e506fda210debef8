"""An evaluation's report: results.json, samples.csv, report.html, sweep curves, loggers."""
