"""The kernels compiled without a GPU, as they are for one (`launch.to_binary`), and listed by nvdisasm."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest
from qoqlab_kernels import ptx
from qoqlab_kernels.launch import Program, to_binary, to_ltoir


def tool(name: str) -> Path | None:
    """A program of the CUDA wheels from PyPI, None where it is not installed."""
    found = find_spec("nvidia")
    folders = [Path(place) for place in (found.submodule_search_locations or [])] if found else []
    return next((path for folder in folders for path in sorted(folder.glob(f"cu*/bin/{name}"))), None)


NVDISASM = tool("nvdisasm")
missing = [] if NVDISASM else ["nvdisasm"]
missing += [] if find_spec("numba_cuda") else ["numba-cuda"]
needs_compilers = pytest.mark.skipif(
    bool(missing) or ptx.SIMULATED,
    reason=f"needs {', '.join(missing) or 'kernels that are not simulated'}; pip install 'qoqlab[kernels]' (Linux)",
)


@dataclass(frozen=True)
class Compiled:
    """What the compilers say about a program."""

    report: str  #: of the assembler: registers, spills, lost performance
    registers: int
    names: list[str]  #: instructions of the machine code in order, without suffixes
    listing: str  #: the machine code, disassembled

    @property
    def opcodes(self) -> Counter:
        """How many instructions there are of every name."""
        return Counter(self.names)

    @property
    def branches(self) -> int:
        """Branch instructions in the machine code."""
        return self.opcodes["BRA"] + self.opcodes["BRX"]


def compile_offline(program: Program, capability: tuple[int, int], folder: Path) -> Compiled:
    """Compile a program for a compute capability; fails where the linker does."""
    code, report = to_binary(to_ltoir(program, capability), capability)
    binary = folder / "kernel.cubin"
    binary.write_bytes(code)
    listing = subprocess.run(
        [str(NVDISASM), "-c", str(binary)], capture_output=True, text=True, timeout=120, check=True
    ).stdout
    names = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", listing)
    registers = [int(number) for number in re.findall(r"Used (\d+) registers", report)]
    assert len(registers) == 1, report
    return Compiled(report, registers[0], [name.split(".")[0] for name in names], listing)


def register_limit(program: Program) -> int:
    """Registers of a thread such that as many blocks as the launch bound promises fit on a multiprocessor."""
    return min(255, 65536 // (program.threads * program.residents) // 8 * 8)


def assert_clean(made: Compiled, program: Program, branches: int) -> None:
    """No spills, no stack, no local memory, no calls of functions; registers and branches within bounds; nothing that the
    assembler warns of (C75xx: wgmma serialised)."""
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", made.report)
    assert spills and all(numbers == ("0", "0", "0") for numbers in spills), made.report
    assert not re.search(r"C7\d{3}|warning", made.report), made.report
    local = {"LDL", "STL"} & set(made.opcodes)
    assert not local, f"local memory: {local}"
    assert "CALL.ABS" not in made.listing, "calls of functions"  # subroutines of divisions are CALL.REL
    limit = register_limit(program)
    assert made.registers <= limit, f"{made.registers} registers, the launch bound leaves {limit}"
    assert made.branches <= branches, f"{made.branches} branches, at most {branches} are expected"
