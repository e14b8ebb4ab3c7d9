"""PTX text to instructions: one entry point, its parameters, labels, registers and shared memory.

Only the shape of the language is known here (ISA section 4); what an instruction means is the emulator's business.
"""

import re
from dataclasses import dataclass

SIZES = {"8": 1, "16": 2, "32": 4, "64": 8}


@dataclass(frozen=True)
class Instruction:
    name: str
    """The part before the first dot: `ld` of `ld.global.v4.b32`."""
    modifiers: tuple[str, ...]
    operands: tuple[str, ...]
    """Registers, numbers, labels, `[addresses]` and `{vectors}`, as written."""
    guard: str | None
    """Register of the predicate under which it runs."""
    negated: bool
    text: str

    @property
    def type(self) -> str:
        return self.modifiers[-1]


@dataclass(frozen=True)
class Program:
    name: str
    target: str
    threads: int
    """Threads of a block."""
    parameters: tuple[tuple[str, str], ...]
    """(type, name) in order."""
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]
    registers: dict[str, int]
    """Prefix of the name, `%rd`, -> bytes; 0 for predicates."""
    shared: dict[str, int]
    """Symbol -> address in shared memory."""


def parse(ptx: str) -> Program:
    ptx = re.sub(r"//[^\n]*", "", ptx)
    name = _only(r"\.entry\s+([\w$]+)", ptx)
    header, body = ptx[ptx.index(".entry") :].split("{", 1)
    parameters = tuple(re.findall(r"\.param\s+\.(\w+)[^,)]*?([\w$]+)\s*(?=[,)])", header))
    registers = {
        prefix: 0 if kind == "pred" else SIZES[kind[1:]]
        for kind, prefix in re.findall(r"\.reg\s+\.(\w+)\s+(%?[A-Za-z]+)", body)
    }
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for statement in _statements(body):
        while label := re.match(r"([$\w]+):\s*", statement):
            labels[label[1]] = len(instructions)
            statement = statement[label.end() :]
        if statement and not statement.startswith("."):
            instructions.append(_instruction(statement))
    return Program(
        name=name,
        target=_only(r"\.target\s+(\w+)", ptx),
        threads=int(_only(r"\.reqntid\s+(\d+)", header)),
        parameters=parameters,
        instructions=tuple(instructions),
        labels=labels,
        registers=registers,
        shared=_shared(ptx),
    )


def _only(pattern: str, text: str) -> str:
    found = re.findall(pattern, text)
    if len(found) != 1:
        raise NotImplementedError(f"{pattern!r} occurs {len(found)} times: the parser knows modules of one kernel.")
    return found[0]


def _statements(body: str) -> list[str]:
    """What ends in `;`, with the labels before it. Directives of debugging end at their line; braces of scopes go."""
    body = re.sub(r"^\s*\.(loc|file|pragma)[^\n]*$", "", body, flags=re.MULTILINE)
    end = re.search(r"^}", body, flags=re.MULTILINE)
    body = body[: end.start()] if end else body
    body = re.sub(r"^\s*[{}]\s*$", "", body, flags=re.MULTILINE)
    *statements, rest = (" ".join(statement.split()) for statement in body.split(";"))
    return [*statements, rest] if rest else statements  # labels at the very end


def _instruction(text: str) -> Instruction:
    guard = re.match(r"@(!?)(%?\w+)\s+", text)
    opcode, _, rest = text[guard.end() if guard else 0 :].partition(" ")
    name, *modifiers = opcode.split(".")
    operands = tuple(operand.strip() for operand in re.findall(r"(?:\[[^]]*\]|\{[^}]*\}|\([^)]*\)|[^,\[{(])+", rest))
    return Instruction(name, tuple(modifiers), operands, guard[2] if guard else None, bool(guard and guard[1]), text)


def _shared(ptx: str) -> dict[str, int]:
    """Statically sized symbols one after another; the dynamic one, `[]`, behind them."""
    declared = re.findall(r"\.shared\s+(?:\.align\s+(\d+)\s+)?\.b(\d+)\s+([\w$]+)(?:\[(\d*)\])?\s*;", ptx)
    addresses, end = {}, 0
    for align, bits, symbol, count in sorted(declared, key=lambda found: found[3] == ""):
        step = int(align or SIZES[bits])
        addresses[symbol] = -(-end // step) * step
        end = addresses[symbol] + SIZES[bits] * int(count or 0)
    return addresses
