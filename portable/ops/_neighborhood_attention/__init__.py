"""Neighborhood attention over 1, 2 or 3 axes: windows, strides, dilation, causal axes."""

XLA: dict[str, str] = {}
WHY = {"xla": "tiles of queries with the keys that their windows hold, in batched products."}
