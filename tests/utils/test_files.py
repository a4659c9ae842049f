"""Writing: complete or not at all, through links, and never at the cost of a file that is not ours."""

import errno
import itertools
import os
import signal
import stat
import threading
from pathlib import Path

import pytest
import torch
from support.killing import dies_before

from dcdit.utils.files import (
    atomically,
    claimed,
    interrupted_replacements,
    recover,
    remove_folder,
    replace_folder,
    write_text,
)
from dcdit.utils.lock import FolderInUseError, locked
from dcdit.utils.tensors import save_tensors

OURS = ".0123456789abcdef0123456789abcdef.dcdit"


def tree(folder):
    """Every path below a folder with its content: text, the target of a link, or None for a folder."""
    return {
        str(path.relative_to(folder)): f"-> {os.readlink(path)}"
        if path.is_symlink()
        else path.read_text()
        if path.is_file()
        else None
        for path in sorted(folder.rglob("*"))
    }


def write_folder(text):
    def write(folder):
        folder.mkdir()
        (folder / "a").write_text(text)
        (folder / "b").write_text(text)

    return write


# --- complete or not at all -----------------------------------------------------------------------------------------


def refuse_replacing(monkeypatch):
    """A file system that gives no file the name of another one."""
    replace = Path.replace

    def refuses(path, target):
        if Path(target).exists():
            raise FileExistsError(errno.EEXIST, "File exists")
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", refuses)


@pytest.mark.parametrize("kind", ["file", "folder", "file system without replacing"])
def test_a_kill_at_any_moment_leaves_the_old_or_the_new_version(tmp_path, monkeypatch, kind):
    if kind == "file system without replacing":
        refuse_replacing(monkeypatch)
    (tmp_path / "notes").write_text("mine")

    def put(text):
        if kind == "folder":
            replace_folder(tmp_path / "x", write_folder(text))
        else:
            write_text(tmp_path / "x", text)

    def content(path):
        return tree(path) if path.is_dir() else path.read_text()

    complete = {text: {"a": text, "b": text} if kind == "folder" else text for text in ("old", "new")}
    found, between = [], 0
    for number in itertools.count():
        put("old")
        if not dies_before(number, lambda: put("new")):
            break
        if not (tmp_path / "x").exists():
            # Between the two steps of a replacement. Readers get the old version, and change nothing.
            before, (old,) = tree(tmp_path), interrupted_replacements(tmp_path).values()
            assert content(old) == complete["old"] and tree(tmp_path) == before
            between += 1
        elif kind == "folder":
            # A version that is half deleted never stands where a complete one could.
            assert all(content(old) == complete["old"] for old in tmp_path.glob(".*/old/x"))
        recover(tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["notes", "x"]
        found += [text for text in complete if content(tmp_path / "x") == complete[text]]
    assert len(found) == number and found == sorted(found, reverse=True) and {*found} == {"old", "new"}
    assert (between == 0) == (kind == "file")


def test_links_are_followed(tmp_path):
    """To a file, to a free name, and through linked folders. What is written lies beside the target."""
    big, results, seen = tmp_path / "big", tmp_path / "results", []
    big.mkdir()
    results.mkdir()
    (big / "old").write_text("old")
    (results / "file").symlink_to(big / "old")
    (results / "free").symlink_to("../big/new")
    (results / "folder").symlink_to(big)
    for name in ("file", "free", "folder/inner"):
        atomically(results / name, lambda file: (file.write_text("new"), seen.append(file.resolve().parents[2])))
    assert seen == [big] * 3
    assert tree(big) == {"inner": "new", "new": "new", "old": "new"}
    assert tree(results) == {"file": f"-> {big / 'old'}", "folder": f"-> {big}", "free": "-> ../big/new"}


def test_a_kill_while_a_folder_is_deleted(tmp_path):
    for number in itertools.count():
        replace_folder(tmp_path / "x", write_folder("text"))
        if not dies_before(number, lambda: remove_folder(tmp_path / "x")):
            break
        assert tree(tmp_path).get("x/a", "text") == tree(tmp_path).get("x/b", "text") == "text"
        assert (tmp_path / "x/a").exists() == (tmp_path / "x/b").exists() == (tmp_path / "x").exists()
        recover(tmp_path)
        assert {*tree(tmp_path)} <= {"x", "x/a", "x/b"}
    assert tree(tmp_path) == {} and number > 5


def test_an_error_while_writing_leaves_the_old_version_and_nothing_else(tmp_path):
    write_text(tmp_path / "x", "old")

    def full(file):
        file.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        atomically(tmp_path / "x", full)
    assert tree(tmp_path) == {"x": "old"}


def test_the_next_write_cleans_up_after_a_killed_one(tmp_path):
    """A killed safetensors leaves ``.tmpXXXXXX`` beside its file. That is in our folder, and goes with it."""

    def killed(file):
        (file.parent / ".tmpAbCd12").write_bytes(bytes(1000))
        os.kill(os.getpid(), signal.SIGKILL)

    process = os.fork()
    if not process:
        atomically(tmp_path / "x", killed)
    os.waitpid(process, 0)
    assert len(list(tmp_path.rglob(".tmpAbCd12"))) == 1
    write_text(tmp_path / "x", "new")
    assert tree(tmp_path) == {"x": "new"}


def test_writers_of_one_process_id_do_not_meet(tmp_path):
    """Threads have it in common, and so may containers that share a folder."""
    begun = threading.Barrier(2)

    def write(text):
        def slowly(file):
            with file.open("w") as opened:
                for part in range(3):
                    begun.wait()
                    opened.write(f"{text}{part}")
                    opened.flush()

        atomically(tmp_path / "x", slowly)

    threads = [threading.Thread(target=write, args=(text,)) for text in "AB"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "x").read_text() in ("A0A1A2", "B0B1B2")
    assert [*tree(tmp_path)] == ["x"]


def test_processes_that_write_and_clean_up_at_once(tmp_path):
    """Everyone writes the same file and cleans up the same folder; no write fails, and nothing is left."""
    processes = []
    for text in "ABCD":
        process = os.fork()
        if not process:
            try:
                for _ in range(40):
                    write_text(tmp_path / "x", text * 1000)
                    replace_folder(tmp_path / text, write_folder(text))
                os._exit(0)
            finally:
                os._exit(1)
        processes.append(process)
    assert [os.waitpid(process, 0)[1] for process in processes] == [0] * 4
    assert (tmp_path / "x").read_text() in {text * 1000 for text in "ABCD"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["A", "B", "C", "D", "x"]


# --- what is not ours -----------------------------------------------------------------------------------------------


def test_only_what_has_the_mark_is_removed(tmp_path):
    """Names that the marks of earlier versions matched, and names like ours around something else."""
    for name in (".venv.3.12.new", ".secrets.1.gone", ".samples.1.old", f"{OURS}.d", f".{'a' * 31}.dcdit", ".git"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text("mine")
    for name in (".bashrc.2024-01-01.old", ".x.1.new", ".tmpAbCd12", ".dcdit", "x.dcdit", f".{'b' * 32}.dcdit"):
        (tmp_path / name).write_text("mine")
    (tmp_path / f".{'c' * 32}.dcdit").mkdir()
    (tmp_path / f".{'c' * 32}.dcdit" / "thesis.txt").write_text("mine")
    (tmp_path / f".{'d' * 32}.dcdit").symlink_to(tmp_path / ".git")
    before = tree(tmp_path)
    recover(tmp_path)
    assert tree(tmp_path) == before
    (tmp_path / OURS / "new").mkdir(parents=True)
    (tmp_path / OURS / "new/x").write_text("half")
    recover(tmp_path)
    assert tree(tmp_path) == before


def test_a_live_writer_is_not_disturbed(tmp_path):
    def write(file):
        file.write_text("half")
        recover(tmp_path)
        file.write_text("whole")

    atomically(tmp_path / "x", write)
    assert tree(tmp_path) == {"x": "whole"}


@pytest.mark.parametrize("kind", ["folder", "linked folder", "pipe", "linked nowhere", "looping link", "below a file"])
def test_a_path_that_no_file_can_have_is_refused_before_work(tmp_path, kind):
    path, target = tmp_path / "x", tmp_path / "target"
    target.mkdir()
    (target / "thesis.txt").write_text("months of work")
    if kind == "folder":
        path = target
    elif kind == "linked folder":
        path.symlink_to(target)
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "linked nowhere":
        path.symlink_to(tmp_path / "unmounted" / "x")
    elif kind == "looping link":
        path.symlink_to(path)
    else:
        path = target / "thesis.txt" / "x"
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=r"^[^\n]*; accepted: [^\n]*$"):
        atomically(path, lambda file: pytest.fail("the work was done"))
    assert sorted(tmp_path.rglob("*")) == before
    assert (target / "thesis.txt").read_text() == "months of work"


def test_a_write_protected_file_is_refused(tmp_path, monkeypatch):
    write_text(tmp_path / "x", "old")
    # os.access and not the mode, because root may write everywhere.
    monkeypatch.setattr(os, "access", lambda path, mode: not (str(path).endswith("x") and mode & os.W_OK))
    with pytest.raises(PermissionError, match="x is write-protected; accepted"):
        write_text(tmp_path / "x", "new")
    assert (tmp_path / "x").read_text() == "old"


# --- file systems -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.EBADF])
def test_file_systems_that_do_not_force_folders_to_disk(tmp_path, monkeypatch, code):
    fsync = os.fsync

    def refuses(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(code, os.strerror(code))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuses)
    write_text(tmp_path / "x", "text")
    replace_folder(tmp_path / "y", write_folder("text"))
    assert tree(tmp_path) == {"x": "text", "y": None, "y/a": "text", "y/b": "text"}


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_file_that_cannot_be_forced_to_disk_is_an_error(tmp_path, monkeypatch, kind):
    """Of a folder too, every file counts."""

    def fails(descriptor):
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="Input/output error"):
        if kind == "file":
            write_text(tmp_path / "x", "new")
        else:
            replace_folder(tmp_path / "x", write_folder("new"))
    assert tree(tmp_path) == {}


def test_permissions(tmp_path):
    """New files have those of the umask, whoever writes them; replaced ones keep theirs."""
    mask = os.umask(0o027)
    try:
        write_text(tmp_path / "new", "text")
        atomically(tmp_path / "tensors", lambda file: save_tensors(file, {"a": torch.zeros(1)}))
        replace_folder(tmp_path / "folder", lambda p: (p.mkdir(), save_tensors(p / "a", {"a": torch.zeros(1)})))
        (tmp_path / "secret").write_text("old")
        (tmp_path / "secret").chmod(0o600)
        write_text(tmp_path / "secret", "new")
    finally:
        os.umask(mask)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*")}
    assert modes == {"new": 0o640, "tensors": 0o640, "folder": 0o750, "a": 0o640, "secret": 0o600}


def test_a_long_file_name(tmp_path):
    write_text(tmp_path / ("x" * 255), "text")
    write_text(tmp_path / ("x" * 255), "text")
    assert [*tree(tmp_path)] == ["x" * 255]


def test_text_with_a_file_name_that_is_not_utf8(tmp_path):
    write_text(tmp_path / "x", os.fsdecode(b"im\xff"))
    assert (tmp_path / "x").read_bytes() == b"im\xff"


def test_without_locks_nothing_is_taken_for_a_leftover(tmp_path, monkeypatch):
    """Then a killed writer cannot be told from a live one."""

    def unsupported(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    (tmp_path / OURS / "new").mkdir(parents=True)
    (tmp_path / OURS / "new/x").write_text("half")
    monkeypatch.setattr("fcntl.flock", unsupported)
    before = tree(tmp_path)
    write_text(tmp_path / "x", "text")
    assert tree(tmp_path) == {**before, "x": "text"}
    with pytest.warns(UserWarning, match="is on a file system without locks"), claimed(tmp_path / "run"):
        write_text(tmp_path / "run" / "y", "text")
    assert tree(tmp_path / "run") == {"y": "text"}


# --- a folder for one process -----------------------------------------------------------------------------------------


def test_a_claimed_folder_is_made_locked_and_cleaned_up(tmp_path):
    out = tmp_path / "a" / "b"
    (out / OURS / "new").mkdir(parents=True)
    (out / "mine").write_text("mine")
    with claimed(out):
        assert [path.name for path in out.iterdir() if path.name != ".dcdit-lock"] == ["mine"]
        with pytest.raises(FolderInUseError, match=f"^{out} is in use by process {os.getpid()} on host "), claimed(out):
            pytest.fail("two at once")
        with locked(tmp_path):  # another folder
            pass
    assert tree(out) == {"mine": "mine"}


def test_a_claimed_folder_that_stays_empty_goes(tmp_path):
    with pytest.raises(KeyError), claimed(tmp_path / "new"):
        raise KeyError
    assert not (tmp_path / "new").exists()
    (tmp_path / "old").mkdir()
    with claimed(tmp_path / "old"):
        pass
    assert (tmp_path / "old").is_dir()
    (tmp_path / "old" / "file").write_text("mine")
    for path in (tmp_path / "old" / "file", tmp_path / "old" / "file" / "deep"):
        with pytest.raises(ValueError, match="is no folder and cannot become one; accepted: "), claimed(path):
            pytest.fail("no folder")
    assert tree(tmp_path / "old") == {"file": "mine"}
