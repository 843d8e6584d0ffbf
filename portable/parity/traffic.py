"""How many bytes a compiled program moves to and from the device's memory.

XLA's own figure, "bytes accessed", counts every operand and result alike. A TPU's compiler keeps many arrays in its
VMEM and fetches others into it ahead of their use; here an array counts where it lies in the device's memory, and a
fetch counts once. Nothing is known of the caches of other devices: what they save is counted.
"""

import re

from portable.parity import loops
from portable.parity.hlo import Computations, Instruction, arrays, parse

# On chip: XLA writes the memory space behind an array's layout, S(1) for VMEM and others for registers and flags.
_ELSEWHERE = re.compile(r"[a-z]+\d*\w*\[[\d,]*\]\{[^}]*S\(\d+\)[^}]*\}")
_VIEWS = ("bitcast", "reshape", "copy", "convert")  # inside a fusion
_SLICES = ("dynamic-slice", "slice", "gather")
_NOTHING = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "iota", "opt-barrier")


def accessed(hlo: str) -> int:
    """Returns the bytes read from and written to the device's memory, loops as often as they run.

    Raises:
      loops.Uncounted: a loop's number of iterations is not found.
    """
    computations, entry = parse(hlo)
    return _accessed(computations, entry)


def _accessed(computations: Computations, name: str) -> int:
    total, inside = 0, computations[name]
    for line in inside.values():
        if line.opcode == "while":
            total += loops.trips(computations, name, line) * _accessed(computations, loops.called(line, "body"))
        elif line.opcode == "call":
            total += _accessed(computations, loops.called(line, "to_apply"))
        elif line.opcode == "conditional":
            total += max(_accessed(computations, branch) for branch in loops.branches(line))
        elif line.opcode.endswith("-start"):
            total += _moved(inside, line)
        elif line.opcode not in _NOTHING and not line.opcode.endswith("-done"):
            total += _fused(computations, inside, line) if line.opcode == "fusion" else _each(inside, line)
    return total


def _size(type: str) -> int:
    """The bytes of a type's arrays that lie in the device's memory."""
    return sum(size for size, *_ in arrays(_ELSEWHERE.sub("", type)))


def _moved(inside: dict[str, Instruction], line: Instruction) -> int:
    """An asynchronous copy or slice; its type is (result, operand, ...) or ((operand), result, ...)."""
    parts = re.findall(r"[a-z]+\d*\w*\[[\d,]+\](?:\{[^}]*\})?", line.type)
    if len(parts) < 2:
        return 0
    target = parts[0] if line.opcode == "copy-start" else parts[1]
    size = sum(size for size, *_ in arrays(target))
    read = size if line.operands and _size(inside[line.operands[0]].type) else 0
    return read + (size if _size(target) else 0)


def _each(inside: dict[str, Instruction], line: Instruction) -> int:
    written = _size(line.type)
    if line.opcode in _SLICES:
        return 2 * written
    if line.opcode == "dynamic-update-slice":
        return 2 * _size(inside[line.operands[1]].type)
    return written + sum(_size(inside[o].type) for o in line.operands if o in inside)


def _fused(computations: Computations, inside: dict[str, Instruction], line: Instruction) -> int:
    body = computations[loops.called(line, "calls")]
    users: dict[str, list[Instruction]] = {}
    for inner in body.values():
        for operand in inner.operands:
            users.setdefault(operand, []).append(inner)
    total = _size(line.type)
    parameters = {int(x.rest.partition(")")[0]): x.name for x in body.values() if x.opcode == "parameter"}
    for number, operand in enumerate(line.operands):
        size = _size(inside[operand].type) if operand in inside else 0
        if not size or number not in parameters:
            continue
        parts = _parts(body, users, parameters[number])
        if parts is None:
            total += size
            continue
        read, replaced = parts
        total += min(size, read)
        if replaced:  # written in place: the result has this operand's buffer, of which one slice is written
            total += replaced - min(size, _size(line.type))
    return max(total, 0)


def _parts(body: dict[str, Instruction], users: dict[str, list[Instruction]], name: str) -> tuple[int, int] | None:
    """Returns what is read of a fusion's operand in slices, and what is written over it; None if all is used."""
    read = replaced = 0
    for user in users.get(name, []):
        if user.opcode in _VIEWS:
            inner = _parts(body, users, user.name)
            if inner is None:
                return None
            read, replaced = read + inner[0], replaced + inner[1]
        elif user.opcode in _SLICES and user.operands[0] == name:
            read += sum(size for size, *_ in arrays(user.type))
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == name:
            replaced += sum(size for size, *_ in arrays(body[user.operands[1]].type))
        else:
            return None
    return read, replaced
