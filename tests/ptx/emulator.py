"""Runs PTX on a CPU, one thread block after another, every thread of a block in lock-step as one numpy vector.

It shows what compiled code computes and touches, not how long it takes:

1. Registers hold bits, as in PTX; an instruction's type says how to read them. Arithmetic is that of IEEE float32.
2. Memory is checked and counted by `memory.py`.
3. An instruction, modifier or operand that is not known raises: nothing is passed over.

Left out: threads of a block that part at a branch (Triton predicates instead), asynchronous copies, tensor cores. The
order of threads is fixed, `fma` rounds twice in rare ties (it goes through float64), `div.full` is exact, and ptxas,
which makes machine code of PTX, is trusted.
"""

import operator
import re
from collections.abc import Callable, Sequence

import numpy as np
from memory import WARP, GlobalMemory, SharedMemory
from parser import Instruction, Program, parse

SHARED_BYTES = 1 << 16
BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
TYPES = {
    **{f"{kind}{8 * size}": np.dtype(bits) for size, bits in BITS.items() for kind in "bu"},
    **{f"s{8 * size}": np.dtype(f"i{size}") for size in BITS},
    "f16": np.dtype(np.float16),
    "f32": np.dtype(np.float32),
    "f64": np.dtype(np.float64),
}
CANONICAL_NAN = np.uint32(0x7FFFFFFF).view(np.float32)
COMPARISONS = {
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
}

Handler = Callable[["Block", Instruction], None]
HANDLERS: dict[str, Handler] = {}


class Runaway(RuntimeError):
    """More instructions than the caller allowed."""


def run(
    ptx: str | Program,
    memory: GlobalMemory,
    arguments: Sequence[int | float],
    grid: tuple[int, ...],
    limit: int = 10_000_000,
) -> int:
    """Run every block of a grid; returns the instructions executed per warp. Pointers are addresses of `memory`."""
    program = parse(ptx) if isinstance(ptx, str) else ptx
    if len(arguments) != len(program.parameters):
        raise ValueError(f"{len(arguments)} arguments, but {program.name} has {len(program.parameters)} parameters.")
    executed = 0
    for index in np.ndindex(*grid):
        block = Block(program, memory, arguments, index)
        executed += block.run(limit - executed)
    return executed


def handles(*names: str) -> Callable[[Handler], Handler]:
    def register(handler: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(names, handler))
        return handler

    return register


class Block:
    def __init__(
        self, program: Program, memory: GlobalMemory, arguments: Sequence[int | float], index: tuple[int, ...]
    ) -> None:
        self.program, self.memory = program, memory
        self.shared = SharedMemory(SHARED_BYTES)
        self.parameters = {
            name: np.full(program.threads, argument, TYPES[kind])
            for (kind, name), argument in zip(program.parameters, arguments, strict=True)
        }
        threads = np.arange(program.threads, dtype=np.uint32)
        self.warps = (threads // WARP).astype(np.int64)
        self.everyone = np.ones(program.threads, bool)
        self.special = {"%tid.x": threads, "%laneid": threads % WARP, "%ntid.x": self._constant(program.threads)}
        for axis, place in zip("xyz", (*index, 0, 0), strict=False):
            self.special[f"%ctaid.{axis}"] = self._constant(place)
        self.registers: dict[str, np.ndarray] = {}
        self.next = 0

    def run(self, limit: int) -> int:
        instructions = self.program.instructions
        executed = 0
        with np.errstate(all="ignore"):
            while self.next < len(instructions):
                instruction = instructions[self.next]
                self.next += 1
                executed += 1
                if executed > limit:
                    raise Runaway(f"still running after {limit} instructions")
                if instruction.name not in HANDLERS:
                    raise NotImplementedError(instruction.text)
                self.active = self._guard(instruction)
                HANDLERS[instruction.name](self, instruction)
        return executed

    def _constant(self, number: int) -> np.ndarray:
        return np.full(self.program.threads, number, np.uint32)

    def _guard(self, instruction: Instruction) -> np.ndarray:
        if instruction.guard is None:
            return self.everyone
        predicate = self.registers[instruction.guard]
        return ~predicate if instruction.negated else predicate

    def jump(self, label: str) -> None:
        if self.active.all():
            self.next = self.program.labels[label]
        elif self.active.any():
            raise NotImplementedError(f"the threads of a block part at the branch to {label}")

    def bytes_of(self, register: str) -> int:
        return self.program.registers[register.rstrip("0123456789")]

    def read(self, operand: str, kind: str) -> np.ndarray:
        """The numbers of an operand, one per thread; packed types give (threads, 2), bf16 comes as float32."""
        if kind == "pred":
            return self.registers[operand] if operand in self.registers else self.everyone & bool(int(operand))
        if kind == "bf16":
            return (self.read(operand, "b16").astype(np.uint32) << np.uint32(16)).view(np.float32)
        if kind.endswith("x2"):
            return self.read(operand, f"b{2 * int(kind[1:-2])}").view(TYPES[kind[:-2]]).reshape(-1, 2)
        wanted = TYPES[kind]
        if operand.startswith("{"):
            parts = _vector(operand)
            piece = f"b{8 * wanted.itemsize // len(parts)}"
            return np.stack([self.read(part, piece) for part in parts], axis=1).view(wanted).reshape(-1)
        bits = self._bits(operand, wanted.itemsize)
        if bits.itemsize < wanted.itemsize:
            raise NotImplementedError(f"{operand} has {bits.itemsize} bytes, but is read as {kind}")
        return bits.astype(BITS[wanted.itemsize]).view(wanted)

    def _bits(self, operand: str, size: int) -> np.ndarray:
        if operand in self.special:
            return self.special[operand]
        if operand in self.registers:
            return self.registers[operand]
        if operand.startswith("%"):
            # undefined in PTX too, and legal where the result is not used: a pattern that is NaN in every type
            return np.full(self.program.threads, 0x7FF8BAD17FF87FBA & (1 << 8 * self.bytes_of(operand)) - 1, BITS[size])
        if operand[:2] in ("0f", "0F"):
            return self._constant(int(operand[2:], 16))
        if operand in self.program.shared:
            return np.full(self.program.threads, self.program.shared[operand], BITS[size])
        number = int(operand.rstrip("U"), 0)
        return np.full(self.program.threads, number & (1 << 8 * size) - 1, BITS[size])

    def write(self, register: str, numbers: np.ndarray) -> None:
        """Into a register of the active threads; integers of another width are extended or cut, floats must fit."""
        if register.startswith("{"):
            parts = _vector(register)
            pieces = np.ascontiguousarray(numbers).view(BITS[numbers.itemsize // len(parts)])
            for part, piece in zip(parts, pieces.reshape(-1, len(parts)).T, strict=True):
                self.write(part, piece)
            return
        if register == "_":
            return
        size = self.bytes_of(register)
        if size and numbers.ndim == 2:  # packed
            numbers = np.ascontiguousarray(numbers).view(BITS[size]).reshape(-1)
        if size and numbers.itemsize != size:
            if numbers.dtype.kind == "f":
                raise NotImplementedError(f"{numbers.dtype} into {register}, which has {size} bytes")
            numbers = numbers.astype(f"{numbers.dtype.kind}{size}")
        bits = np.ascontiguousarray(numbers).view(BITS[size]) if size else numbers.astype(bool)
        if not self.active.all():
            before = self.registers.get(register)
            bits = np.where(self.active, bits, np.zeros_like(bits) if before is None else before)
        self.registers[register] = bits

    def addresses(self, operand: str) -> np.ndarray:
        found = re.fullmatch(r"\[\s*([%$\w]+)\s*(?:\+\s*(-?\d+))?\s*\]", operand)
        if not found:
            raise NotImplementedError(f"the address {operand}")
        size = self.bytes_of(found[1]) if found[1].startswith("%") else 4
        return self.read(found[1], f"s{8 * size}").astype(np.int64) + int(found[2] or 0)


def _vector(operand: str) -> list[str]:
    return [part.strip() for part in operand.strip("{} ").split(",")]


def _only(instruction: Instruction, *known: str) -> None:
    """Refuse modifiers, between the name and the type, that the handler would ignore."""
    if unknown := set(instruction.modifiers[:-1]) - set(known):
        raise NotImplementedError(f"{instruction.text}: {', '.join(sorted(unknown))}")


@handles("bra")
def _branch(block: Block, instruction: Instruction) -> None:
    block.jump(instruction.operands[-1])


@handles("ret")
def _return(block: Block, instruction: Instruction) -> None:
    if not block.active.all():
        raise NotImplementedError("some threads of a block return before others")
    block.next = len(block.program.instructions)


@handles("bar")
def _barrier(block: Block, instruction: Instruction) -> None:
    if instruction.modifiers != ("sync",) or instruction.operands != ("0",) or not block.active.all():
        raise NotImplementedError(instruction.text)
    block.shared.barrier()


@handles("mov", "cvta")
def _move(block: Block, instruction: Instruction) -> None:
    destination, source = instruction.operands
    block.write(destination, block.read(source, instruction.type))


@handles("ld")
def _load(block: Block, instruction: Instruction) -> None:
    space = instruction.modifiers[0].partition("::")[0]
    registers, size = _access(instruction, instruction.operands[0])
    if space == "param":
        parameter = block.parameters[instruction.operands[1].strip("[] ")]
        block.write(registers[0], parameter.view(TYPES[instruction.type]))
        return
    lanes = np.flatnonzero(block.active)
    if not len(lanes):
        return
    memory = {"global": block.memory, "shared": block.shared}[space]
    data = memory.load(block.addresses(instruction.operands[1])[lanes], size * len(registers), block.warps[lanes])
    pieces = np.ascontiguousarray(data).view(TYPES[instruction.type])
    for register, piece in zip(registers, pieces.T, strict=True):
        numbers = np.zeros(block.program.threads, piece.dtype)
        numbers[lanes] = piece
        block.write(register, numbers)


@handles("st")
def _store(block: Block, instruction: Instruction) -> None:
    space = instruction.modifiers[0].partition("::")[0]
    registers, size = _access(instruction, instruction.operands[1])
    lanes = np.flatnonzero(block.active)
    if not len(lanes):
        return
    memory = {"global": block.memory, "shared": block.shared}[space]
    numbers = np.stack([block.read(register, f"b{8 * size}")[lanes] for register in registers], axis=1)
    memory.store(block.addresses(instruction.operands[0])[lanes], numbers.view(np.uint8), block.warps[lanes])


def _access(instruction: Instruction, operand: str) -> tuple[list[str], int]:
    """The registers of a load or store and the bytes of each."""
    _only(instruction, "global", "shared", "shared::cta", "param", "v2", "v4")
    registers = _vector(operand)
    vectors = [modifier for modifier in instruction.modifiers if modifier in ("v2", "v4")]
    if len(registers) != (int(vectors[0][1:]) if vectors else 1):
        raise NotImplementedError(instruction.text)
    return registers, TYPES[instruction.type].itemsize


@handles("shfl")
def _shuffle(block: Block, instruction: Instruction) -> None:
    mode = instruction.modifiers[1]
    destination, source, shift, clamp, members = instruction.operands
    if instruction.modifiers != ("sync", mode, "b32") or members not in ("-1", "0xffffffff"):
        raise NotImplementedError(instruction.text)
    if not block.active.all():
        raise NotImplementedError(f"{instruction.text} of some threads only")
    lane = np.arange(WARP)
    by, limits = (block.read(operand, "b32").astype(np.int64).reshape(-1, WARP) for operand in (shift, clamp))
    segment, bound = limits >> 8 & 31, limits & 31
    last = lane & segment | bound & ~segment
    by = by & 31
    if mode == "idx":
        source_lane = lane & segment | by & ~segment
    else:
        source_lane = {"up": lane - by, "down": lane + by, "bfly": lane ^ by}[mode]
    inside = source_lane >= last if mode == "up" else source_lane <= last
    numbers = block.read(source, "b32").reshape(-1, WARP)
    register, _, predicate = destination.partition("|")
    block.write(register, np.take_along_axis(numbers, np.where(inside, source_lane, lane), 1).reshape(-1))
    if predicate:
        block.write(predicate, inside.reshape(-1))


@handles("redux")
def _reduce_warp(block: Block, instruction: Instruction) -> None:
    destination, source, members = instruction.operands
    if instruction.modifiers != ("sync", "add", "s32") or not block.active.all():
        raise NotImplementedError(instruction.text)
    if (block.read(members, "b32") != 0xFFFFFFFF).any():
        raise NotImplementedError(f"{instruction.text} of some threads only")
    sums = block.read(source, "s32").reshape(-1, WARP).sum(1, dtype=np.int32)
    block.write(destination, np.repeat(sums, WARP))


@handles("selp")
def _select(block: Block, instruction: Instruction) -> None:
    destination, yes, no, predicate = instruction.operands
    kind = instruction.type
    block.write(destination, np.where(block.read(predicate, "pred"), block.read(yes, kind), block.read(no, kind)))


@handles("setp")
def _compare(block: Block, instruction: Instruction) -> None:
    comparison, kind = instruction.modifiers
    destination, left, right = instruction.operands
    a, b = block.read(left, kind), block.read(right, kind)
    if kind[0] == "f":
        unordered = np.isnan(a) | np.isnan(b)
        if comparison in ("num", "nan"):
            block.write(destination, unordered == (comparison == "nan"))
        elif comparison[-1] == "u" and comparison[:-1] in COMPARISONS:
            block.write(destination, COMPARISONS[comparison[:-1]](a, b) | unordered)
        else:
            block.write(destination, COMPARISONS[comparison](a, b) & ~unordered)
    else:
        unsigned = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
        block.write(destination, COMPARISONS[unsigned.get(comparison, comparison)](a, b))


@handles("and", "or", "xor", "not")
def _logic(block: Block, instruction: Instruction) -> None:
    destination, *sources = instruction.operands
    operations = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert}
    block.write(destination, operations[instruction.name](*(block.read(x, instruction.type) for x in sources)))


@handles("shl", "shr")
def _shift(block: Block, instruction: Instruction) -> None:
    destination, source, amount = instruction.operands
    numbers = block.read(source, instruction.type)
    by, width = block.read(amount, "u32"), 8 * numbers.itemsize
    moved = np.minimum(by, width - 1).astype(numbers.dtype)
    if instruction.name == "shr":
        shifted = numbers >> moved
        past = shifted if instruction.type[0] == "s" else np.zeros_like(numbers)  # an arithmetic shift keeps the sign
    else:
        shifted, past = numbers << moved, np.zeros_like(numbers)
    block.write(destination, np.where(by < width, shifted, past))


@handles("bfe")
def _extract(block: Block, instruction: Instruction) -> None:
    destination, *sources = instruction.operands
    if instruction.type != "u32":
        raise NotImplementedError(instruction.text)
    numbers, start, count = (block.read(source, "u32").astype(np.uint64) & mask for source, mask in
                             zip(sources, (0xFFFFFFFF, 0xFF, 0xFF), strict=True))  # fmt: skip
    ones = (np.uint64(1) << np.minimum(count, 32)) - np.uint64(1)
    block.write(destination, (numbers >> np.minimum(start, 32) & ones).astype(np.uint32))


@handles("prmt")
def _permute(block: Block, instruction: Instruction) -> None:
    destination, low, high, selector = instruction.operands
    if instruction.modifiers != ("b32",):
        raise NotImplementedError(instruction.text)
    eight = np.stack([block.read(low, "b32"), block.read(high, "b32")], axis=1).view(np.uint8)
    choice = block.read(selector, "b32")[:, None] >> np.arange(0, 16, 4, dtype=np.uint32)
    if (choice & 8).any():
        raise NotImplementedError(f"{instruction.text} replicates a sign")
    block.write(destination, np.take_along_axis(eight, (choice & 7).astype(np.int64), 1).view(np.uint32).reshape(-1))


@handles("popc")
def _count_ones(block: Block, instruction: Instruction) -> None:
    destination, source = instruction.operands
    block.write(destination, np.bitwise_count(block.read(source, instruction.type)).astype(np.uint32))


@handles("cvt")
def _convert(block: Block, instruction: Instruction) -> None:
    destination, source = instruction.operands
    *rounding, to, kind = instruction.modifiers
    exact = kind in ("f16", "bf16") or (kind[0] in "sub" and to[0] in "sub")
    if to not in TYPES or rounding != ([] if exact else ["rn"]) or (kind[0] == "f" and to[0] != "f"):
        raise NotImplementedError(instruction.text)
    block.write(destination, block.read(source, kind).astype(TYPES[to]))


@handles("add", "sub", "mul", "mad", "fma", "div", "max", "min", "neg", "abs")
def _arithmetic(block: Block, instruction: Instruction) -> None:
    kind = instruction.type
    destination, *sources = instruction.operands
    if instruction.modifiers[:-1] == ("rn", "f32") and kind in ("f16", "bf16") and instruction.name in ("add", "sub"):
        # from sm_100 on: the first operand is of the shorter type
        short = block.read(sources[0], kind).astype(np.float32)
        operation = {"add": np.add, "sub": np.subtract}[instruction.name]
        block.write(destination, _canonical(operation(short, block.read(sources[1], "f32"))))
        return
    numbers = [block.read(source, kind) for source in sources]
    if kind[0] == "f":
        block.write(destination, _float(instruction, numbers))
    else:
        block.write(destination, _integer(instruction, numbers, block))


def _float(instruction: Instruction, x: list[np.ndarray]) -> np.ndarray:
    _only(instruction, "rn", *(["full"] if instruction.name == "div" else []))
    if instruction.type not in ("f32", "f32x2"):
        raise NotImplementedError(instruction.text)
    if instruction.name == "fma":
        a, b, c = (numbers.astype(np.float64) for numbers in x)
        return _canonical((a * b + c).astype(np.float32))  # the product is exact in float64
    operations = {
        "add": np.add,
        "sub": np.subtract,
        "mul": np.multiply,
        "div": np.divide,
        "max": np.fmax,
        "min": np.fmin,
        "neg": np.negative,
        "abs": np.abs,
    }
    return _canonical(operations[instruction.name](*x))


def _canonical(numbers: np.ndarray) -> np.ndarray:
    """Every NaN with the bits that a GPU gives it: a CPU keeps those of an operand."""
    return np.where(np.isnan(numbers), CANONICAL_NAN, numbers)


def _integer(instruction: Instruction, x: list[np.ndarray], block: Block) -> np.ndarray:
    """Integers wrap around. `wide` multiplies into twice the bits, `hi` keeps the upper half of them."""
    part = instruction.modifiers[0]
    _only(instruction, *(["lo", "wide", "hi"] if instruction.name in ("mul", "mad") else []))
    if instruction.name in ("mul", "mad"):
        wider = np.dtype(f"{x[0].dtype.kind}{2 * x[0].itemsize}") if part != "lo" else x[0].dtype
        product = x[0].astype(wider) * x[1].astype(wider)
        if part == "hi":
            product = (product >> 8 * x[0].itemsize).astype(x[0].dtype)
        if instruction.name == "mul":
            return product
        addend = instruction.operands[3]
        return product + block.read(addend, f"{instruction.type[0]}{8 * product.itemsize}")
    if instruction.name == "div" and instruction.type[0] == "s":
        return np.trunc(x[0] / x[1]).astype(x[0].dtype)
    operations = {
        "add": np.add,
        "sub": np.subtract,
        "max": np.maximum,
        "min": np.minimum,
        "neg": np.negative,
        "abs": np.abs,
    }
    return operations[instruction.name](*x)
