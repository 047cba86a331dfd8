"""What the layers would launch on a GPU, found without one, and its compilation.

Tensors of torch's device "meta" have a shape and no numbers, so the layers run on them at the sizes of real models. What would
make the host wait for a number of the device (nonzero, bincount, item) is an error on them.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch

from tests.unit.kernels.twins import twins_everywhere

TYPES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64",
    torch.int64: "i64", torch.int32: "i32", torch.uint8: "u8", torch.bool: "i1",
}
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
_ALIGNMENT = 16


@dataclasses.dataclass(frozen=True, slots=True)
class Launch:
    """One kernel as Triton specialises it: everything that its binary depends on but the GPU."""

    kernel: str
    signature: tuple[tuple[str, str], ...]
    """Of each parameter its type, `constexpr` for a constant."""
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[str, ...]
    """Pointers and numbers that 16 divides."""
    options: tuple[tuple[str, Any], ...]

    def named(self, name: str) -> Any:
        """The constant or option of that name."""
        return dict(self.constants + self.options)[name]


@contextlib.contextmanager
def recorded(launches: list[Launch], functions: dict[str, Any]) -> Iterator[None]:
    """Every operation is a kernel that does nothing but add itself to `launches`, and its function to `functions` by name."""
    from triton.runtime.jit import JITFunction

    def run(self, *args, grid, warmup, **kwargs) -> None:
        assert functions.setdefault(self.__name__, self) is self, f"two kernels are called {self.__name__}"
        launches.append(launch_of(self, args, kwargs))

    kept = JITFunction.run
    JITFunction.run = run
    try:
        with twins_everywhere(), torch.inference_mode():
            yield
    finally:
        JITFunction.run = kept


def launch_of(function: Any, args: tuple, kwargs: dict[str, Any]) -> Launch:
    """A call as Triton's own specialisation sees it."""
    options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
    values = dict(zip(function.arg_names, args)) | kwargs
    assert set(values) == set(function.arg_names), set(values) ^ set(function.arg_names)
    signature, constants, aligned = [], [], []
    for param in function.params:
        value = values[param.name]
        if isinstance(value, torch.Tensor):
            signature.append((param.name, f"*{TYPES[value.dtype]}"))
            if value.storage_offset() * value.dtype.itemsize % _ALIGNMENT == 0:
                aligned.append(param.name)
        elif param.is_constexpr or value is None or (value == 1 and isinstance(value, int) and not param.do_not_specialize):
            signature.append((param.name, "constexpr"))
            constants.append((param.name, value))
        elif isinstance(value, int):
            signature.append((param.name, "i32"))
            if value % _ALIGNMENT == 0 and not param.do_not_specialize:
                aligned.append(param.name)
        else:
            signature.append((param.name, "fp32"))
    return Launch(
        function.__name__, tuple(signature), tuple(constants), tuple(aligned), tuple(sorted(options.items()))
    )


def compiled(function: Any, launch: Launch, capability: int) -> Any:
    """The launch compiled for a GPU of this compute capability, 90 for 9.0. Needs no GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    places = {name: index for index, name in enumerate(function.arg_names)}
    source = ASTSource(
        fn=function, signature=dict(launch.signature), constexprs=dict(launch.constants),
        attrs={(places[name],): [["tt.divisibility", _ALIGNMENT]] for name in launch.aligned},
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(launch.options))
