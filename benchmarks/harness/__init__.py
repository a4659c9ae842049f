"""What the benchmarks share: sets of shapes, equality checks, counting, reports."""
