"""``python -m dcdit``."""

import sys

from dcdit.cli.main import main

sys.exit(main())
