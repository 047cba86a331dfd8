"""Compiles the attention kernels for GPUs that need not be there, as TritonBackend launches them, and prints what came of it.

    python -m tests.unit.attention.compile_kernels '[{"capability": [9, 0], "head_dim": 128}]'

A process of its own: elsewhere in the tests kernels are interpreted, and Triton decides that when it is imported. The argument is a
JSON list of cases, the output one JSON object a kernel and line.
"""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hpcinfer.attention import triton_decode, triton_prefill
from hpcinfer.attention.triton_backend import TritonBackend
from tests.contract.attention_suite import Case, Inputs, Machine

KERNELS = {"decode": triton_decode.decode_kernel, "join": triton_decode.join_kernel, "prefill": triton_prefill.prefill_kernel}
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int32: "i32"}


@dataclasses.dataclass
class Launch:
    """Stands in a kernel's place and keeps what it is launched with."""

    kernel: triton.JITFunction
    arguments: dict | None = None

    def __getitem__(self, grid):
        assert all(isinstance(size, int) and size > 0 for size in grid)
        return self._record

    def _record(self, *positional, **named):
        self.arguments = dict(zip(self.kernel.arg_names, positional, strict=False)) | named


def launches(case: Case, capability: tuple[int, int]) -> dict[str, dict]:
    """The arguments of each kernel in one forward."""
    recorders = {name: Launch(kernel) for name, kernel in KERNELS.items()}
    triton_decode.decode_kernel, triton_decode.join_kernel = recorders["decode"], recorders["join"]
    triton_prefill.prefill_kernel = recorders["prefill"]
    backend = TritonBackend()
    backend.prepare(case.query(Machine(device_type="cuda", capability=capability, packages=frozenset({"triton"}))))
    Inputs.of(case, backend, torch.device("cpu"), case.dtype).forward(backend)
    return {name: launch.arguments for name, launch in recorders.items()}


def compiled(kernel: triton.JITFunction, arguments: dict, capability: tuple[int, int]):
    """What Triton makes of a launch on that GPU: types and alignments as its launcher would find them."""
    settings = {name: value for name, value in arguments.items() if name not in kernel.arg_names}
    signature, constants, aligned = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        name, value = parameter.name, arguments[parameter.name]
        if parameter.is_constexpr:
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = "*" + TYPES[value.dtype]
            if not parameter.do_not_specialize_on_alignment:
                aligned[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
            if isinstance(value, int) and value % 16 == 0 and not parameter.do_not_specialize:
                aligned[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", 10 * capability[0] + capability[1], 32), options=settings)


def spilled_bytes(ptx: str, capability: tuple[int, int]) -> int:
    """Bytes of registers that the assembler had to store in memory. Of the two that come with Triton the one that knows the code."""
    name = f"sm_{capability[0]}{capability[1]}" + ("a" if capability >= (9, 0) else "")
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        for program in sorted((Path(triton.__file__).parent / "backends/nvidia/bin").glob("ptxas*")):
            command = [program, "-v", f"--gpu-name={name}", file.name, "-o", "/dev/null"]
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            if result.returncode == 0:
                return sum(map(int, re.findall(r"(\d+) bytes spill stores", result.stderr)))
    raise RuntimeError(result.stderr)


def main(cases: list[dict]) -> None:
    for given in cases:
        capability, kernels = tuple(given.pop("capability")), given.pop("kernels", list(KERNELS))
        given["dtype"] = getattr(torch, given.get("dtype", "bfloat16"))
        # Long enough for several splits.
        case = Case(**{"backend": "TRITON", "block_size": 64, "num_heads": 8, "lens": ([1, 200], [1000, 50]), **given})
        recorded = launches(case, capability)
        for name in kernels:
            made = compiled(KERNELS[name], recorded[name], capability)
            ptx = made.asm["ptx"]
            print(json.dumps({
                "kernel": name, "case": str(case), "shared_bytes": made.metadata.shared,
                "spilled_bytes": spilled_bytes(ptx, capability), "cubin_bytes": len(made.asm["cubin"]),
                "wide_copies": len(re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*0x10", ptx)),
                "narrow_copies": len(re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*0x[248],", ptx)),
                "matrix_instructions": len(re.findall(r"wgmma\.mma_async|mma\.sync|tcgen05\.mma", ptx)),
                "buffers": max(map(int, re.findall(r"local_alloc : \(\) -> !ttg.memdesc<(\d+)x\d+x\d+x[bf]", made.asm["ttgir"])), default=0),
            }), flush=True)  # fmt: skip


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
