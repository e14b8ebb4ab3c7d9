"""Tests the tests: damages one instruction of the compiled program at a time, and counts how often that is noticed.

    python tests/ptx/damage.py grpo            # or ppo, with shaping and holes; minutes
    python tests/ptx/damage.py ppo --class "drop barrier" --sample 50

Prints what was noticed of each kind of damage, and every damage that was not. Some survivors are harmless: an
instruction of which the result does not depend, or a barrier that another one makes superfluous.
"""

# ruff: noqa: T201
import argparse
import random
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

from agreement import Case, guarded_buffers, inputs, worst_errors
from compiled import EmulatedProgram
from memory import MemoryFault
from test_compiled_kernel import assert_only_what_is_needed_is_touched

from lenvm_rl.advantages import triton_kernel, triton_programs

# two warps and three chunks; T is a multiple of 4 in each, so that all run the same PTX
GRPO = Case(T=516, lengths=(None, 0, 1, -3, 256, 130, 259), lam=1.0)
PPO = replace(GRPO, token_task=True, holes=True, right_padded=False)
CASES = {
    "grpo": [GRPO, replace(GRPO, T=512, lengths=(510, 512, 257, 384, 128), gamma=0.95, lam=0.9, broken=True)],
    "ppo": [PPO, replace(PPO, T=512, gamma=0.95, lam=0.9, broken=True, seed=1)],
}
BLOCK = 256

REPLACEMENTS = {
    "add -> sub": (r"\badd(\.\w+)?\.(f32|f32x2)\b", r"sub\1.\2"),
    "sub -> add": (r"\bsub(\.\w+)?\.(f32|f32x2)\b", r"add\1.\2"),
    "mul -> add": (r"\bmul(\.\w+)?\.(f32|f32x2)\b", r"add\1.\2"),
    "div -> mul": (r"\bdiv\.full\.f32\b", "mul.f32"),
    "max -> min": (r"\bmax\.", "min."),
    "min -> max": (r"\bmin\.", "max."),
    "fma without addend": (r"\bfma\.rn\.(\w+)(\s+%\w+, [^,]+, [^,]+), [^;]+;", r"mul.\1\2;"),
    "neg -> mov": (r"\bneg\.f32\b", "mov.b32"),
    "selp turned": (r"\b(selp\.\w+\s+%\w+), ([^,]+), ([^,]+), ", r"\1, \3, \2, "),
    "guard turned": (r"@(%\w+)", r"@!\1"),
    "guard dropped": (r"@!?%\w+ (?!bra)", ""),
    "lt -> le": (r"\b(setp)\.lt\.", r"\1.le."),
    "gt -> ge": (r"\b(setp)\.gt\.", r"\1.ge."),
    "ge -> gt": (r"\b(setp)\.ge\.", r"\1.gt."),
    "and -> or": (r"\band\.(pred|b16|b32)\b", r"or.\1"),
    "or -> and": (r"\bor\.(pred|b16|b32)\b", r"and.\1"),
    "global address + 4": (r"((?:ld|st)\.global\S* .*\[\s*%\w+)\s*(\+ 0)?\s*\]", r"\1+4]"),
    "shared address + 4": (r"((?:ld|st)\.shared\S*\s.*\[\s*%\w+)\s*(\+ 0)?\s*\]", r"\1+4]"),
    "barrier dropped": (r"^\s*bar\.sync\s+0;", ""),
}
SHUFFLE = re.compile(r"(\bshfl\.sync\.(?:up|down|bfly)\.b32\s+\S+, \S+, )(\d+)(, )")


def damages(ptx: str) -> Iterator[tuple[str, int, str]]:
    """(kind, line, the line damaged)"""
    for number, line in enumerate(ptx.split("\n")):
        code = line.split("//")[0].strip()
        if not code.endswith(";") or code.startswith("."):
            continue
        for kind, (pattern, replacement) in REPLACEMENTS.items():
            damaged, found = re.subn(pattern, replacement, line, count=1)
            if found and damaged != line:
                yield kind, number, damaged
        if found := SHUFFLE.search(line):
            distance = int(found[2]) * 2 % 32 or 1
            yield "shuffle distance", number, SHUFFLE.sub(rf"\g<1>{distance}\g<3>", line)


def noticed(program: EmulatedProgram, cases: list[Case]) -> str | None:
    """How the damage showed; None where it did not."""
    for case in cases:
        program.launches.clear()
        out = guarded_buffers(inputs(case))
        try:
            if max(worst_errors(case, out=out).values()) >= 1:
                return "wrong number"
            assert_only_what_is_needed_is_touched(program.launches[0], case, out)
        except MemoryFault:
            return "memory fault"
        except AssertionError:
            return "assertion"
        except (RuntimeError, ValueError, KeyError, IndexError) as error:
            return type(error).__name__
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", choices=CASES)
    parser.add_argument("--target", type=int, default=90, help="compute capability")
    parser.add_argument("--class", dest="kind", choices=[*REPLACEMENTS, "shuffle distance"], help="only this damage")
    parser.add_argument("--sample", type=int, help="so many damages, drawn at random")
    arguments = parser.parse_args()

    cases = CASES[arguments.program]
    triton_kernel.BLOCK = BLOCK
    triton_kernel.OPTIONS["num_warps"] = BLOCK // 128
    program = EmulatedProgram(triton_programs.advantages_program, arguments.target)
    triton_programs.advantages_program = program
    if noticed(program, cases):
        raise SystemExit("the undamaged program does not pass")
    ptx = program.launches[0].ptx
    program.limit = 3 * program.launches[0].instructions

    chosen = [damage for damage in damages(ptx) if arguments.kind in (None, damage[0])]
    if arguments.sample:
        chosen = random.Random(0).sample(chosen, min(arguments.sample, len(chosen)))
    lines = ptx.split("\n")
    total, killed, how = Counter(), Counter(), Counter()
    for kind, number, damaged in chosen:
        program.damage = lambda _, n=number, new=damaged: "\n".join([*lines[:n], new, *lines[n + 1 :]])
        total[kind] += 1
        if way := noticed(program, cases):
            killed[kind] += 1
            how[way] += 1
        else:
            print(f"survived: {kind:20s} line {number + 1}: {lines[number].strip()}", flush=True)
    for kind, count in sorted(total.items()):
        print(f"{kind:20s} {killed[kind]:4d} / {count}")
    print(f"{'together':20s} {sum(killed.values()):4d} / {sum(total.values())}, noticed by {dict(how)}")


if __name__ == "__main__":
    main()
