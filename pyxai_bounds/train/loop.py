"""The training loop: natural epochs, then an objective whose radius and weight ramp up. ``runs`` trains by a recipe."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from pyxai_bounds.ops.replay import GraphedStep
from pyxai_bounds.program import checkpointing
from pyxai_bounds.train.distributed import World
from pyxai_bounds.train.log import Epoch
from pyxai_bounds.train.objectives import natural
from pyxai_bounds.train.recipe import Loss, Recipe
from pyxai_bounds.train.schedules import learning_rate, ramp

OnEpoch = Callable[[int, float], None]  # (epochs done, mean loss of the last one)
OnCheckpoint = Callable[[int, dict[str, Tensor], dict[str, Any]], None]  # (step, tensors, JSON)
Saved = tuple[dict[str, Tensor], dict[str, Any]]  # what a checkpoint holds: tensors, and JSON

PROGRESS_SECONDS = 0.25
# What older versions of PyTorch call the same comes second.
_SYNC_BUFFERS = next(
    name
    for name in ("forward_sync_buffers", "broadcast_buffers")
    if name in signature(DistributedDataParallel).parameters
)


class TrainingDivergedError(RuntimeError):
    """The loss became NaN or infinite."""


@dataclass(frozen=True)
class Progress:
    """How far a training is. loss: the mean of this epoch's steps so far; done: the epoch, when it is complete."""

    step: int
    steps: int
    epoch: int
    epochs: int
    loss: float
    eps: float
    done: Epoch | None = None


OnProgress = Callable[[Progress], None]


@dataclass(frozen=True)
class _Hooks:
    on_epoch: OnEpoch | None
    on_progress: OnProgress | None
    on_checkpoint: OnCheckpoint | None
    checkpoint_every: int


def fit(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    objective: Loss = natural,
    recipe: Recipe | None = None,
    *,
    on_epoch: OnEpoch | None = None,
    on_progress: OnProgress | None = None,
    on_checkpoint: OnCheckpoint | None = None,
    checkpoint_every: int = 0,
    resume: Saved | None = None,
    processes: World | None = None,
    **changes: Any,
) -> list[float]:
    """Train ``model`` in place; returns the mean loss of each epoch.

    The settings are those of ``recipe``, each field of it also a keyword here; which data, model and objective it
    names is ``run``'s business. The natural epochs minimise cross entropy alone, so that the bounds start at a sensible
    scale. In the others ``objective(model, x, y, eps)`` takes over; eps ramps up, and so may its weight s in
    (1 − s)·cross entropy + s·objective. The gradient of a step is the mean over its parts (``accumulate``) and
    processes: an objective that is a mean over samples gives the same in one part as in many, one that mixes samples
    does not, nor do batch statistics, which are those of a part.

    Cross entropy trains in training mode, an objective in evaluation mode, since bounds refuse batch statistics.
    ``batch_norm`` says what then becomes of batch norm: "update", the running statistics first learn from natural
    forward passes over all parts; "frozen", they stay; "batch", training mode throughout, for objectives that
    bound nothing. Afterwards every module is in the mode that it was given in.

    ``cuda_graph`` records a step of the objective with all its parts, on a GPU and in a single process
    (:class:`GraphedStep` says what it must not do); to the objective, eps is then a tensor without dimensions.

    ``on_epoch`` and ``on_progress`` hear how far it is, ``on_checkpoint`` gets the whole state before the first step
    and every ``checkpoint_every`` steps, and ``resume`` is such a state to go on from. Only the first of several
    processes calls them.

    Every batch has the same size, so that bounds are captured once: each epoch leaves out a different remainder.
    The same weights, data and settings give the same result, bit for bit, on one machine with one thread.
    Shapes: x [N, ...], y [N] integer, on any device; each batch is moved to the model's. Raises ValueError for
    impossible settings, TrainingDivergedError when the loss is no longer finite.
    """
    recipe = replace(recipe or Recipe(), **changes)
    recipe.check()
    if not callable(objective):
        raise TypeError(
            f"objective must be a function (model, x, y, eps), such as xb.train.rec, got {objective!r}; names are what "
            "xb.train.Recipe(objective=...) and xb.train.run take."
        )
    processes = processes or World(device=next(model.parameters()).device)
    hooks = _Hooks(on_epoch, on_progress, on_checkpoint, checkpoint_every)
    with (
        _modes_restored(model),
        torch.random.fork_rng(devices=[processes.device] if processes.device.type == "cuda" else []),
    ):
        return _Training(model, x, y, objective, recipe, hooks, processes, resume).run()


@dataclass
class _State:
    """What changes from step to step besides tensors, and must be remembered to go on."""

    step: int = 0
    order: Tensor | None = None  # the sampler's state where this epoch began
    total: Tensor | float = 0.0  # of losses in this epoch
    history: list[Epoch] = field(default_factory=list)
    best: dict[str, Tensor] = field(default_factory=dict)
    best_loss: float = math.inf
    worse: int = 0  # epochs since the best one
    seconds: float = 0.0
    finished: bool = False


class _Step(nn.Module):
    """The loss of a batch. What DDP wraps: prediction and bounds happen inside its forward, so that its hooks fire."""

    def __init__(self, model: nn.Module, objective: Loss, recompute: bool) -> None:
        super().__init__()
        self.model = model
        self.objective = objective
        self.recompute = recompute

    def forward(self, x: Tensor, y: Tensor, eps: float, weight: float) -> Tensor:
        if weight == 0:
            return natural(self.model, x, y)
        loss = self.alone(x, y, eps)
        return loss if weight == 1 else self.mixed(loss, x, y, weight)

    def alone(self, x: Tensor, y: Tensor, eps: float) -> Tensor:
        with checkpointing(self.recompute):
            return self.objective(self.model, x, y, eps)

    def mixed(self, loss: Tensor, x: Tensor, y: Tensor, weight: Any) -> Tensor:
        return (1 - weight) * natural(self.model, x, y) + weight * loss


class _Training:
    """One call of ``fit``."""

    def __init__(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        objective: Loss,
        recipe: Recipe,
        hooks: _Hooks,
        processes: World,
        resume: Saved | None,
    ) -> None:
        if len(x) != len(y) or len(x) == 0:
            raise ValueError(f"x and y must have the same number of samples, at least one; got {len(x)} and {len(y)}.")
        self.model, self.recipe, self.hooks, self.processes = model, recipe, hooks, processes
        self.x, self.y = x, y
        self.train, self.held_out = _held_out(len(x), recipe.validation)
        self.batch_size = _batch_size(len(self.train), recipe, processes.size)
        self.per_epoch = len(self.train) // self.batch_size
        self.steps = recipe.steps or recipe.epochs * self.per_epoch
        is_natural = getattr(objective, "func", objective) is natural
        self.natural_steps = self.steps if is_natural else min(recipe.natural_epochs * self.per_epoch, self.steps)
        self.norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
        if self.norms and recipe.batch_norm == "frozen" and not recipe.start_from and self.natural_steps == 0:
            raise ValueError(
                "batch_norm='frozen' needs natural epochs, or a run to start from, to learn statistics in."
            )
        self.share_of = _sampling_weights(y[self.train], recipe.class_weights)
        self.loss = _Step(model, objective, recipe.recompute)
        self.parallel = _parallel(self.loss, processes)
        self.recorded = _recorded(self.loss, recipe.accumulate) if recipe.cuda_graph and processes.size == 1 else None
        self.optimiser = _optimiser(model, recipe)
        self.order = torch.Generator()
        self.state = _State()
        # The processes must not draw the same noise; the first draws what a single one would.
        torch.manual_seed(recipe.seed + 1_000_003 * processes.rank)
        self.order.manual_seed(recipe.seed)
        if resume is not None:
            self._restore(*resume)
        self.started = time.monotonic() - self.state.seconds

    def run(self) -> list[float]:
        state, epochs = self.state, math.ceil(self.steps / self.per_epoch)
        if state.step == 0 and self.hooks.checkpoint_every:
            self._checkpoint()
        batches: list[Tensor] = []
        told = time.monotonic()
        while state.step < self.steps and not state.finished:
            position = state.step % self.per_epoch
            if position == 0 or not batches:
                batches = self._batches(continues=position > 0)
            eps, weight, lr = self._scheduled(state.step)
            state.total = state.total + self._take_step(batches[position], eps, weight, lr)
            state.step += 1
            epoch = math.ceil(state.step / self.per_epoch)
            if position + 1 == self.per_epoch or state.step == self.steps:
                batches = []
                self._end_epoch(epoch, epochs, position + 1, eps, weight, lr)
            elif self.hooks.on_progress and self.processes.first and time.monotonic() > told + PROGRESS_SECONDS:
                told = time.monotonic()
                mean = float(state.total) / (position + 1)
                self.hooks.on_progress(Progress(state.step, self.steps, epoch, epochs, mean, eps))
            if self.hooks.checkpoint_every and state.step % self.hooks.checkpoint_every == 0:
                self._mean_total()
                self._check(float(state.total), epoch, eps, lr)
                self._checkpoint()
        if self.recipe.patience and state.best:
            self.model.load_state_dict(state.best)
        return [row.loss for row in state.history]

    def _scheduled(self, step: int) -> tuple[float, float, float]:
        """eps, weight and learning rate of a step."""
        recipe, done = self.recipe, step - self.natural_steps
        lr = learning_rate(recipe.lr_schedule, step, self.steps, recipe.lr, recipe.lr_steps, recipe.warmup)
        if done < 0:
            return 0.0, 0.0, lr
        eps_steps, weight_steps = self._ramp_steps()
        eps = ramp(recipe.eps_ramp, done, eps_steps, recipe.eps)
        return eps, ramp(recipe.weight_ramp, done, weight_steps, recipe.weight), lr

    def _ramp_steps(self) -> tuple[int, int]:
        steps = self.steps - self.natural_steps
        return int(steps * self.recipe.eps_ramp_share), int(steps * self.recipe.weight_ramp_share)

    def _batches(self, continues: bool) -> list[Tensor]:
        """The samples of each step of an epoch, the same in every process."""
        if continues and self.state.order is not None:
            self.order.set_state(self.state.order)
        self.state.order = self.order.get_state()
        if self.share_of is None:
            order = torch.randperm(len(self.train), generator=self.order)
        else:
            order = torch.multinomial(self.share_of, len(self.train), replacement=True, generator=self.order)
        order = self.train[order]
        return list(order[: self.per_epoch * self.batch_size].split(self.batch_size))

    def _take_step(self, batch: Tensor, eps: float, weight: float, lr: float) -> Tensor:
        """One step of the optimiser on this process's part of the batch; returns the part's loss."""
        recipe, processes = self.recipe, self.processes
        x, y = self._samples(batch.reshape(recipe.accumulate, processes.size, -1)[:, processes.rank].flatten())
        for group in self.optimiser.param_groups:
            group["lr"] = lr
        self.optimiser.zero_grad()
        self._set_mode(batch_statistics=weight == 0 or recipe.batch_norm == "batch")
        if self.norms and weight > 0 and recipe.batch_norm == "update":
            self._learn_statistics(x)
        differentiate = self._replay if self.recorded is not None and weight > 0 else self._differentiate
        loss = differentiate(x, y, eps, weight)
        if recipe.clip_gradient:
            nn.utils.clip_grad_norm_(self.model.parameters(), recipe.clip_gradient)
        self.optimiser.step()
        if weight == 0 or recipe.batch_norm == "batch":
            self._share_statistics()
        return loss.double()

    def _differentiate(self, x: Tensor, y: Tensor, eps: float, weight: float) -> Tensor:
        """The mean loss of the parts; adds the mean of their gradients to the parameters'."""
        total = torch.zeros((), dtype=torch.float64, device=x.device)
        parts = list(zip(self._parts(x), self._parts(y), strict=True))
        for i, part in enumerate(parts):
            with self._exchange_gradients(i + 1 == len(parts)):
                loss = self.parallel(*part, eps, weight)
                (loss / len(parts)).backward()
            total += loss.detach()
        return total / len(parts)

    def _parts(self, samples: Tensor) -> tuple[Tensor, ...]:
        return samples.chunk(self.recipe.accumulate)

    def _replay(self, x: Tensor, y: Tensor, eps: float, weight: float) -> Tensor:
        """The same by a recorded step, whose eps and weight are tensors: numbers would stay."""
        assert self.recorded is not None
        # Filled on the device: a copy from the host would wait for the step before.
        radius = torch.full((), eps, dtype=torch.float64, device=x.device)
        if weight == 1:
            return self.recorded[0](x, y, radius)
        return self.recorded[1](x, y, radius, torch.full((), weight, dtype=x.dtype, device=x.device))

    def _exchange_gradients(self, exchange: bool) -> AbstractContextManager[None]:
        """Only the last part's backward pass adds up the gradients of all processes."""
        if exchange or not isinstance(self.parallel, DistributedDataParallel):
            return nullcontext()
        return self.parallel.no_sync()

    def _samples(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        indices = indices.to(self.x.device)
        x = self.x[indices].to(self.processes.device, non_blocking=True)
        y = self.y[indices].to(self.processes.device, non_blocking=True)
        return (x.contiguous(memory_format=torch.channels_last) if self._channels_last(x) else x), y

    def _channels_last(self, x: Tensor) -> bool:
        return self.recipe.channels_last and x.dim() == 4

    def _set_mode(self, batch_statistics: bool) -> None:
        if self.model.training != batch_statistics:
            self.model.train(batch_statistics)

    @torch.no_grad()
    def _learn_statistics(self, x: Tensor) -> None:
        """A natural forward pass in which batch norm alone is in training mode: only running statistics change.

        All parts learn before the first loss, so that all losses are of one network.
        """
        for norm in self.norms:
            norm.train()
        for part in self._parts(x):
            self.model(part)
        for norm in self.norms:
            norm.eval()
        self._share_statistics()

    def _share_statistics(self) -> None:
        """All processes bound, and keep, the network with the mean of their running statistics."""
        self.processes.mean([t for m in self.norms for t in (m.running_mean, m.running_var) if t is not None])

    def _end_epoch(self, epoch: int, epochs: int, steps: int, eps: float, weight: float, lr: float) -> None:
        state, hooks = self.state, self.hooks
        self._mean_total()
        loss = float(state.total) / steps
        self._check(loss, epoch, eps, lr)
        state.total = 0.0
        row = Epoch(epoch, state.step, loss, eps, weight, lr, round(time.monotonic() - self.started, 3))
        if len(self.held_out):
            validation_loss, validation_accuracy = self._validate()
            row = replace(row, validation_loss=validation_loss, validation_accuracy=validation_accuracy)
            self._remember_best(row)
        state.history.append(row)
        if self.processes.first:
            if hooks.on_progress:
                hooks.on_progress(Progress(state.step, self.steps, epoch, epochs, loss, eps, row))
            if hooks.on_epoch:
                hooks.on_epoch(epoch, loss)

    def _remember_best(self, row: Epoch) -> None:
        """Only where nothing ramps any more: until then the loss is not comparable."""
        state, recipe = self.state, self.recipe
        ramps = zip((recipe.eps_ramp, recipe.weight_ramp), self._ramp_steps(), strict=True)
        ramping = max(steps if kind != "constant" else 0 for kind, steps in ramps)
        objective_starts_later = self.natural_steps < self.steps and row.step <= self.natural_steps
        if not recipe.patience or objective_starts_later or row.step < self.natural_steps + ramping:
            return
        assert row.validation_loss is not None
        if row.validation_loss < state.best_loss:
            state.best_loss, state.worse = row.validation_loss, 0
            state.best = {name: tensor.detach().cpu().clone() for name, tensor in self.model.state_dict().items()}
        else:
            state.worse += 1
            state.finished = state.worse >= recipe.patience

    def _validate(self) -> tuple[float, float]:
        """Mean loss, at the end of the ramps, and accuracy over the samples held out; evaluation mode."""
        self._set_mode(batch_statistics=False)
        size = min(self.batch_size // (self.recipe.accumulate * self.processes.size), len(self.held_out))
        batches = self.held_out[: len(self.held_out) // size * size].split(size)
        eps, weight = (0.0, 0.0) if self.natural_steps == self.steps else (self.recipe.eps, self.recipe.weight)
        sums = torch.zeros(3, dtype=torch.float64)
        for part in batches[self.processes.rank :: self.processes.size]:
            x, y = self._samples(part)
            with torch.no_grad():
                correct = (self.model(x).argmax(1) == y).double().mean().cpu()
            sums += torch.stack(
                (self.loss(x, y, eps, weight).detach().double().cpu(), correct, torch.ones(()).double())
            )
        self.processes.mean([sums])
        loss, accuracy, count = sums.tolist()
        return loss / count, accuracy / count

    def _mean_total(self) -> None:
        if isinstance(self.state.total, Tensor):
            self.processes.mean([self.state.total])

    def _check(self, loss: float, epoch: int, eps: float, lr: float) -> None:
        if not math.isfinite(loss):
            raise TrainingDivergedError(
                f"The loss became {loss} in epoch {epoch}, at eps {eps:.4g} and lr {lr:g}. Lower lr or the objective's "
                "weight, clip the gradient, train more natural epochs first, or use width='log', whose gradient stays "
                "small while the bounds are still wide."
            )

    # --- state that outlives the process ------------------------------------------------------------------------

    def _checkpoint(self) -> None:
        """Hand the whole state to the hook, in terms of tensors and JSON."""
        if self.hooks.on_checkpoint is None:
            return
        state, cuda = self.state, self.processes.device.type == "cuda"
        noise = torch.cuda.get_rng_state(self.processes.device) if cuda else torch.zeros(0, dtype=torch.uint8)
        generators = self.processes.gather((torch.get_rng_state(), noise))
        if not self.processes.first:
            return
        optimiser = self.optimiser.state_dict()
        values = {str(i): {k: v for k, v in entry.items() if not isinstance(v, Tensor)}
                  for i, entry in optimiser["state"].items()}  # fmt: skip
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        tensors |= {f"best.{name}": tensor for name, tensor in state.best.items()}
        tensors |= {
            f"optimiser.{i}.{key}": value
            for i, entry in optimiser["state"].items()
            for key, value in entry.items()
            if isinstance(value, Tensor)
        }
        for rank, (cpu, gpu) in enumerate(generators):
            tensors |= {f"generator.{rank}.cpu": cpu, f"generator.{rank}.cuda": gpu}
        # Within an epoch, the sampler starts again from where the epoch began; between two, from where it is.
        within = state.step % self.per_epoch and state.order is not None
        tensors["order"] = state.order if within else self.order.get_state()
        tensors["total"] = torch.as_tensor(state.total, dtype=torch.float64)
        self.hooks.on_checkpoint(state.step, tensors, {
            "history": [asdict(row) for row in state.history],
            "best_loss": state.best_loss if math.isfinite(state.best_loss) else None,
            "worse": state.worse,
            "finished": state.finished,
            "seconds": time.monotonic() - self.started,
            "processes": self.processes.size,
            "optimiser": {"state": values, "param_groups": optimiser["param_groups"]},
        })  # fmt: skip

    def _restore(self, tensors: dict[str, Tensor], saved: dict[str, Any]) -> None:
        if saved["processes"] != self.processes.size:
            raise ValueError(
                f"The checkpoint was written by {saved['processes']} processes; this run has {self.processes.size}. "
                "Start as many again: the result depends on it."
            )

        def under(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}

        self.model.load_state_dict(under("model."))
        values = {int(i): dict(entry) for i, entry in saved["optimiser"]["state"].items()}
        for name, tensor in under("optimiser.").items():
            i, _, key = name.partition(".")
            values.setdefault(int(i), {})[key] = tensor
        self.optimiser.load_state_dict({"state": values, "param_groups": saved["optimiser"]["param_groups"]})
        torch.set_rng_state(tensors[f"generator.{self.processes.rank}.cpu"])
        if self.processes.device.type == "cuda" and len(gpu := tensors[f"generator.{self.processes.rank}.cuda"]):
            torch.cuda.set_rng_state(gpu, self.processes.device)
        self.order.set_state(tensors["order"])
        self.state = _State(
            step=saved["step"], order=tensors["order"], total=tensors["total"].to(self.processes.device),
            history=[Epoch(**row) for row in saved["history"]], best=under("best."),
            best_loss=math.inf if saved["best_loss"] is None else saved["best_loss"],
            worse=saved["worse"], seconds=saved["seconds"], finished=saved["finished"],
        )  # fmt: skip


@contextmanager
def _modes_restored(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _held_out(samples: int, share: float) -> tuple[Tensor, Tensor]:
    """Indices to train on, and those to watch: the same in every run on the same samples."""
    if share == 0:
        return torch.arange(samples), torch.arange(0)
    count = max(1, round(share * samples))
    if count >= samples:
        raise ValueError(f"validation={share} leaves none of the {samples} samples to train on.")
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(0))
    return order[count:].sort().values, order[:count].sort().values


def _batch_size(samples: int, recipe: Recipe, processes: int) -> int:
    parts = recipe.accumulate * processes
    size = min(recipe.batch_size, samples // parts * parts)
    if size == 0 or size % parts:
        raise ValueError(
            f"batch_size={recipe.batch_size} of {samples} samples cannot be divided evenly among {processes} processes "
            f"and accumulate={recipe.accumulate} parts; choose a multiple of {parts}."
        )
    return size


def _sampling_weights(y: Tensor, class_weights: tuple[float, ...]) -> Tensor | None:
    if not class_weights:
        return None
    if int(y.max()) >= len(class_weights):
        raise ValueError(f"class_weights={class_weights} has {len(class_weights)} entries, but there are more classes.")
    return torch.tensor(class_weights, dtype=torch.float64)[y.cpu()]


def _parallel(step: _Step, processes: World) -> nn.Module:
    if processes.size == 1:
        return step
    # Biases have no gradient where only the width of a logit gradient is minimised. Batch norm's statistics are
    # averaged over the processes after each step; DDP would overwrite them with the first one's.
    warnings.filterwarnings("ignore", message=".*find_unused_parameters=True was specified.*")
    return DistributedDataParallel(step, find_unused_parameters=True, **{_SYNC_BUFFERS: False})  # type: ignore[arg-type]


def _recorded(step: _Step, parts: int) -> tuple[GraphedStep, GraphedStep]:
    """The objective alone, (x, y, eps), and beside cross entropy, (x, y, eps, weight)."""

    def mixed(x: Tensor, y: Tensor, eps: Any, weight: Tensor) -> Tensor:
        return step.mixed(step.alone(x, y, eps), x, y, weight)

    return GraphedStep(step.alone, step.parameters(), parts), GraphedStep(mixed, step.parameters(), parts)


def _optimiser(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    parameters = [p for p in model.parameters() if p.requires_grad]
    if recipe.optimiser == "sgd":
        return torch.optim.SGD(parameters, lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[recipe.optimiser]
    return kind(parameters, lr=recipe.lr, betas=(0.9, recipe.beta2), weight_decay=recipe.weight_decay)
