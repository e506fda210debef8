"""Callbacks: everything around training steps that is not the model."""
