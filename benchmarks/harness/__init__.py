"""What the benchmarks share: sets of sizes, equality checks, counted work, least traffic, reports."""
