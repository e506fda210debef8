"""Evaluation: features and distances, the judge's choices, the benchmark, its pictures and report.

Import its modules: most of what they need (torchmetrics, timm) is slow to load.
"""
