"""Hydra plugins for sweeps: launchers that give each job a process, and a sweeper for Optuna."""
