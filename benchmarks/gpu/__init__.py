"""The report of a rented GPU (benchmarks/gpu_report.py): its cases, the processes that run them, its page."""
