"""Static metadata is in pyproject.toml; this maps the top-level ``kernels/`` folder to ``dcdit.kernels``."""

import re
from pathlib import Path

from setuptools import find_packages, setup

version = re.search(r'__version__ = "(.+)"', Path(__file__).with_name("dcdit").joinpath("__init__.py").read_text())[1]

setup(
    version=version,
    packages=[*find_packages(include=["dcdit", "dcdit.*"]), "dcdit.kernels", "dcdit.kernels.configs"],
    package_dir={"dcdit.kernels": "kernels"},
    package_data={
        "dcdit": ["py.typed", "config/recipes/*.yaml", "sample/page.html"],
        "dcdit.kernels.configs": ["*.json", "README.md"],
    },
)
