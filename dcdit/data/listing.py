"""Which files of a folder are its images, and of which class."""

import os
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dcdit.data.decode import SUFFIXES, count_turned
from dcdit.data.samples import DataWarning
from dcdit.utils.processes import is_first_process

CLUTTER = (
    "$recycle.bin",
    "#recycle",
    "#snapshot",
    "@eadir",
    "@recently-snapshot",
    "@recycle",
    "@tmp",
    "__macosx",
    "__pycache__",
    "desktop.ini",
    "lost+found",
    "system volume information",
    "thumbs.db",
    "~snapshot",
)
"""What systems leave in folders, in small letters. Names that begin with a dot belong to it too."""
LOOKED_AT = 1000
"""Images whose header is read for an EXIF orientation. With millions of files, reading them all would take minutes."""
NAMED = 3
"""Names in a message; it counts all of them."""


@dataclass
class _Listing:
    """What is directly in a folder, by name."""

    images: list[Path] = field(default_factory=list)
    folders: list[Path] = field(default_factory=list)
    clutter: list[Path] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)
    """Other files: suffix to their number."""


def image_files(path: Path) -> tuple[list[Path], list[int], tuple[str, ...]]:
    """The images of a folder, with their labels.

    Every folder in it is a class, except clutter such as ``.ipynb_checkpoints`` or ``@eaDir``. Labels number the
    classes in the order of their names; an empty folder keeps its number. A flat folder of images is one class. One
    warning says what is left out, and how many images have an EXIF orientation. Of several processes, the first warns.

    Returns:
        The files, the label of each, and the name of each label.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no image in it; images beside class folders; or a folder that may or may not be meant as a class,
            because it is not empty and holds no image itself.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"no image folder {str(path)!r}")
    top = _list(path)
    classes = {path.name: top} if top.images else {folder.name: _list(folder) for folder in top.folders}
    nested = {folder: _images_below(folder) for inside in classes.values() for folder in inside.folders}
    if not nested and not any(inside.images for inside in classes.values()):
        raise ValueError(
            f"no images in {str(path)!r} ({_kinds([top, *classes.values()]) or 'no files'}); "
            f"accepted: {', '.join(SUFFIXES)}, in it or in class folders"
        )
    if top.images:
        _refuse_folders_of_images(path, nested)
    else:
        _refuse_doubtful_classes(path, classes, nested)
    groups = [inside.images for inside in classes.values()]
    files = [file for group in groups for file in group]
    labels = [label for label, group in enumerate(groups) for _ in group]
    if is_first_process() and (notes := _notes(path, top, classes, nested, files)):
        warnings.warn(f"{path}: {'; '.join(notes)}", DataWarning, stacklevel=2)
    return files, labels, tuple(classes)


def _list(folder: Path) -> _Listing:
    found = _Listing()
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        file = folder / entry.name
        if entry.name.startswith(".") or entry.name.lower() in CLUTTER:
            found.clutter.append(file)
        elif entry.is_dir():
            found.folders.append(file)
        elif file.suffix.lower() in SUFFIXES:
            found.images.append(file)
        else:
            found.others[file.suffix.lower()] += 1
    return found


def _images_below(folder: Path) -> int:
    """How many images are in a folder and in all folders below it. Links to folders are not followed."""
    images, todo = 0, [folder]
    while todo:
        inside = _list(todo.pop())
        images += len(inside.images)
        todo += [below for below in inside.folders if not below.is_symlink()]
    return images


# --- what shifts labels ------------------------------------------------------------------------------------------


def _refuse_folders_of_images(path: Path, nested: dict[Path, int]) -> None:
    mixed = next((folder for folder, images in nested.items() if images), None)
    if mixed is not None:
        raise ValueError(f"{path} holds images beside class folders ({mixed.name!r}); only one of the two")


def _refuse_doubtful_classes(path: Path, classes: dict[str, _Listing], nested: dict[Path, int]) -> None:
    for name, inside in classes.items():
        if inside.images or not (inside.others or inside.folders):
            continue
        images = sum(nested[folder] for folder in inside.folders)
        if images:
            raise ValueError(
                f"{str(path / name)!r} holds no image itself, but {images} in folders such as "
                f"{str(inside.folders[0])!r}; accepted: images directly in class folders, so it may be the path that "
                "is meant"
            )
        raise ValueError(
            f"{str(path / name)!r} holds no image ({_kinds([inside]) or 'folders'}), so it may be no class; accepted: "
            f"a class folder with images ({', '.join(SUFFIXES)}), or an empty one, which keeps its number"
        )


# --- what is said --------------------------------------------------------------------------------------------------


def _notes(
    path: Path, top: _Listing, classes: dict[str, _Listing], nested: dict[Path, int], files: Sequence[Path]
) -> list[str]:
    listings = [top, *(inside for inside in classes.values() if inside is not top)]
    clutter = [file for inside in listings for file in inside.clutter]
    empty = [path / name for name, inside in classes.items() if not inside.images]
    found = {
        "left out, of other kinds": _kinds(listings),
        "left out, hidden or of the system": _names(clutter, path),
        f"left out, folders in a class, with {sum(nested.values())} images": _names(list(nested), path),
        "classes without images, which keep their number": _names(empty, path),
        "with an EXIF orientation, which is applied": _turned(files),
    }
    return [f"{what}: {which}" for what, which in found.items() if which]


def _turned(files: Sequence[Path]) -> str:
    looked_at = files[:: -(-len(files) // LOOKED_AT)]
    turned = count_turned(looked_at)
    sample = "" if len(looked_at) == len(files) else f"{len(looked_at)} looked at of "
    return f"{turned} of {sample}{len(files)} images" if turned else ""


def _kinds(listings: Sequence[_Listing]) -> str:
    """Other files in words, the most frequent suffixes first."""
    counts = sum((inside.others for inside in listings), Counter[str]())
    shown = counts.most_common(NAMED)
    rest = counts.total() - sum(count for _, count in shown)
    parts = [f"{count} {repr(kind) if kind else 'without a suffix'}" for kind, count in shown]
    return ", ".join([*parts, f"{rest} others"] if rest else parts)


def _names(files: Sequence[Path], path: Path) -> str:
    """Number and names of files inside of ``path`` in words, without control characters."""
    shown = ", ".join(f"{str(file.relative_to(path))!r}" for file in files[:NAMED])
    return f"{len(files)} ({shown}{', ...' if len(files) > NAMED else ''})" if files else ""
