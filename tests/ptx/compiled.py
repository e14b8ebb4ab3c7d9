"""Stands in for a GPU: compiles a Triton program as its launch would, and runs the PTX in the emulator.

    emulated = EmulatedProgram(triton_programs.advantages_program, compute_capability=90)
    emulated[grid](**arguments, num_warps=8)      # as the JIT is called, on CPU tensors

The specialisation of the arguments (types, alignment of pointers, None compiled away) is the JIT's own, so what runs
is what a device of this compute capability would be given.
"""

import os
import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import emulator
import numpy as np
import torch
import triton
from memory import GlobalMemory
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import JITFunction

POINTERS = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
LAUNCH_OPTIONS = ("num_warps", "maxnreg", "enable_fp_fusion")


@dataclass
class Launch:
    """One launch: what was compiled, and what it touched."""

    ptx: str
    cubin: bytes
    memory: GlobalMemory
    arguments: Mapping[str, Any]
    grid: tuple[int, ...]
    instructions: int


@dataclass
class EmulatedProgram:
    program: JITFunction
    compute_capability: int
    damage: Any = None
    """A function of the PTX that gives other PTX: for tests of the tests."""
    launches: list[Launch] = field(default_factory=list)
    limit: int = 10_000_000

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda **keywords: self._launch(grid, keywords)

    def _launch(self, grid: tuple[int, ...], keywords: dict[str, Any]) -> None:
        options = {name: keywords.pop(name) for name in LAUNCH_OPTIONS if name in keywords}
        defaults = {parameter.name: parameter.default for parameter in self.program.params}
        arguments = {name: keywords.pop(name, defaults[name]) for name in self.program.arg_names}
        if keywords:
            raise TypeError(f"{self.program.__name__} has no arguments {sorted(keywords)}")

        memory = GlobalMemory()
        types, constants, aligned = {}, {}, []
        values: list[int | float] = []
        for index, parameter in enumerate(self.program.params):
            argument = arguments[parameter.name]
            if parameter.is_constexpr or argument is None:
                types[parameter.name], constants[parameter.name] = "constexpr", argument
            elif isinstance(argument, torch.Tensor):
                types[parameter.name] = POINTERS[argument.dtype]
                values.append(memory.address(argument))
                if not parameter.do_not_specialize_on_alignment and values[-1] % 16 == 0:
                    aligned.append(index)
            elif isinstance(argument, int):
                if not parameter.do_not_specialize:
                    raise TypeError(f"{parameter.name} would be compiled in: every integer is to be an argument")
                types[parameter.name] = "i32" if -(2**31) <= argument < 2**31 else "i64"
                values.append(argument)
            else:
                types[parameter.name] = "fp32"
                values.append(float(np.float32(argument)))
        frozen = (tuple(types.items()), tuple(constants.items()), tuple(aligned), tuple(options.items()))
        ptx, cubin = compile_program(self.program, self.compute_capability, *frozen)
        parsed = parsed_program(ptx if self.damage is None else self.damage(ptx))
        # behind them come one or two pointers to Triton's own scratch space, which these programs do not use
        values += [0] * (len(parsed.parameters) - len(values))
        executed = emulator.run(parsed, memory, values, grid, self.limit)
        self.launches.append(Launch(ptx, cubin, memory, arguments, grid, executed))


parsed_program = lru_cache(maxsize=256)(emulator.parse)


@lru_cache(maxsize=256)
def compile_program(
    program: JITFunction,
    compute_capability: int,
    types: tuple[tuple[str, str], ...],
    constants: tuple[tuple[str, Any], ...],
    aligned: tuple[int, ...],
    options: tuple[tuple[str, Any], ...],
) -> tuple[str, bytes]:
    """PTX and cubin, compiled without a device."""
    source = ASTSource(
        program,
        signature=dict(types),
        constexprs=dict(constants),
        attrs={(index,): [["tt.divisibility", 16]] for index in aligned},
    )
    with tempfile.TemporaryDirectory() as folder:
        before = os.environ.get("TRITON_CACHE_DIR")
        os.environ["TRITON_CACHE_DIR"] = folder
        try:
            compiled = triton.compile(source, target=GPUTarget("cuda", compute_capability, 32), options=dict(options))
        finally:
            if before is None:
                del os.environ["TRITON_CACHE_DIR"]
            else:
                os.environ["TRITON_CACHE_DIR"] = before
    return compiled.asm["ptx"], compiled.asm["cubin"]


@dataclass(frozen=True)
class MachineCode:
    registers: int
    stack: int
    """Bytes a thread spills to memory."""
    sass: str

    @property
    def instructions(self) -> int:
        return len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", self.sass, flags=re.MULTILINE))

    def count(self, pattern: str) -> int:
        return len(re.findall(pattern, self.sass))


def machine_code(cubin: bytes) -> MachineCode:
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "program.cubin"
        file.write_bytes(cubin)

        def output(tool: str, option: str) -> str:
            return subprocess.run([tools / tool, option, file], capture_output=True, text=True, check=True).stdout

        resources = output("cuobjdump", "--dump-resource-usage")
        found = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", resources)}
        return MachineCode(found["REG"], found["STACK"] + found["LOCAL"], output("nvdisasm", "-c"))
