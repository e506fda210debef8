"""Concerns that are not the model's: each is one callback, in one file."""
