"""The time that a TPU's compiler expects a program to take, loops counted as often as they run.

libtpu writes `estimated_cycles` beside every fusion of the optimised program: what its own cost model made of the
schedule it chose. The sum is a lower bound in kind: it does not see copies between HBM and VMEM that the schedule hides
or fails to hide, work outside fusions (most custom calls, Pallas kernels among them), nor the start of a program. XLA's
CUDA compiler writes no such figure.
"""

import re
from typing import NamedTuple

from portable.parity.targets import Target

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.+?) ([a-z][\w\-]*)\((.*)$")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_SAME = ("copy", "bitcast", "copy-done", "reshape")  # the value is its first operand's


class Uncounted(ValueError):
    """The estimate cannot be made; the message names what it does not see."""


class Instruction(NamedTuple):
    """One line of a program."""

    name: str
    opcode: str
    operands: tuple[str, ...]
    rest: str
    root: bool


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
    computations, entry = _parse(hlo)
    return _cycles(computations, entry)


def breakdown(hlo: str) -> dict[str, int]:
    """Returns the estimated cycles by the operation in the source, the largest first."""
    computations, entry = _parse(hlo)
    found: dict[str, int] = {}
    _cycles(computations, entry, found=found)
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def _parse(hlo: str) -> tuple[dict[str, dict[str, Instruction]], str]:
    computations: dict[str, dict[str, Instruction]] = {}
    entry, inside = "", {}
    for line in hlo.splitlines():
        if head := _COMPUTATION.match(line):
            inside = computations.setdefault(head[2], {})
            entry = head[2] if head[1] else entry
        elif found := _INSTRUCTION.match(line):
            operands = tuple(re.findall(r"%([\w.\-]+)", found[5].partition(")")[0]))
            inside[found[2]] = Instruction(found[2], found[4], operands, found[5], bool(found[1]))
    if not entry:
        raise ValueError("this is not the text of an optimised program: it has no ENTRY.")
    return computations, entry


def _cycles(computations: dict, name: str, times: int = 1, found: dict[str, int] | None = None) -> int:
    total = 0
    for line in computations[name].values():
        if line.opcode == "while":
            trips = times * _trips(computations, name, line)
            total += _cycles(computations, _called(line, "body"), trips, found)
        elif line.opcode == "call":
            total += _cycles(computations, _called(line, "to_apply"), times, found)
        elif line.opcode == "conditional":
            branches = re.findall(r"%([\w.\-]+)", line.rest.partition("branch_computations={")[2].partition("}")[0])
            branches = branches or [_called(line, f"{which}_computation") for which in ("true", "false")]
            total += max(_cycles(computations, branch, times) for branch in branches)
        elif cycles := _CYCLES.search(line.rest):
            total += times * int(cycles[1])
            if found is not None:
                source = re.search(r'op_name="([^"]*)"', line.rest)
                label = source[1] if source else line.name
                found[label] = found.get(label, 0) + times * int(cycles[1])
        if "tpu_custom_call" in line.rest or _holds_kernel(computations, line):
            raise Uncounted("a Pallas kernel, of which the compiler gives no estimate")
    return total


def _holds_kernel(computations: dict, line: Instruction) -> bool:
    called = re.search(r"calls=%([\w.\-]+)", line.rest) if line.opcode == "fusion" else None
    return bool(called) and any("tpu_custom_call" in inner.rest for inner in computations[called[1]].values())


def _called(line: Instruction, what: str) -> str:
    found = re.search(rf"\b{what}=%?([\w.\-]+)", line.rest)
    if found is None:
        raise Uncounted(f"the {what} of {line.name}")
    return found[1]


def _trips(computations: dict, name: str, loop: Instruction) -> int:
    """Returns how often a loop runs: from start to bound by the step of its counter."""
    if known := _TRIPS.search(loop.rest):
        return int(known[1])
    unknown = Uncounted(f"how often the loop {loop.name} runs")
    condition, body = (computations[_called(loop, what)] for what in ("condition", "body"))
    start = computations[name].get(loop.operands[0])
    result = next((line for line in body.values() if line.root), None)
    if start is None or result is None or start.opcode != "tuple" or result.opcode != "tuple":
        raise unknown

    def constant(inside: dict, operand: str) -> int | None:
        line = _origin(inside, operand)
        if line.opcode == "constant":
            number = re.match(r"(-?\d+)\)", line.rest)
            return int(number[1]) if number else None
        if line.opcode == "get-tuple-element" and inside is condition:
            carried = _origin(body, result.operands[_index(line)])
            if carried.opcode == "get-tuple-element" and _index(carried) == _index(line):  # unchanged by the loop
                return constant(computations[name], start.operands[_index(line)])
        return None

    test = next((line for line in condition.values() if line.root), None)
    if test is not None and test.opcode == "fusion":
        inner = computations[_called(test, "calls")]
        compared = next((line for line in inner.values() if line.opcode == "compare"), None)
        if compared is None:
            raise unknown
        parameters = {
            line.name: test.operands[int(line.rest.partition(")")[0])]
            for line in inner.values() if line.opcode == "parameter"
        }  # fmt: skip
        sides = [parameters.get(_origin(inner, o).name, o) for o in compared.operands]
        inside = [condition if o in condition else inner for o in sides]
        test = compared
    elif test is not None:
        sides, inside = list(test.operands), [condition, condition]
    if test is None or test.opcode != "compare" or "direction=LT" not in test.rest:
        raise unknown
    counter = _origin(inside[0], sides[0])
    bound = constant(inside[1], sides[1])
    if counter.opcode != "get-tuple-element" or bound is None:
        raise unknown
    first = constant(computations[name], start.operands[_index(counter)])
    if first is None or _step(computations, body, result, _index(counter)) != 1:
        raise unknown
    return max(0, bound - first)


def _step(computations: dict, body: dict, result: Instruction, index: int) -> int | None:
    """Returns by how much a loop's body raises its counter."""
    line = _origin(body, result.operands[index])
    inside = body
    if line.opcode == "fusion":
        inside = computations[_called(line, "calls")]
        line = next(x for x in inside.values() if x.root)
    if line.opcode != "add":
        return None
    for operand in line.operands:
        number = _origin(inside, operand)
        if number.opcode == "constant" and (found := re.match(r"(-?\d+)\)", number.rest)):
            return int(found[1])
    return None


def _origin(inside: dict, name: str) -> Instruction:
    line = inside[name]
    while line.opcode in _SAME and line.operands:
        line = inside[line.operands[0]]
    return line


def _index(line: Instruction) -> int:
    found = re.search(r"index=(\d+)", line.rest)
    assert found is not None  # every get-tuple-element has one
    return int(found[1])
