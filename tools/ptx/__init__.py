"""A machine that runs compiled kernels (PTX) on a CPU.

`make ptx-test` runs the kernel tests on it, `make ptx-report` counts what kernels do (``python -m tools.ptx.report``).
"""
