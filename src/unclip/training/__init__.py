"""Training: one LightningModule per stage, callbacks, and what a run needs around them.

Nothing is imported here, so that a run with something missing can say so before Lightning loads.
"""
