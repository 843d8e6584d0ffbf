"""Matrix products of a compiled program, counted in its text."""

import math
from collections.abc import Callable

from portable.parity import hlo, loops


def product_flops(text: str, times: Callable[[set[int]], float] | None = None) -> float:
    """Returns the FLOPs of an optimised program's products, a loop's body as often as it runs.

    Args:
      text: of the program.
      times: how often a loop runs whose end is known on the device alone, given the sizes of its products' results;
        where there is none, such a loop is an error.

    Raises:
      Uncounted: a loop without a count.
      ValueError: a product that is a library's call.
    """
    computations, entry = hlo.parse(text)

    def count(name: str) -> tuple[float, set[int]]:
        total, sizes = 0.0, set()
        for line in computations[name].values():
            if line.opcode == "dot":
                [(_, _, left)] = hlo.arrays(computations[name][line.operands[0]].type)
                [(_, _, out)] = hlo.arrays(line.type)
                contracted = line.rest.partition("lhs_contracting_dims={")[2].partition("}")[0]
                total += 2 * math.prod(out) * math.prod(left[int(i)] for i in contracted.split(","))
                sizes |= set(out)
            elif line.opcode == "custom-call" and "gemm" in line.rest:
                raise ValueError(f"{line.name} is a product by a library, which is not counted.")
            elif what := {"while": "body", "call": "to_apply", "fusion": "calls"}.get(line.opcode):
                flops, found = count(loops.called(line, what))
                if line.opcode == "while" and flops:
                    try:
                        flops *= loops.trips(computations, name, line)
                    except loops.Uncounted:
                        if times is None:
                            raise
                        flops *= times(found)
                total, sizes = total + flops, sizes | found
        return total, sizes

    return count(entry)[0]
