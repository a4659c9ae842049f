"""A machine that runs compiled kernels (PTX) on a CPU."""
