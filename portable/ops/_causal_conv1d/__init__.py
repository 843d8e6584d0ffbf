"""Short depthwise causal convolution."""

XLA: dict[str, str] = {}  # one form for every platform
WHY = {"xla": "shifted sums: on a CPU far faster than XLA's depthwise convolution."}
