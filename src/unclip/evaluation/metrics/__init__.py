"""Metrics of the protocol's images: distances, diversity, agreement with the caption."""
