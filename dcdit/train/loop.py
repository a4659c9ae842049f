"""The training loop: one for DC-DiT and the static DiT, one process or many, stopped and resumed without a trace."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dcdit import checkpoint as ckpt
from dcdit.config import TrainConfig, dump_yaml, to_dict
from dcdit.data import Samples, batches, create_dataset
from dcdit.diffusion import create_objective
from dcdit.models import DCDiT, create_model
from dcdit.ops import ratio_loss
from dcdit.train.compute import SpentFlops
from dcdit.train.distill import begin_upcycling
from dcdit.train.ema import EMA
from dcdit.train.log import Record, Window, append, cut_log
from dcdit.train.schedule import NOISE, compression_target, drop_fraction, learning_rate, seed_of
from dcdit.train.signals import Signals
from dcdit.train.trackers import Trackers, check_trackers
from dcdit.train.validate import validate
from dcdit.utils.files import atomically, recover


@dataclass(frozen=True)
class TrainResult:
    """How a run ended."""

    step: int
    """Steps done, earlier parts of a resumed run included."""
    reason: str
    """``"steps"`` (all done), ``"flops"``, ``"minutes"`` or ``"interrupt"``."""
    checkpoint: Path
    """The checkpoint saved at the end; ``dcdit.checkpoint.load_model`` reads it."""
    log: Path
    """log.jsonl"""
    main_process: bool
    """Whether this is the process that wrote them."""


def train(
    config: TrainConfig, resume: str | Path | None = None, callbacks: Sequence[Callable[[Record], None]] = ()
) -> TrainResult:
    """Train a model; see :class:`dcdit.config.TrainConfig` for what can be set.

    A run that is interrupted (Ctrl-C, SIGTERM, ``run.minutes``) saves a checkpoint, and resumed from it continues as if
    it had never stopped: bit for bit on a CPU. ``optim.flops`` ends a run at the first record in log.jsonl whose
    ``flops`` reach it, so runs are compared at compute that is equal to within ``run.log_every`` steps.

    Args:
        config: everything about the run.
        resume: checkpoint folder, or run folder whose newest checkpoint is taken.
        callbacks: called on the main process with each record that goes into log.jsonl.

    Raises:
        ModuleNotFoundError: the extra ``dcdit[train]`` is missing.
        ValueError, FileNotFoundError: the data, the model and the configuration do not fit one another.
        FloatingPointError: the loss is no longer finite.
    """
    return _Run(config, resume, callbacks).train()


class _Run:
    def __init__(
        self, config: TrainConfig, resume: str | Path | None, callbacks: Sequence[Callable[[Record], None]]
    ) -> None:
        self.config, self.callbacks = config, callbacks
        self.out = Path(config.run.out)
        if resume is None and ckpt.list_checkpoints(self.out):
            raise ValueError(f"{self.out} already holds a run; resume it (--resume {self.out}) or choose another --out")
        self.accelerator = _accelerator(config)
        self.device: torch.device = self.accelerator.device
        self.main: bool = self.accelerator.is_main_process

        optim = config.optim
        torch.manual_seed(optim.seed)
        model = config.model
        self.model = create_model(model.name, model.image_size, model.num_classes, **model.overrides).to(self.device)
        self.dynamic = isinstance(self.model, DCDiT)
        self.teacher = begin_upcycling(config, self.model, resume)
        self.share = _share(config, self.accelerator.num_processes, self.dynamic)
        self.data = create_dataset(config.data, "train", optim.seed)
        _check_fit(self.data, self.model)
        wants_held_out = config.run.eval_every and config.data.held_out
        self.held_out = create_dataset(config.data, "held_out") if wants_held_out else None
        self.objective = create_objective(config.diffusion.objective, self.model.config.learn_sigma)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=optim.lr, weight_decay=optim.weight_decay, fused=self.device.type == "cuda"
        )
        self.ema = EMA(self.model, optim.ema_decay)
        self.flops = SpentFlops(self.model.config, self.device)
        self.start = 0 if resume is None else self._restore(ckpt.load_checkpoint(resume))
        self.net = self.accelerator.prepare(torch.compile(self.model) if optim.compile else self.model)

    # --- one run ----------------------------------------------------------------------------------------------------

    def train(self) -> TrainResult:
        config = self.config
        self.log = self.out / "log.jsonl"
        if self.main:
            for folder in (self.out, self.out / "checkpoints"):
                recover(folder)
            settings = dump_yaml(config)
            atomically(self.out / "config.yaml", lambda file: file.write_text(settings, encoding="utf-8"))
            cut_log(self.log, self.start)
        self._training_mode()
        window = Window()
        saved = None
        step = self.start
        reason = self._stop_reason(False, 0.0, step % config.run.log_every == 0)
        began = time.monotonic()
        data = self._batches()
        trackers = Trackers(self.accelerator, config, self.start)
        with trackers as self.trackers, Signals() as signals, self._progress() as bar:
            while step < config.optim.steps and reason == "steps":
                window.add(self._step(step, data), config.optim.batch_size)
                step += 1
                bar.update()
                # A record never mixes steps with and without a teacher.
                ends = (config.optim.steps, config.upcycle.distill_steps if self.teacher else None)
                logging = step % config.run.log_every == 0 or step in ends
                if logging:
                    bar.set_postfix_str(self._log_training(step, window))
                minutes = (time.monotonic() - began) / 60
                done = step == config.optim.steps
                reason = "steps" if done else self._stop_reason(signals.caught, minutes, logging)
                with window.paused():
                    if config.run.eval_every and step % config.run.eval_every == 0:
                        self._log_validation(step)
                    if step % config.run.checkpoint_every == 0 or done or reason != "steps":
                        saved = self._save(step)
        return TrainResult(step, reason, saved or self._save(step), self.log, self.main)

    def _step(self, step: int, data: Iterator[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        optim = self.config.optim
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(optim, step)
        draws = self._draw(step)
        parts: list[dict[str, Tensor]] = []
        for part in range(optim.accumulate):
            x, y = (tensor.to(self.device, non_blocking=True) for tensor in next(data))
            first = (part * self.accelerator.num_processes + self.accelerator.process_index) * self.share
            t, noise, unlabelled = (values[first : first + self.share] for values in draws)
            y = y.masked_fill(unlabelled, self.model.config.num_classes)
            last = part == optim.accumulate - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.net):
                values = self._loss(step, x, y, t, noise)
                self.accelerator.backward(values["loss"] / optim.accumulate)
            parts.append({name: value.detach() for name, value in values.items()})
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), optim.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update()
        means = {name: torch.stack([values[name] for values in parts]).mean() for name in parts[0]}
        return {**means, "grad_norm": norm}

    def _draw(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """What is random in a step: timesteps, noise and which images lose their label, for the whole batch.

        Every process and every accumulation pass takes its share of the same numbers, so how the batch is split changes
        nothing. For the same reason the model does not drop labels itself.
        """
        optim, model = self.config.optim, self.model.config
        generator = torch.Generator(self.device).manual_seed(seed_of(optim.seed, NOISE, step))
        t, noise = self.objective.draw((optim.batch_size, *self.data.shape), self.device, generator)
        chance = torch.rand(optim.batch_size, device=self.device, generator=generator)
        return t, noise, chance < model.class_dropout_prob

    def _training_mode(self) -> None:
        self.model.train()
        self.model.y_embedder.eval()

    def _loss(self, step: int, x: Tensor, y: Tensor, t: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """Means over the batch; ``loss`` is what is minimised."""
        router = self.config.router
        rho = torch.full(x.shape[:1], drop_fraction(router, self.config.optim.seed, step), device=self.device)
        routing: Any = None
        distill: Tensor | None = None
        if step >= self.config.upcycle.distill_steps:
            self.teacher = None
        teacher = self.teacher

        def predict(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            nonlocal routing, distill
            with self._autocast():
                if not self.dynamic:
                    return self.net(x, t, y).float()
                options = {"drop_fraction": rho, "return_routing": True, "return_states": teacher is not None}
                out, routing, *states = self.net(x, t, y, **options)
                if teacher is not None:
                    distill = teacher.loss(x, states[0], routing.selection)
                return out.float()

        diffusion = self.objective.losses(predict, x, y, t, noise)["loss"].mean()
        self.flops.add(x.shape[0], routing.selection.lengths if self.dynamic else None, teacher.flops if teacher else 0)
        if not self.dynamic:
            return {"loss": diffusion, "diffusion_loss": diffusion}
        target = compression_target(router, step)
        ratio = ratio_loss(routing.prob, routing.natural_mask, target, router.group_size)
        loss = diffusion + router.loss_weight * ratio
        if distill is not None:
            loss = loss + self.config.upcycle.distill_weight * distill
        return {
            "loss": loss,
            "diffusion_loss": diffusion,
            "ratio_loss": ratio,
            "kept": routing.mask.float().mean(),
            "natural": routing.natural_mask.float().mean(),
            "drop_fraction": rho[0],
            **({} if distill is None else {"distill_loss": distill}),
        }

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.optim.precision == "bf16")

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        optim, world = self.config.optim, self.accelerator.num_processes
        start, stop = self.start * optim.accumulate, optim.steps * optim.accumulate
        rank = self.accelerator.process_index
        return batches(self.data, start, stop, self.share * world, rank, world, self.config.data.workers)

    # --- records ----------------------------------------------------------------------------------------------------

    def _progress(self) -> Any:
        from tqdm import tqdm

        return tqdm(
            total=self.config.optim.steps, initial=self.start, disable=not self.main, unit="step", dynamic_ncols=True
        )

    def _log_training(self, step: int, window: Window) -> str:
        names, means = window.means()
        means = self.accelerator.reduce(means, reduction="mean")
        record: Record = {"step": step, **dict(zip(names, means.tolist(), strict=True))}
        if not math.isfinite(record["loss"]):
            raise FloatingPointError(f"the loss is {record['loss']} at step {step}; lower optim.lr or check the data")
        record["lr"] = learning_rate(self.config.optim, step - 1)
        if self.dynamic:
            record["target"] = compression_target(self.config.router, step - 1)
        record |= {"flops": self.flops.read(self.accelerator), "images_per_s": window.rate()}
        window.clear()
        self._write(record)
        kept = f" kept {record['kept']:.1%}" if self.dynamic else ""
        kept += f" distill {record['distill_loss']:.3f}" if "distill_loss" in record else ""
        return f"loss {record['loss']:.4f}{kept} {record['images_per_s']:.1f} images/s"

    def _log_validation(self, step: int) -> None:
        if self.held_out is None or not self.main:
            return
        losses = {}
        self.model.eval()
        for name, weights in (("val_loss", self.model.state_dict()), ("val_loss_ema", self.ema.state)):

            def predict(x: Tensor, t: Tensor, y: Tensor, weights: dict[str, Tensor] = weights) -> Tensor:
                with self._autocast():
                    return torch.func.functional_call(self.model, weights, (x, t, y)).float()

            images = self.config.run.eval_images
            losses[name] = validate(predict, self.objective, self.held_out, images, self.share, self.device)
        self._training_mode()
        self._write({"step": step, **losses})

    def _write(self, record: Record) -> None:
        if not self.main:
            return
        append(self.log, record)
        self.trackers.write(record)
        for callback in self.callbacks:
            callback(record)

    def _stop_reason(self, interrupted: bool, minutes: float, logging: bool) -> str:
        """Why to stop now, the same on every rank: with several, they agree at the steps that synchronise anyway."""
        run, flops = self.config.run, self.config.optim.flops
        spent = flops is not None and logging and self.flops.spent >= flops
        late = run.minutes is not None and minutes >= run.minutes
        code = 3 if interrupted else 2 if late else 1 if spent else 0
        if self.accelerator.num_processes > 1:
            if not logging:
                return "steps"
            codes = self.accelerator.gather(torch.tensor([code], device=self.device))
            code = int(codes.max())
        return ("steps", "flops", "minutes", "interrupt")[code]

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def _save(self, step: int) -> Path:
        folder = ckpt.checkpoint_path(self.out, step)
        flops = self.flops.read(self.accelerator)
        if self.main:
            trainer = {"step": step, "flops": flops, "config": to_dict(self.config)}
            notes = {"objective": self.config.diffusion.objective, **self.data.notes}
            ckpt.save_checkpoint(folder, self.model, self.ema.state, self.optimizer, trainer, notes)
            ckpt.keep_newest(folder, self.config.run.keep_checkpoints)
        self.accelerator.wait_for_everyone()
        return folder

    def _restore(self, saved: ckpt.Checkpoint) -> int:
        kind = type(self.model).__name__
        if saved.architecture != kind:
            raise ValueError(
                f"{saved.path} holds a {saved.architecture}; accepted: a {kind}, as the configuration says"
            )
        ckpt.load_weights(self.model, saved.model, saved.path)
        self.ema.load(saved.ema)
        ckpt.load_optimizer(self.model, self.optimizer, saved.optimizer, saved.path)
        step, self.flops.spent = (_whole(saved, key) for key in ("step", "flops"))
        return step


def _accelerator(config: TrainConfig) -> Any:
    try:
        from accelerate import Accelerator
    except ImportError:
        raise ModuleNotFoundError("training needs accelerate: pip install 'dcdit[train]'") from None
    run = config.run
    check_trackers(run.trackers)
    cpu = config.optim.device == "cpu"
    return Accelerator(cpu=cpu, mixed_precision="no", log_with=run.trackers, project_dir=run.out)


def _whole(saved: ckpt.Checkpoint, key: str) -> int:
    value = saved.trainer.get(key)
    if not isinstance(value, int):
        raise ValueError(f"{saved.path}/{ckpt.TRAINER} has the {key} {value!r}; accepted: a whole number")
    return value


def _share(config: TrainConfig, processes: int, dynamic: bool) -> int:
    """Images per forward pass of one process."""
    optim, group = config.optim, config.router.group_size
    share, rest = divmod(optim.batch_size, optim.accumulate * processes)
    if rest or not share:
        raise ValueError(
            f"optim.batch_size is {optim.batch_size}; accepted: a multiple of optim.accumulate times processes = "
            f"{optim.accumulate * processes}"
        )
    # A group of images that are not in one forward pass would be another group, depending on how the batch is split.
    split = share < optim.batch_size
    if dynamic and (split if group is None else share % group):
        raise ValueError(
            f"router.group_size is {'null' if group is None else group}; accepted: a divisor of the {share} images per "
            f"forward pass{'' if split else ', or null'}"
        )
    return share


def _check_fit(data: Samples, model: ckpt.Model) -> None:
    config = model.config
    accepted = (config.in_channels, *config.grid)
    if tuple(data.shape) != accepted:
        raise ValueError(
            f"the data has shape {tuple(data.shape)}, the model takes {accepted}; fit data.size, model.image_size or "
            "model.overrides (in_channels, grid)"
        )
    if len(data.class_names) > config.num_classes:
        raise ValueError(f"the data has {len(data.class_names)} classes; model.num_classes is {config.num_classes}")
