"""``python -m tools.kernel_package --out FOLDER``: write the package; see :mod:`tools.kernel_package.build`."""

import argparse
from pathlib import Path

from tools.kernel_package.build import build

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/kernel-package"), help="a new folder, or one of before")
    print(build(parser.parse_args().out))
