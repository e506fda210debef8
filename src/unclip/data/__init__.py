"""Data sets: preparation, tar shards and loading; independent of any model."""
