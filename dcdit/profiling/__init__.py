"""Where the time goes: profiles against static DiTs, timing, workloads of the operations, tuning, plots."""
