"""Wall-clock benchmarks: `pytest benchmarks/ --benchmark-only`, then `python -m benchmarks.harness.report RAW.json`."""
