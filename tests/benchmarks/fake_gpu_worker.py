"""Stands in for benchmarks/gpu/worker.py: the name of a case says how it ends. It starts without torch."""

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.gpu.lines import BEGAN, DONE, FAILED, LEFT_OUT, Lines
from benchmarks.gpu.plan import case_name

arguments = sys.argv[1:]
folder, group, until = (arguments[arguments.index(option) + 1] for option in ("--folder", "--group", "--until"))
lines = Lines(Path(folder), device="fake")
if group == "broken":
    sys.exit("cannot start")
for case in arguments[arguments.index("--cases") + 1 :]:
    if time.time() > float(until):
        break
    name = case_name(group, case)
    lines.write(name, BEGAN, process=os.getpid())
    if "slow" in case:
        time.sleep(0.05)
    if "hang" in case:
        time.sleep(60)
    if "crash" in case:
        os._exit(7)
    if "poison" in case:
        lines.write(name, FAILED, error="CUDA error")
        os._exit(3)
    if "fails once" in case and not any(line["state"] == FAILED for line in lines.read() if line["case"] == name):
        lines.write(name, FAILED, error="the first time")
    elif "left" in case:
        lines.write(name, LEFT_OUT, reason="absent")
    else:
        lines.write(name, DONE)
