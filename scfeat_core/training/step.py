"""One optimiser step of an objective: gradients over all processes, in pieces where memory is short.

A step has two collectives, whatever happens in it: the sums that the means are made of, and the gradients. A process
that runs out of memory computes its share again in smaller pieces, with the same result but for what looks at several
pairs at once (see :class:`_Work`); one that cannot do it at all makes all of them skip the step.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from scfeat_core.errors import ScfeatError
from scfeat_core.training.config import TrainConfig
from scfeat_core.training.distributed import Group
from scfeat_core.training.loading import Batch, Share, part_of
from scfeat_core.training.objectives import Losses, Network, Objective, Term
from scfeat_core.training.optimisation import learning_rates, network_parts, set_modes
from scfeat_core.training.run import TrainState

log = logging.getLogger(__name__)

MAX_SKIPPED = 50  # steps in a row, after which a run ends
MAX_SUMS = 128  # numbers that the processes add up in a step: a fixed count, as one of them may have none to give
Sums = dict[str, Tensor]
T = TypeVar("T")


def train_step(
    state: TrainState, batch: Batch, share: Share, objective: Objective, config: TrainConfig, group: Group
) -> Sums:
    """Change the network once; returns the means of all terms and values, over all processes.

    share: what ``batch`` is of the whole. A loss or gradient that is not finite, or a share that does
    not fit into memory in any way, changes nothing, BatchNorm statistics neither, and is counted in
    ``state.incidents``. Raises ScfeatError after many of them in a row.
    """
    rates = learning_rates(state.step, config, state.seconds)
    for param_group, rate in zip(state.optimizer.param_groups, rates, strict=True):
        param_group["lr"] = rate
    set_modes(state.model, config)
    device = batch[0].device
    state.optimizer.zero_grad(set_to_none=True)
    work = _Work(state, batch, share, objective, config)
    totals = _join(work.forward(), group, device)
    if totals is None:
        return _skip(state, work, "too_large_for_memory", {})
    means = _means(totals)
    if not torch.isfinite(means["loss"]):
        return _skip(state, work, "loss_not_finite", {})
    if not _join_gradients(state, work.backward(totals), group):
        return _skip(state, work, "too_large_for_memory", means)
    state.scaler.unscale_(state.optimizer)
    norms = _clip(state, config)
    if not torch.isfinite(norms).all():
        state.scaler.update()  # a scaler learns from what overflowed
        return _skip(state, work, "gradient_not_finite", means)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    if config.bn_mode == "train":
        group.mean_buffers(state.model)
    state.average.update_parameters(state.model)
    state.skipped = 0
    return means


class _Work:
    """This process's part of a step, whole or in ``state.pieces`` pieces.

    Pieces give the result of the whole but for what looks at several pairs at once: statistics of BatchNorm in training
    mode, the negatives of other pairs (of warps and of tracks), the mean repeatability of warps, and the error that
    rewards of the type ``fmatrix_legacy`` are relative to.
    """

    def __init__(
        self, state: TrainState, batch: Batch, share: Share, objective: Objective, config: TrainConfig
    ) -> None:
        self._state = state
        self._batch = batch
        self._share = share
        self._pairs = share.batch_size
        self._objective = objective
        self._network = Network(state.model, config.precision, config.align_local_grad)
        self._graph: Losses | None = None
        self._statistics = [(buffer, buffer.clone()) for buffer in _gathering(state.model)]

    def restore_statistics(self) -> None:
        """BatchNorm statistics as they were before the step: no forward pass but the last one may count."""
        for buffer, before in self._statistics:
            buffer.copy_(before)

    def forward(self) -> Sums | None:
        """Numerators and denominators of all means; None where memory is short for a single pair."""
        if self._state.pieces == 1:
            self._graph = self._attempt(lambda: self._losses(0, self._pairs))
            if self._graph is not None:
                return _sums(self._graph, self._pairs)
        return self._in_pieces(self._measure)

    def backward(self, totals: Sums) -> bool:
        """Add the gradient of this share to the parameters; False where memory is short for a single pair."""
        if self._graph is not None and self._attempt(lambda: self._backward(totals)):
            return True
        self._graph = None
        return self._in_pieces(lambda: self._backward_pieces(totals)) is not None

    def _losses(self, start: int, stop: int) -> Losses:
        step = self._state.step
        generators = self._share.generators(step)[start:stop]  # new ones, as each attempt has to draw the same
        return self._objective.losses(self._network, part_of(self._batch, start, stop), step, generators)

    def _measure(self) -> Sums:
        """The sums without a graph: their totals must be known before the first piece goes backward."""
        sums: Sums = {}
        self.restore_statistics()
        with torch.no_grad():
            for start, stop in self._pieces():
                for name, value in _sums(self._losses(start, stop), stop - start).items():
                    sums[name] = sums[name] + value if name in sums else value
        return sums

    def _backward(self, totals: Sums) -> bool:
        assert self._graph is not None
        self._state.scaler.scale(_scaled_loss(self._graph, totals)).backward()
        return True

    def _backward_pieces(self, totals: Sums) -> bool:
        self._state.optimizer.zero_grad(set_to_none=True)
        self.restore_statistics()
        for start, stop in self._pieces():
            self._state.scaler.scale(_scaled_loss(self._losses(start, stop), totals)).backward()
        return True

    def _pieces(self) -> list[tuple[int, int]]:
        count = self._pairs
        size = -(-count // min(self._state.pieces, count))
        return [(start, min(start + size, count)) for start in range(0, count, size)]

    def _in_pieces(self, compute: Callable[[], T]) -> T | None:
        """``compute()`` in more and more pieces until they fit, or None; the number stays for the steps to come."""
        count = self._pairs
        self._state.pieces = min(max(2, self._state.pieces), count)
        while (done := self._attempt(compute)) is None and self._state.pieces < count:
            self._state.pieces = min(2 * self._state.pieces, count)
        return done

    def _attempt(self, compute: Callable[[], T]) -> T | None:
        try:
            return compute()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            reason = (str(error) or type(error).__name__).splitlines()[0]
        # Only here are the exception, and with it the tensors of its frames, gone.
        state = self._state
        state.incidents["out_of_memory"] += 1
        log.warning(
            "step %d: out of memory, %d pairs in %d piece(s); now in smaller ones; %s",
            state.step,
            self._pairs,
            state.pieces,
            reason,
        )
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return None


def _gathering(model: nn.Module) -> list[Tensor]:
    """The buffers that a forward pass changes: those of BatchNorm in training mode."""
    norms = (module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm))
    return [buffer for norm in norms if norm.training for buffer in norm.buffers()]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the memory of a device or of the machine was too small."""
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
        return True
    return "can't allocate memory" in str(error) or "not enough memory" in str(error)


def _sums(losses: Losses, pairs: int) -> Sums:
    """Numerators and denominators, detached: what is added up over pieces and processes."""
    sums: Sums = {}
    for name, term in losses.terms.items():
        share = _share_of(term)
        sums[f"{name}/share"] = share
        # A mean over nothing adds nothing, whatever it is said to be.
        sums[name] = torch.where(share > 0, term.value.detach().float() * share, 0.0)
        sums[f"{name}/weight"] = torch.full_like(share, term.weight * pairs)
    for name, value in losses.values.items():
        sums[name] = value.detach().float() * pairs
    device = next(iter(sums.values())).device
    return sums | {"pairs": torch.tensor(float(pairs), device=device)}


def _share_of(term: Term) -> Tensor:
    return torch.as_tensor(term.share, dtype=torch.float32, device=term.value.device)


def _means(totals: Sums) -> Sums:
    """What is logged: the mean of each term and value, and the loss that they add up to."""
    pairs = totals["pairs"]
    means: Sums = {"loss": torch.zeros_like(pairs)}
    for name, total in totals.items():
        if f"{name}/share" in totals:
            means[name] = total / totals[f"{name}/share"].clamp_min(1e-12)
            means["loss"] = means["loss"] + totals[f"{name}/weight"] / pairs * means[name]
        elif "/" not in name and name != "pairs":
            means[name] = total / pairs
    return means


def _scaled_loss(losses: Losses, totals: Sums) -> Tensor:
    """This piece's contribution to the loss over all pieces and processes."""
    parts = []
    for name, term in losses.terms.items():
        if not term.value.requires_grad:
            continue
        share = _share_of(term)
        factor = term.weight * (share / totals[f"{name}/share"].clamp_min(1e-12))
        parts.append(torch.where(share > 0, term.value * factor, 0.0))
    return torch.stack(parts).sum()


def _join(sums: Sums | None, group: Group, device: torch.device) -> Sums | None:
    """The sums over all processes; None where one of them has none to give."""
    if group.world == 1:
        return sums
    vector = torch.zeros(MAX_SUMS + 1, device=device)
    names = sorted(sums or {})
    if sums is None:
        vector[-1] = 1.0
    else:
        vector[: len(names)] = torch.stack([sums[name].float() for name in names])
    group.sum(vector)
    return dict(zip(names, vector, strict=False)) if sums is not None and vector[-1] == 0 else None


def _join_gradients(state: TrainState, computed: bool, group: Group) -> bool:
    """Add the gradients of all processes up; False where one of them could not compute its own."""
    if group.world == 1:
        return computed
    parameters = [p for p in state.model.parameters() if p.requires_grad]
    there = torch.tensor([float(p.grad is not None) for p in parameters], device=parameters[0].device)
    failed = torch.full_like(there[:1], float(not computed))
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    group.sum_all([failed, there, *gradients])
    for parameter, gradient, used in zip(parameters, gradients, there.tolist(), strict=True):
        parameter.grad = gradient if used else None  # unused ones are passed over by the optimiser
    return float(failed) == 0


def _clip(state: TrainState, config: TrainConfig) -> Tensor:
    """Limit the gradient of each part of the network; returns the norms before that."""
    limit = config.clip_norm if config.grad_clip else torch.inf
    norms = [torch.nn.utils.clip_grad_norm_(part.parameters(), limit) for part in network_parts(state.model)]
    return torch.stack([norm.to(norms[0].device) for norm in norms])


def _skip(state: TrainState, work: _Work, incident: str, means: Sums) -> Sums:
    work.restore_statistics()
    state.skipped += 1
    state.incidents[incident] += 1
    state.optimizer.zero_grad(set_to_none=True)
    log.warning("step %d: %s; skipped (%d so far)", state.step, incident.replace("_", " "), state.incidents[incident])
    if state.skipped == MAX_SKIPPED:  # the same in all processes
        raise ScfeatError(no_step_text(state))
    return means


def no_step_text(state: TrainState) -> str:
    """What to do about steps that were all skipped."""
    counts = ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in state.incidents.items())
    return (
        f"expected steps that change the network, found the last {state.skipped} up to step {state.step} all skipped "
        f"({counts}); for loss or gradient not finite lower optimal_lrs, set grad_clip: true and precision: float32, "
        "and look at the data (--check-data) and the weights of load_path; for too large for memory lower "
        "data_config_train.size"
    )
