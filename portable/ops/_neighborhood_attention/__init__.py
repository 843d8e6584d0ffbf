"""Neighborhood attention over 1, 2 or 3 axes: windows, strides, dilation, causal axes."""

XLA = {"cpu": "xla_cache", "default": "xla_tiles"}
WHY = {
    "xla_cache": "tiles of few queries, and steps of few tiles, whose scores stay in a processor's cache.",
    "xla_tiles": "tiles of at least 128 queries where windows are wide, enough to fill a matrix unit.",
}
