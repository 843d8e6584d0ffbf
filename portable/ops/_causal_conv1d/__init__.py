"""Short depthwise causal convolution."""

XLA: dict[str, str] = {}  # one form for every platform
WHY = {"xla": "shifted sums; XLA's depthwise convolution is slower on every platform."}
