"""Other people's models, made faster in place: :func:`dcdit.patch` and :func:`dcdit.unpatch`."""

from dcdit.integrations.patching import patch, unpatch

__all__ = ["patch", "unpatch"]
