"""One process at a time: who holds a lock, when it ends, and what a file system without locks does."""

import errno
import fcntl
import os
import signal
import socket
import time

import pytest

from dcdit.utils.lock import LOCK_FILE, FolderInUseError, locked


def in_child(work):
    """A forked process that does ``work`` and then waits to be killed; returns once the work is done."""
    ready, done = os.pipe()
    process = os.fork()
    if not process:
        try:
            work(done)
            signal.pause()
        finally:
            os._exit(1)
    assert os.read(ready, 1) == b"."
    return process


def kill(process):
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)


def test_a_second_process_is_told_who_holds_the_lock(tmp_path):
    def hold(done):
        with locked(tmp_path):
            os.write(done, b".")
            signal.pause()

    process = in_child(hold)
    message = rf"^{tmp_path} is in use by process {process} on host {socket.gethostname()} since 20[^\n]*; accepted: "
    with pytest.raises(FolderInUseError, match=message), locked(tmp_path):
        pytest.fail("two at once")
    kill(process)
    with locked(tmp_path) as held:  # a crash releases it
        assert held
    assert list(tmp_path.iterdir()) == []


def test_the_lock_dies_with_its_process_and_not_with_the_processes_that_it_started(tmp_path):
    """Processes that load data outlive a killed run for a while."""

    def hold(done):
        with locked(tmp_path):
            if os.fork():
                os.write(done, b".")
            else:
                time.sleep(20)
                os._exit(0)
            signal.pause()

    kill(in_child(hold))
    with locked(tmp_path) as held:
        assert held


def test_a_forked_process_that_leaves_the_block_does_not_release_the_lock(tmp_path):
    with locked(tmp_path):
        process = os.fork()
        if not process:
            try:
                with locked(tmp_path):
                    os._exit(1)
            except FolderInUseError:
                os._exit(0)
        assert os.waitpid(process, 0)[1] == 0
        assert (tmp_path / LOCK_FILE).exists()


def test_a_copied_folder_is_not_locked(tmp_path):
    """The file that names the holder is copied with a run that is going on; the lock is not."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with locked(tmp_path / "a"):
        (tmp_path / "b" / LOCK_FILE).write_bytes((tmp_path / "a" / LOCK_FILE).read_bytes())
        with locked(tmp_path / "b") as held:
            assert held


def test_a_lock_file_that_its_holder_has_just_deleted_locks_nothing(tmp_path, monkeypatch):
    flock, calls = fcntl.flock, []

    def races(descriptor, operation):
        calls.append(descriptor)
        if len(calls) == 1:
            (tmp_path / LOCK_FILE).unlink()
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", races)
    with locked(tmp_path):
        assert (tmp_path / LOCK_FILE).exists() and len(calls) == 2
        with pytest.raises(FolderInUseError), locked(tmp_path):
            pytest.fail("two at once")


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_file_systems_without_locks(tmp_path, monkeypatch, code):
    def unsupported(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with locked(tmp_path) as held:
        assert not held
    assert list(tmp_path.iterdir()) == []


def test_other_errors_are_not_taken_for_a_missing_lock(tmp_path, monkeypatch):
    def broken(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", broken)
    with pytest.raises(OSError, match="Input/output error"), locked(tmp_path):
        pytest.fail("not locked")
