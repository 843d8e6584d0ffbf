"""One position of the recurrence of `ssd`, for decoding."""

XLA: dict[str, str] = {}  # one form for every platform
WHY = {"xla": "elementwise work and one reduction, as fast as the state can be read and written."}
