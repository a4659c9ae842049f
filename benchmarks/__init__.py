"""Wall-clock benchmarks: `pytest benchmarks/ --benchmark-only`, then `python -m benchmarks.report RAW.json`."""
