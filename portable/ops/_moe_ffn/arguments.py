"""What the implementations take: the arrays of `api.prepare`, by name."""

from typing import Any, NamedTuple


class Arguments(NamedTuple):
    """Attributes:
    x: [t, d]. w_gate (None where there is no gate), w_up: [e, d, f] or e arrays [d, f]. w_down: [e, f, d] likewise.
      Matrices may be of another dtype than x, in which they are multiplied.
    indices: [t, k] int32, e where a choice is empty. weights: [t, k] in the accumulator's dtype, 0 there.
    b_gate, b_up: [e, f] or None. b_down: [e, d] or None.
    """

    x: Any
    w_gate: Any
    w_up: Any
    w_down: Any
    indices: Any
    weights: Any
    b_gate: Any = None
    b_up: Any = None
    b_down: Any = None
