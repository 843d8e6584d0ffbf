"""Attention with masks and scores of the caller's making, in memory linear in the length."""

XLA: dict[str, str] = {}  # one form for every platform
WHY = {"xla": "walks blocks of queries and keys that see each other; scores of one pair of blocks exist at a time."}
