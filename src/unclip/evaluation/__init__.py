"""Evaluation: every number and figure is a `Measurement` of one `Context`; see `src/evaluate.py`.

Import its modules one by one: most of what they need (torchmetrics, timm) is slow to load.
"""
