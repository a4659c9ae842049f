"""A hook of mkdocs: what lies outside of ``docs/`` and belongs on the site, and links that lead there.

Links in ``docs/`` are those of the repository, so that they also work where the sources are read. One to a file that is
not on the site becomes its text.
"""

import os
import re
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
OUTSIDE = ("CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/results/**/*", "examples/**/*")
LINK = re.compile(r"\[(?P<text>[^\[\]]*)\]\((?P<path>[^\s():#]+)(?P<anchor>#[^\s()]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for pattern in OUTSIDE:
        for path in sorted(ROOT.glob(pattern)):
            if path.is_file() and path.suffix != ".pyc":
                name = path.relative_to(ROOT).as_posix()
                files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    places = {os.path.realpath(file.abs_src_path): file.src_uri for file in files if file.abs_src_path}
    here = Path(page.file.abs_src_path).parent

    def relink(link: re.Match[str]) -> str:
        target = os.path.realpath(here / link["path"])
        if target in places:
            path = os.path.relpath(places[target], PurePosixPath(page.file.src_uri).parent)
            return f"[{link['text']}]({path}{link['anchor'] or ''})"
        return link["text"] if os.path.exists(target) else link[0]  # mkdocs complains about a link that leads nowhere

    return LINK.sub(relink, markdown)
