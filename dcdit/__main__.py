"""``python -m dcdit``."""

import sys

from dcdit.cli import main

sys.exit(main())
