"""How often the loops of a compiled program run."""

import re

from portable.parity.hlo import Computations, Instruction

_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_SAME = ("copy", "bitcast", "copy-done", "reshape")  # the value is its first operand's


class Uncounted(ValueError):
    """The estimate cannot be made; the message names what it does not see."""


def called(line: Instruction, what: str) -> str:
    """Returns the computation that an instruction names as its `what`."""
    found = re.search(rf"\b{what}=%?([\w.\-]+)", line.rest)
    if found is None:
        raise Uncounted(f"the {what} of {line.name}")
    return found[1]


def branches(line: Instruction) -> list[str]:
    """Returns the names of a conditional's branches."""
    found = re.findall(r"%([\w.\-]+)", line.rest.partition("branch_computations={")[2].partition("}")[0])
    return found or [called(line, f"{which}_computation") for which in ("true", "false")]


def trips(computations: Computations, name: str, loop: Instruction) -> int:
    """Returns how often a loop runs: from its start to its bound, by ones.

    Raises:
      Uncounted: it may end for another reason, counts otherwise, or its bound is not in the program.
    """
    if known := _TRIPS.search(loop.rest):
        return int(known[1])
    unknown = Uncounted(f"how often the loop {loop.name} runs")
    condition, body = (computations[called(loop, what)] for what in ("condition", "body"))
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
        inner = computations[called(test, "calls")]
        root = next((line for line in inner.values() if line.root), None)
        compared = None if root is None else _origin(inner, root.name)
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


def _step(computations: Computations, body: dict[str, Instruction], result: Instruction, index: int) -> int | None:
    """Returns by how much a loop's body raises its counter."""
    line, inside = _origin(body, result.operands[index]), body
    passed: dict[str, str] = {}  # a fusion's parameters, by the operands they stand for
    if line.opcode == "fusion":
        inside = computations[called(line, "calls")]
        for inner in inside.values():
            if inner.opcode == "parameter":
                passed[inner.name] = line.operands[int(inner.rest.partition(")")[0])]
        line = _origin(inside, next(x for x in inside.values() if x.root).name)
    if line.opcode != "add":
        return None
    step, counts = None, False
    for operand in line.operands:
        found = _origin(inside, operand)
        if found.name in passed:
            found = _origin(body, passed[found.name])
        number = re.match(r"(-?\d+)\)", found.rest) if found.opcode == "constant" else None
        if number:
            step = int(number[1])
        elif found.opcode == "get-tuple-element":
            counts = _index(found) == index
    return step if counts else None


def _origin(inside: dict, name: str) -> Instruction:
    line = inside[name]
    while line.opcode in _SAME and line.operands:
        line = inside[line.operands[0]]
    return line


def _index(line: Instruction) -> int:
    found = re.search(r"index=(\d+)", line.rest)
    assert found is not None  # every get-tuple-element has one
    return int(found[1])
