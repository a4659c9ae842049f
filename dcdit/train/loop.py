"""The training loop, for DC-DiT and for the static DiT, on one process or many. A resumed run continues exactly."""

import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dcdit import checkpoint as ckpt
from dcdit.config import TrainConfig
from dcdit.data import batches, create_dataset
from dcdit.diffusion import create_objective
from dcdit.models import DCDiT, create_model
from dcdit.nn.embedding import drop_labels
from dcdit.nn.memory_format import channels_last
from dcdit.train.checks import (
    check_fit,
    check_router,
    check_same_classes,
    check_sharding,
    local_batch_size,
    model_arguments,
)
from dcdit.train.compute import SpentFlops
from dcdit.train.distill import begin_upcycling
from dcdit.train.draws import draw_step
from dcdit.train.ema import EMA
from dcdit.train.folder import LOG_FILE, claim_run, placed, write_config
from dcdit.train.graphed import GraphedStep, step_obstacle
from dcdit.train.losses import training_losses
from dcdit.train.optimizer import clipped_step, create_optimizer
from dcdit.train.records import (
    LogRecord,
    MetricMeans,
    RecordWriter,
    cut_log,
    is_validated,
    summary,
    training_record,
)
from dcdit.train.samples import SampleSheets
from dcdit.train.schedule import learning_rate, trains_complete
from dcdit.train.sharding import shard, unsynchronised
from dcdit.train.state import TrainState
from dcdit.train.stopping import NO_STOP, StopCheck
from dcdit.train.trackers import Trackers, check_trackers
from dcdit.train.validate import Validation
from dcdit.utils.signals import Signals

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Example:
        >>> from pathlib import Path
        >>> from dcdit.train import TrainResult
        >>> result = TrainResult(200, "steps", Path("runs/a/checkpoints/step_00000200"), Path("runs/a/log.jsonl"), True)
        >>> result.checkpoint.name, result.signal  # no signal stopped it
        ('step_00000200', 0)
    """

    step: int
    """Steps done, including earlier parts of a resumed run."""
    reason: str
    """``"steps"`` (all done), ``"flops"``, ``"minutes"`` or ``"interrupt"``."""
    checkpoint: Path
    """The checkpoint saved at the end; ``dcdit.checkpoint.load_model`` reads it."""
    log: Path
    """log.jsonl"""
    main_process: bool
    """Whether this is the process that wrote them."""
    signal: int = 0
    """Number of the signal that interrupted the run; 0 if none did."""


def train(
    config: TrainConfig, resume: str | Path | None = None, callbacks: Sequence[Callable[[LogRecord], None]] = ()
) -> TrainResult:
    """Train a model; see :class:`dcdit.config.TrainConfig` for what can be set.

    A run that is interrupted (Ctrl-C, SIGTERM, SIGHUP, ``run.minutes``) saves a checkpoint. Resumed from it, the run
    continues as if it had never stopped: bit for bit on a CPU. ``optim.flops`` ends a run at the first record in
    log.jsonl whose ``flops`` reach it, so runs are compared at compute that is equal to within ``run.log_every`` steps.

    Args:
        config: everything about the run.
        resume: checkpoint folder of a run, or run folder whose newest checkpoint is taken. The run goes on in that run
            folder, whatever ``run.out`` says.
        callbacks: called on the main process with each record that goes into log.jsonl.

    Raises:
        ModuleNotFoundError: the extra ``dcdit[train]`` is missing.
        ValueError, FileNotFoundError: the data, the model and the configuration do not fit one another, or ``run.out``
            holds something else.
        FolderInUseError: another run is in the folder.
        FloatingPointError: the loss, the gradient norm or the weights are no longer finite. Such weights are not saved.

    Example:
        >>> from dcdit.config import load_config
        >>> from dcdit.train import train
        >>> small = {"grid": [4, 4], "hidden_size": 128, "depth": 1, "num_heads": 2}
        >>> keys = {"run.out": "runs/a", "optim.steps": 2, "optim.batch_size": 2, "router.group_size": 2}
        >>> result = train(load_config("photographs-cpu", {**keys, "data.size": 4, "model.overrides": small}))
        >>> result.step, result.checkpoint.name
        (2, 'step_00000002')
    """
    config = placed(config, resume)
    accelerator = create_accelerator(config)
    with claim_run(config, resume, accelerator):
        return _train(config, resume, callbacks, accelerator)


def _train(
    config: TrainConfig,
    resume: str | Path | None,
    callbacks: Sequence[Callable[[LogRecord], None]],
    accelerator: Any,
) -> TrainResult:
    optim, run = config.optim, config.run
    out, log = Path(run.out), Path(run.out) / LOG_FILE
    device, main_process = accelerator.device, accelerator.is_main_process
    rank, processes = accelerator.process_index, accelerator.num_processes

    # Data, model, objective, optimiser.
    dataset = create_dataset(config.data, "train", optim.seed, config.model.num_classes)
    if resume is not None:
        check_same_classes(dataset, resume)
    torch.manual_seed(optim.seed)
    with torch.device("cpu"):  # whatever PyTorch's default device is: a seed gives the same weights on all
        model = create_model(**model_arguments(config.model, dataset))
    model.to(device)
    # The draws below decide which labels are dropped, for the whole batch, so the model must not drop any itself.
    model.y_embedder.dropout_prob = 0.0
    model.objective = config.diffusion.objective
    teacher = begin_upcycling(config, model, resume)
    check_router(config, model.config)
    local_batch = local_batch_size(config, processes, model.config)
    check_fit(dataset, model)
    objective = create_objective(config.diffusion.objective, model.config.learn_sigma)
    sharded = optim.shard and processes > 1
    if sharded:
        shard(model, device)
    elif isinstance(model, DCDiT):
        channels_last(model)
    optimizer = create_optimizer(model, optim.lr, optim.weight_decay, device)
    ema, flops = EMA(model, optim.ema_decay), SpentFlops(model.config, device)
    state = TrainState(model, ema, optimizer, flops)
    start = 0 if resume is None else state.restore(ckpt.load_checkpoint(resume), dataset, optim.batch_size)
    net = torch.compile(model) if optim.compile and not sharded else model
    obstacle = step_obstacle(config, net, processes)
    if optim.graph and obstacle:
        raise ValueError(f"optim.graph is true but steps cannot be captured: {obstacle}")
    graphed = None
    if optim.graph is not False and obstacle is None:
        graphed = GraphedStep(config, net, objective, optimizer, ema, processes)
    elif not sharded:
        net = accelerator.prepare(net)

    # The folder of the run, and what the steps below read and write.
    if main_process:
        size = sum(parameter.numel() for parameter in model.parameters())
        logger.info(
            "%s with %s parameters, on %s in %d process(es), from step %d of %d: %s",
            config.model.name, f"{size:,}", device, processes, start, optim.steps, out,
        )  # fmt: skip
        write_config(out, config)
        cut_log(log, start)
    first, end = start * optim.accumulate, optim.steps * optim.accumulate
    data = batches(dataset, first, end, local_batch * processes, rank, processes, config.data.workers)
    model.train()
    means, stop_check = MetricMeans(), StopCheck(config, accelerator, flops)
    step, saved = start, None
    began = time.monotonic()
    with (
        Trackers(accelerator, config, start) as trackers,
        Signals() as signals,
        progress_bar(start, optim.steps, shown=main_process) as bar,
    ):
        records = RecordWriter(log, trackers, callbacks, main_process)

        def interrupted() -> bool:
            return bool(stop_check.largest(signals.caught) if sharded else signals.caught)

        validation = Validation(model, ema, objective, config, local_batch, device, interrupted)

        sheets = SampleSheets(model, ema, config, dataset.class_names, device)

        def draw_samples() -> None:
            # A sharded model computes on all processes or none.
            with state.router_errors_explained(step - 1, means):
                images = sheets.draw() if main_process or sharded else {}
            trackers.write_images(images, step)

        def validate() -> None:
            # A sharded model computes on all processes or none.
            with state.router_errors_explained(step - 1, means):
                losses = validation.losses() if main_process or sharded else None
            if losses is not None:
                records.write({"step": step, **losses})

        # A signal ends a run without the validation of its last step. It is done here when the run is resumed.
        if validation.due(start) and stop_check.largest(main_process and not is_validated(log, start)):
            validate()
        stop = stop_check.stop(start % run.log_every == 0, signals.caught)
        while step < optim.steps and stop == NO_STOP:
            # One step: forward and backward passes, then weights and averages, which a graph includes.
            if step >= config.upcycle.distill_steps:
                teacher = None
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(optim, step)
            shape = (optim.batch_size, *dataset.shape)
            dropout, gates = model.config.class_dropout_prob, model.config.gate_shape
            complete = gates is not None and trains_complete(config.width, step)
            draws = draw_step(objective, shape, dropout, optim.seed, step, device, gates)
            in_graphs = graphed is not None and teacher is None and graphed.takes(step)
            passes: list[dict[str, Tensor]] = []
            for number in range(optim.accumulate):
                x, y = (tensor.to(device, non_blocking=True) for tensor in next(data))
                t, noise, dropped, gate_noise = draws.rows((number * processes + rank) * local_batch, local_batch)
                y = drop_labels(y, dropped, model.config.num_classes)
                noisy = objective.noise(x, t, noise)
                taken = graphed.run(step, noisy, y) if graphed is not None and in_graphs else None
                in_graphs = taken is not None
                if taken is not None:
                    metrics, lengths = taken
                else:
                    last = number == optim.accumulate - 1
                    with contextlib.nullcontext() if last else unsynchronised(net, accelerator):
                        with state.router_errors_explained(step, means):
                            metrics, lengths = training_losses(
                                config, step, net, objective, noisy, y, teacher, gate_noise
                            )
                        accelerator.backward(metrics["loss"] / optim.accumulate)
                flops.add(local_batch, lengths, 1 + complete, teacher.flops if teacher else 0)
                passes.append({name: value.detach() for name, value in metrics.items()})
                del metrics  # a capture must not meet the streams of its gradients
            step_means = {name: torch.stack([metrics[name] for metrics in passes]).mean() for name in passes[0]}
            if graphed is not None and in_graphs:
                step_means["grad_norm"] = graphed.update()
            else:
                if graphed is not None and processes > 1:
                    graphed.average_plain()
                step_means["grad_norm"] = clipped_step(optimizer, optim.grad_clip)
                optimizer.zero_grad(set_to_none=True)
                ema.update()
            means.add(step_means, optim.batch_size)
            step += 1
            bar.update()

            # The record. Steps with a teacher, and those that train the complete model too, end with one, so that no
            # record mixes steps with and without it.
            done = step == optim.steps
            teacher_done = teacher is not None and step == config.upcycle.distill_steps
            complete_done = complete and not trains_complete(config.width, step)
            at_record = done or teacher_done or complete_done or step % run.log_every == 0
            if at_record:
                record = training_record(step, means, flops, config, accelerator)
                records.write(record)
                bar.set_postfix_str(summary(record))

            # Whether to stop; validation; the checkpoint.
            if not done:
                stop = stop_check.stop(at_record, signals.caught, (time.monotonic() - began) / 60)
            with means.paused():
                if validation.due(step) and not stop.signal:
                    state.check_finite(step, means, accelerator)
                    validate()
                    interrupt = stop_check.stop(at_record=False, caught=signals.caught)
                    stop = interrupt if interrupt.signal else stop
                if sheets.due(step) and not stop.signal:
                    state.check_finite(step, means, accelerator)
                    draw_samples()
                if done or stop != NO_STOP or step % run.checkpoint_every == 0:
                    state.check_finite(step, means, accelerator)
                    saved = state.save(step, config, dataset, accelerator)
    if saved is None:  # nothing was left to do, or a signal came before the first step
        saved = state.save(step, config, dataset, accelerator) if resume is None else ckpt.find_checkpoint(resume)
        if main_process:  # an earlier part may have been killed before it deleted old checkpoints
            ckpt.keep_newest(ckpt.checkpoint_path(out, step), run.keep_checkpoints)
    return TrainResult(step, stop.reason, saved, log, main_process, stop.signal)


def create_accelerator(config: TrainConfig) -> Any:
    """accelerate's view of this process and its device.

    Raises:
        ModuleNotFoundError: accelerate or a tracker of ``run.trackers`` is not installed.
        ValueError: weights are to be divided in a way that training does not support.
    """
    try:
        from accelerate import Accelerator
    except ImportError:
        raise ModuleNotFoundError("training needs accelerate: pip install 'dcdit[train]'") from None
    run = config.run
    check_trackers(config)
    check_sharding(config)
    cpu = config.optim.device == "cpu"
    return Accelerator(cpu=cpu, mixed_precision="no", log_with=run.trackers, project_dir=run.out)


def progress_bar(done: int, steps: int, shown: bool) -> Any:
    """A bar over the steps of a run, of which ``done`` are done. It shows nothing where no step is left."""
    from tqdm import tqdm

    return tqdm(total=steps, initial=done, disable=not shown or done >= steps, unit="step", dynamic_ncols=True)
