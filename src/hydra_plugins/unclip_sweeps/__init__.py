"""Hydra plugins for sweeps: a launcher that runs jobs as processes, and an Optuna sweeper."""
