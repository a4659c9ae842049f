"""What pyproject.toml cannot say: the version, the mapping of ``kernels/`` to ``dcdit.kernels``, links that leave here.

The README is also the long description on a package index, where links relative to the repository lead nowhere.
DCDIT_REPOSITORY, such as ``https://github.com/owner/name``, makes them absolute, at the tag of the version, and adds
the repository to the URLs of the package. The release workflow sets it.
"""

import os
import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
FOLDERS = ("dcdit.config.recipes", "dcdit.kernels", "dcdit.kernels.configs")
"""Packages for setuptools, without an __init__.py."""
PAPER = "https://arxiv.org/abs/2603.06351"
LINK = re.compile(r"""(\]\(|(?:src|href)=")(?!\w+:|#)([^)"\s]+)""")
"""The target of a link or a picture, in Markdown or HTML, where it is relative."""
PICTURES = (".png", ".gif", ".webp", ".svg", ".jpg")

version = re.search(r'__version__ = "(.+)"', (ROOT / "dcdit" / "__init__.py").read_text(encoding="utf-8"))[1]
repository = os.environ.get("DCDIT_REPOSITORY", "").rstrip("/")
urls = {"Paper": PAPER}
readme = (ROOT / "README.md").read_text(encoding="utf-8")
if repository:
    pages = f"{repository}/blob/v{version}"
    urls |= {
        "Source": repository,
        "Documentation": f"{pages}/docs",
        "Changelog": f"{pages}/CHANGELOG.md",
        "Issues": f"{repository}/issues",
    }
    files = f"{repository}/raw/v{version}"
    readme = LINK.sub(lambda link: f"{link[1]}{files if link[2].endswith(PICTURES) else pages}/{link[2]}", readme)

setup(
    version=version,
    long_description=readme,
    long_description_content_type="text/markdown",
    project_urls=urls,
    packages=[*find_packages(include=["dcdit", "dcdit.*"]), *FOLDERS],
    package_dir={"dcdit.kernels": "kernels"},
    package_data={
        "dcdit": ["py.typed", "config/recipes/*.yaml", "sample/page.html"],
        "dcdit.kernels.configs": ["*.json", "README.md"],
    },
)
