"""Short depthwise causal convolution."""

XLA: dict[str, str] = {}  # one form for every platform
