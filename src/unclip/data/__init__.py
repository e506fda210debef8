"""Data sets: made, stored as shards, and loaded. Knows no model."""
