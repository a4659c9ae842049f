"""Read the PTX that Triton emits into a list of instructions: one kernel, its parameters, its labels resolved."""

import re
from typing import NamedTuple

_LABEL = re.compile(r"^\s*(\$[\w$]+):", re.MULTILINE)
_STATEMENT = re.compile(r"^(?:@(!?)(%\w+)\s+)?([a-z][\w.:]*)\s*(.*)$", re.DOTALL)
_OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,{}\[\]]+")


class Instruction(NamedTuple):
    opcode: tuple[str, ...]
    """The name and its qualifiers: ``("ld", "global", "v4", "b32")``."""
    operands: tuple[str | tuple[str, ...], ...]
    """As written; a vector in braces is a tuple, an address keeps its brackets."""
    guard: str | None
    """The predicate register of ``@%p``."""
    negated: bool
    text: str


class Program(NamedTuple):
    name: str
    parameters: tuple[str, ...]
    registers: dict[str, int]
    """Register prefix (``%r``) to width in bits; predicates are 1 wide."""
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]
    """Label to the index of the instruction that follows it."""


def parse(ptx: str) -> Program:
    """The one kernel of a PTX module.

    Raises:
        ValueError: no kernel, or a statement that is not understood.
    """
    text = re.sub(r"//[^\n]*", "", ptx)
    entry = re.search(r"\.entry\s+(\w+)\s*\((.*?)\)[^{]*\{", text, re.DOTALL)
    if entry is None:
        raise ValueError("no .entry in this PTX")
    parameters = tuple(re.findall(r"(\w+_param_\d+)", entry[2]))
    body = _block(text, entry.end())
    registers = {prefix: 1 if kind == "pred" else int(kind[1:]) for kind, prefix in _declared(body)}
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for raw in _LABEL.sub(r"\1:;", body).split(";"):
        statement = re.sub(r"^\s*\.loc[^\n]*$", "", raw, flags=re.MULTILINE).strip()
        if statement.endswith(":"):
            labels[statement[:-1]] = len(instructions)
        elif statement and not statement.startswith("."):
            instructions.append(_instruction(statement))
    return Program(entry[1], parameters, registers, tuple(instructions), labels)


def _block(text: str, start: int) -> str:
    depth = 1
    for at in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        if depth == 0:
            return text[start:at]
    raise ValueError("the kernel's body does not end")


def _declared(body: str) -> list[tuple[str, str]]:
    return re.findall(r"\.reg\s+\.(\w+)\s+(%[a-z]+)<\d+>", body)


def _instruction(statement: str) -> Instruction:
    match = _STATEMENT.match(statement)
    if match is None:
        raise ValueError(f"not understood: {statement!r}")
    negated, guard, opcode, rest = match.groups()
    operands = []
    for operand in _OPERAND.findall(rest):
        operand = operand.strip()
        if operand.startswith("{"):
            operands.append(tuple(part.strip() for part in operand[1:-1].split(",")))
        elif operand:
            operands.append(operand)
    return Instruction(tuple(opcode.split(".")), tuple(operands), guard, bool(negated), " ".join(statement.split()))
