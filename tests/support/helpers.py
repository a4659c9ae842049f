"""The former home of what is now in inputs.py and accuracy.py."""

from support.accuracy import *  # noqa: F403
from support.inputs import *  # noqa: F403
