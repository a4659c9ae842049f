"""Capturing on a stand-in for the device: what is restored when it fails, at every point at which it can fail."""

import pytest
import torch
from support import fake_device
from support.fake_device import FakeDriver

from dcdit.utils import cuda

CPU = torch.device("cpu")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    return fake_device.install(monkeypatch)


def capture(function, fake: FakeDriver, **options) -> cuda.Captured:
    return cuda.capture(function, CPU, cuda.new_pool(CPU), "the sum", **options)


def test_a_graph_repeats_its_work_on_the_tensors_of_the_capture(fake: FakeDriver) -> None:
    x, total = torch.tensor([1.0, 2.0]), torch.zeros(2)
    factor = 3.0

    def function() -> torch.Tensor:
        total.add_(factor * x)
        return total + 1

    graph = capture(function, fake, warmup=0)
    assert total.tolist() == [0, 0] and graph.outputs.isnan().all(), "a capture runs nothing"
    factor = 100.0  # a graph keeps the number of its capture
    graph.replay()
    assert graph.outputs.tolist() == [4, 7]
    x.fill_(1)
    graph.replay()
    assert (total.tolist(), graph.outputs.tolist()) == ([6, 9], [7, 10])


def test_the_warm_up_runs_and_is_undone(fake: FakeDriver) -> None:
    x = torch.zeros(())
    graph = capture(lambda: x.add_(1), fake, warmup=3, undo=lambda: x.sub_(1))
    assert x.item() == 0
    graph.replay()
    assert x.item() == 1


@pytest.mark.parametrize(
    "read", [torch.Tensor.item, torch.Tensor.nonzero, lambda x: x.tolist(), lambda x: torch.tensor(1) + x]
)
def test_waiting_for_the_device_breaks_a_capture(fake: FakeDriver, read) -> None:
    x = torch.ones(())
    calls = []

    def function() -> None:
        calls.append(1)
        read(x)

    with pytest.raises(cuda.CaptureError, match=r"the sum cannot be captured: RuntimeError: .*capturing") as caught:
        capture(function, fake)
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert len(calls) == 4, "the warm-up ran"
    assert_restored(fake)


def assert_restored(fake: FakeDriver) -> None:
    assert [stream.name for stream in fake.streams] == ["default"]
    assert fake.devices == [] and fake.open_pools == []
    assert all(graph.state == "reset" for graph in fake.graphs)


@pytest.mark.parametrize("point", ["capture_begin", "capture_end", "the function"])
@pytest.mark.parametrize("kind", [Exception, KeyboardInterrupt])
def test_streams_and_memory_are_restored_after_a_failure(fake: FakeDriver, point: str, kind: type) -> None:
    """`torch.cuda.graph` leaves its stream current and its pool open where the end of the capture fails."""
    fake.fail_at.add(point)
    x, calls = torch.zeros(()), []

    def function() -> None:
        calls.append(1)
        x.add_(1)
        if len(calls) == 2 and (point == "the function" or kind is KeyboardInterrupt):
            raise ValueError("of the model") if kind is Exception else kind

    expected = cuda.CaptureError if kind is Exception or point == "capture_begin" else kind
    with pytest.raises(expected) as caught:
        capture(function, fake, warmup=1)
    assert_restored(fake)
    if expected is cuda.CaptureError and kind is Exception:
        message = "ValueError: of the model" if point == "the function" else f"InjectedError: {point}"
        assert message in str(caught.value) and caught.value.__cause__ is not None
    fake.fail_at.clear()
    calls.clear()
    graph = cuda.capture(lambda: x + 1, CPU, cuda.new_pool(CPU), "the next one")
    graph.replay()
    assert graph.outputs.item() == x.item() + 1


@pytest.mark.parametrize("point", ["new_graph", "new_stream", "synchronize", "empty_cache", "side waits for default"])
def test_other_failures_keep_their_name(fake: FakeDriver, point: str) -> None:
    fake.fail_at.add(point)
    with pytest.raises(fake_device.InjectedError, match=point):
        capture(lambda: torch.ones(()), fake)
    assert_restored(fake)


def test_the_side_stream_waits_and_is_waited_for(fake: FakeDriver) -> None:
    capture(lambda: fake.call(f"call on {fake.streams[-1].name}"), fake, warmup=2)
    order = [call for call in fake.calls if "new" not in call]
    assert order == [
        "side waits for default",
        "call on side",
        "call on side",
        "default waits for side",
        "synchronize",
        "empty_cache",
        "capture_begin",
        "call on side",
        "capture_end",
    ]


def test_a_read_waits_for_what_came_before_it_only(fake: FakeDriver) -> None:
    with fake.operators():
        numbers = torch.arange(3)
        pending = cuda.PendingRead(numbers)
        torch.ones(2) * 2
        assert pending.wait() == [0, 1, 2]
    after = fake.calls[fake.calls.index("record") :]
    assert after == ["record", "aten.ones", "aten.mul", "wait"]
    assert fake.calls.index("pinned") < fake.calls.index("record")


@torch.no_grad()
def test_weights_that_autocast_converts_are_converted_in_the_graph(fake: FakeDriver) -> None:
    """Copies from before the capture end with autocast; those of the capture hold nothing before a replay."""
    layer, x = torch.nn.Linear(2, 2), torch.ones(1, 2)
    with torch.autocast("cpu", torch.bfloat16):
        graph = capture(lambda: layer(x), fake)
        assert layer(x).isfinite().all()
        layer.weight.add_(1)
        graph.replay()
        torch.clear_autocast_cache()
        assert torch.equal(graph.outputs, layer(x))


def test_no_memory_before_the_capture(fake: FakeDriver) -> None:
    """It fails as the capture would, and what the warm-up had started is waited for."""

    def function() -> None:
        fake.call("work")
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(cuda.CaptureError, match="the sum cannot be captured: OutOfMemoryError: CUDA out of memory"):
        capture(function, fake)
    assert fake.calls[-2:] == ["work", "default waits for side"]
    assert_restored(fake)
