"""The time that a TPU's compiler expects a program to take, loops counted as often as they run.

libtpu writes `estimated_cycles` beside every fusion of the optimised program: what its own cost model made of the
schedule it chose. The sum is a lower bound in kind: it does not see copies between HBM and VMEM that the schedule hides
or fails to hide, work outside fusions (most custom calls, Pallas kernels among them), nor the start of a program. XLA's
CUDA compiler writes no such figure.
"""

import re

from portable.parity import loops
from portable.parity.hlo import Computations, Instruction, parse
from portable.parity.loops import Uncounted
from portable.parity.targets import Target

_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')


def seconds(target: Target, hlo: str) -> float | None:
    """Returns the estimated time of an optimised program on a TPU; None for another compiler's.

    Raises:
      Uncounted: a loop's number of iterations is not found, or a kernel without an estimate is called.
    """
    if target.family != "tpu" or target.clock is None:
        return None
    return cycles(hlo) / target.clock


def cycles(hlo: str) -> int:
    """Returns the estimated cycles of a program; see `seconds`."""
    computations, entry = parse(hlo)
    return _cycles(computations, entry)


def breakdown(hlo: str) -> dict[str, int]:
    """Returns the estimated cycles by the operation in the source, the largest first."""
    computations, entry = parse(hlo)
    found: dict[str, int] = {}
    _cycles(computations, entry, found=found)
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def _cycles(computations: Computations, name: str, times: int = 1, found: dict[str, int] | None = None) -> int:
    total = 0
    for line in computations[name].values():
        if line.opcode == "while":
            trips = times * loops.trips(computations, name, line)
            total += _cycles(computations, loops.called(line, "body"), trips, found)
        elif line.opcode == "call":
            total += _cycles(computations, loops.called(line, "to_apply"), times, found)
        elif line.opcode == "conditional":
            total += max(_cycles(computations, branch, times) for branch in loops.branches(line))
        elif cycles := _CYCLES.search(line.rest):
            total += times * int(cycles[1])
            if found is not None:
                source = re.search(r'op_name="([^"]*)"', line.rest)
                label = source[1] if source else line.name
                found[label] = found.get(label, 0) + times * int(cycles[1])
        if "tpu_custom_call" in line.rest or _holds_kernel(computations, line):
            raise Uncounted("a Pallas kernel, of which the compiler gives no estimate")
    return total


def _holds_kernel(computations: Computations, line: Instruction) -> bool:
    called = re.search(r"calls=%([\w.\-]+)", line.rest) if line.opcode == "fusion" else None
    return bool(called) and any("tpu_custom_call" in inner.rest for inner in computations[called[1]].values())
