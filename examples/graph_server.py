"""A server loop: requests are collected into batches of one size, whose sampling steps replay CUDA graphs.

With a budget every shape is static, so the graphs of the first batch serve all others; one that is not full is padded.
Request n gets the noise of image n, whoever else is in its batch. Without a GPU the loop runs without graphs.

    python examples/graph_server.py [CHECKPOINT]
"""

import contextlib
import queue
import sys
import threading
from concurrent.futures import Future

import torch

import dcdit
from dcdit.diffusion import SamplerGraphs, sample
from dcdit.models import create_model
from dcdit.sample.options import DEFAULT_METHOD


class Server:
    """Draws images of classes. Any thread may call ``submit``; one thread owns the model and its graphs."""

    def __init__(self, model: torch.nn.Module, batch: int, budget: int, steps: int, wait: float = 0.02) -> None:
        self.model, self.batch, self.budget, self.steps, self.wait = model.eval(), batch, budget, steps, wait
        self.device, self.method = next(model.parameters()).device, DEFAULT_METHOD[model.objective or "dit"]
        self.graphs: SamplerGraphs | bool = SamplerGraphs() if self.device.type == "cuda" else False
        if not self.graphs:
            print(f"The model is on {self.device}, which has no CUDA graphs: the loop runs without them.")
        self.requests, self.served = queue.Queue(), 0  # of (label, Future), and None at the end
        self.thread = threading.Thread(target=self._loop)
        self.thread.start()

    def submit(self, label: int) -> "Future[torch.Tensor]":
        answer: Future[torch.Tensor] = Future()
        self.requests.put((label, answer))
        return answer

    def close(self) -> None:
        self.requests.put(None)
        self.thread.join()

    def _loop(self) -> None:
        request = self.requests.get()
        while request is not None:
            batch = [request]
            with contextlib.suppress(queue.Empty):
                while len(batch) < self.batch and (request := self.requests.get(timeout=self.wait)) is not None:
                    batch.append(request)
            self._serve(batch)
            request = request and self.requests.get()

    def _serve(self, batch: list[tuple[int, "Future[torch.Tensor]"]]) -> None:
        y = torch.tensor([label for label, _ in batch] + [0] * (self.batch - len(batch)), device=self.device)
        options = {"budget": self.budget, "first_index": self.served, "graph": self.graphs, "progress": False}
        try:
            images = sample(self.model, y, self.steps, self.method, **options)
            for (_, answer), image in zip(batch, images, strict=False):
                answer.set_result(image)
        except Exception as error:  # the loop answers and goes on
            for _, answer in batch:
                answer.set_exception(error)
        self.served += len(batch)


def main(checkpoint: str | None = None, requests: int = 6, batch: int = 4, steps: int = 20) -> list[torch.Tensor]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = dcdit.load(checkpoint, device=device).model if checkpoint else create_model("DC-DiT-S", 128).to(device)
    server = Server(model, batch, model.config.grid[0] * model.config.grid[1] // 4, steps)
    answers = [server.submit(n % model.config.num_classes) for n in range(requests)]
    server.close()
    print(f"served {server.served} requests in batches of up to {batch}")
    return [answer.result() for answer in answers]


if __name__ == "__main__":
    main(*sys.argv[1:2])
