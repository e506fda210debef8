"""The report of an evaluation: results.json, samples.csv, report.html, a sweep's curves, loggers."""
