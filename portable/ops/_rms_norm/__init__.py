"""Root-mean-square normalisation, plain or gated, over the whole width or in groups."""

XLA: dict[str, str] = {}  # one form for every platform
WHY = {"xla": "elementwise work around one reduction, which XLA fuses."}
