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


def _here(inside: dict[str, Instruction], name: str) -> bool:
    return name in inside and bool(_size(inside[name].type))


def _moved(inside: dict[str, Instruction], line: Instruction) -> int:
    """An asynchronous copy or slice; its type is (result, operand, ...) or ((operands), result, ...)."""
    parts = re.findall(r"[a-z]+\d*\w*\[[\d,]+\](?:\{[^}]*\})?", line.type)
    if len(parts) < 2:
        return 0
    bare = re.sub(r"\{[^}]*\}", "", line.type)
    operands = bare[2:].partition(")")[0].count("[") if bare.startswith("((") else 0
    target = parts[min(operands, len(parts) - 1)]
    size = sum(size for size, *_ in arrays(target))
    return size * (_here(inside, line.operands[0]) + bool(_size(target)))


def _each(inside: dict[str, Instruction], line: Instruction) -> int:
    """An instruction that is no fusion: its operands and its result, of a slice the slice alone."""
    if line.opcode in _SLICES:
        size = sum(size for size, *_ in arrays(line.type))
        return size * (_here(inside, line.operands[0]) + bool(_size(line.type)))
    if line.opcode == "dynamic-update-slice":
        update = line.operands[1]
        size = sum(size for size, *_ in arrays(inside[update].type))
        return size * (_here(inside, update) + bool(_size(line.type)))
    return _size(line.type) + sum(_size(inside[o].type) for o in line.operands if o in inside)


def _fused(computations: Computations, inside: dict[str, Instruction], line: Instruction) -> int:
    body = computations[loops.called(line, "calls")]
    total = _size(line.type)
    parameters = {int(x.rest.partition(")")[0]): x.name for x in body.values() if x.opcode == "parameter"}
    for number, operand in enumerate(line.operands):
        size = _size(inside[operand].type) if operand in inside else 0
        if not size or number not in parameters:
            continue
        parts = _parts(computations, body, parameters[number])
        if parts is None:
            total += size
            continue
        read, replaced = parts
        total += min(size, read)
        if replaced:  # written in place: the result has this operand's buffer, of which one slice is written
            total += replaced - min(size, _size(line.type))
    return max(total, 0)


def _parts(computations: Computations, body: dict[str, Instruction], name: str) -> tuple[int, int] | None:
    """Returns what is read of a fusion's operand in slices, and what is written over it; None if all is used."""
    if body[name].root:  # all of it goes on
        return None
    read = replaced = 0
    for user in body.values():
        if name not in user.operands:
            continue
        inner: tuple[int, int] | None = None
        if user.opcode in _VIEWS:
            inner = _parts(computations, body, user.name)
        elif user.opcode == "fusion":  # of a fusion
            inside = computations[loops.called(user, "calls")]
            number = user.operands.index(name)
            parameter = next(
                x.name for x in inside.values() if x.opcode == "parameter" and x.rest.startswith(f"{number})")
            )
            inner = _parts(computations, inside, parameter)
        elif user.opcode in _SLICES and user.operands[0] == name:
            inner = sum(size for size, *_ in arrays(user.type)), 0
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == name:
            inner = 0, sum(size for size, *_ in arrays(body[user.operands[1]].type))
        if inner is None:
            return None
        read, replaced = read + inner[0], replaced + inner[1]
    return read, replaced
