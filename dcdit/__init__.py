"""dcdit: dynamic-token diffusion transformers whose FLOP savings become wall-clock time."""

__version__ = "0.1.0"
