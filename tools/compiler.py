"""Compile launches for a GPU that need not be present, specialised as Triton does it at their first start."""

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature


class Compiler:
    """For one target: "cuda" with a compute capability, or "hip" with an architecture."""

    def __init__(self, kind: str, architecture: int | str, warp_size: int = 32) -> None:
        self._target = GPUTarget(kind, architecture, warp_size)
        self._backend = make_backend(self._target)

    def key(self, kernel: Any, args: tuple[Any, ...], meta: dict[str, Any]) -> Any:
        """Equal for launches that share one compiled kernel."""
        _, specialization, options = self._specialise(kernel, args, meta)
        return kernel, str(specialization), str(options)

    def compile(self, kernel: Any, args: tuple[Any, ...], meta: dict[str, Any]) -> tuple[Any, dict[str, str]]:
        """The compiled kernel, and the type of every argument ("constexpr" where its value is compiled in)."""
        meta = self._options(meta)
        bound, specialization, options = self._specialise(kernel, args, meta)
        options, signature, constexprs, attrs = kernel._pack_args(self._backend, meta, bound, specialization, options)
        source = ASTSource(kernel, signature, constexprs, attrs)
        return triton.compile(source, target=self._target, options=options.__dict__), signature

    def _specialise(self, kernel: Any, args: tuple[Any, ...], meta: dict[str, Any]) -> tuple[Any, Any, Any]:
        bind = create_function_from_signature(kernel.signature, kernel.params, self._backend)
        return bind(*args, **self._options(meta))

    def _options(self, meta: dict[str, Any]) -> dict[str, Any]:
        # dcdit.kernels.launch drops maxnreg on AMD, too.
        ignored = {"maxnreg"} if self._target.backend == "hip" else set()
        return {**{name: value for name, value in meta.items() if name not in ignored}, "debug": False}
