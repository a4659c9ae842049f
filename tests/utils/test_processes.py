"""What several processes of one command agree on before, and without, accelerate."""

from datetime import timedelta

import pytest
import torch

from dcdit.utils import processes
from dcdit.utils.processes import is_first_to_say


@pytest.fixture
def launched(monkeypatch):
    """Be one process of several, which meet at a port."""

    def launched(port, local_rank):
        values = {"WORLD_SIZE": "3", "LOCAL_RANK": str(local_rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in values.items():
            monkeypatch.setenv(name, str(value))

    return launched


def test_one_process_says_what_several_have_to_say(launched):
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    said = []
    for rank in (2, 0, 1):
        launched(store.port, rank)
        said.append((is_first_to_say("no file 'a'"), is_first_to_say(f"rank {rank} ran out of luck")))
    assert said == [(True, True), (False, True), (False, True)]


def test_processes_that_cannot_meet(launched, monkeypatch):
    monkeypatch.setattr(processes, "STORE_TIMEOUT", timedelta(milliseconds=100))
    gone = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    port = gone.port
    del gone
    for rank in (0, 1):
        launched(port, rank)
        assert is_first_to_say("no file 'a'") == (rank == 0)


def test_a_single_process_asks_nobody(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("MASTER_ADDR", "192.0.2.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    assert is_first_to_say("no file 'a'") and is_first_to_say("no file 'a'")
