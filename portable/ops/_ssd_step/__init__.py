"""One position of the recurrence of `ssd`, for decoding."""

XLA: dict[str, str] = {}  # one form for every platform
WHY = {"xla": "elementwise work and one reduction: the state is read, then written over."}
