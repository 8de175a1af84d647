"""Checks of the update of a phase's first iteration, of every role that it trains."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..hf.shares import whole_tensors
from ..hf.weights import Table, parameters
from ..models.residency import Presence
from ..models.stream import infer, train_step
from ..models.work import Work
from .findings import EPS, Finding, Skipped, bound, worst
from .measure import Gradient, Iteration, Rounding, gather_gradient, gradient
from .rounding import SAMPLES, moved

_PACKED = 3  # rows of the longest length that a packed micro-batch holds
NORM = 1e-3  # of a gradient: sums of up to 1e9 squares in float32
_SUMS = 4  # that round, one after the other, on the way to a loss: of tokens, micro-batches, replicas
_BENT = 0.02  # share by which a loss may differ from a straight line so near to where it is
_LEAST = 10  # times what rounding does, of a change that is still to be seen

Check = Callable[[Iteration], Finding]


def row_losses(works: Sequence[Work]) -> Tensor:
    """What each row adds to the loss of a role's step, without the step. Their sum is the loss."""
    parts = []
    for work in works:

        def fn(output: Tensor, batch: Mapping[str, Tensor], work: Work = work) -> Tensor:
            rows = []
            for i in range(0, len(output), work.together):
                part = work.prepare({name: batch[name][i : i + work.together] for name in work.batch})
                loss, count, _ = work.fn(output[i : i + work.together], part)
                rows += [torch.stack([loss.double(), count.to(loss.device).double()])] * work.together
            return torch.stack(rows)

        parts.append(infer([replace(work, fn=fn)])[0] / work.together)
    losses, counts = torch.cat(parts).unbind(1)
    return losses / counts.sum()


def whole_loss(works: Sequence[Work]) -> float:
    """The loss of a role's step without the step."""
    return float(row_losses(works).sum())


def measure_rounding(it: Iteration) -> None:
    """Makes every step again with weights that are off by their last bits."""
    for name, works in it.works.items():
        role = works[0].role
        with role.on_device(Presence.TRAINING):
            role.gather()
            losses = row_losses(works)
            with moved(role):
                change = row_losses(works) - losses
            gradients = [_moved_gradient(works, sample, it) for sample in SAMPLES]
            loss, size, off = (float(x.sum()) for x in (losses, losses.abs(), change.abs()))
            it.rounding[name] = Rounding(loss, size, off, gradients)


def _moved_gradient(works: Sequence[Work], sample: int, it: Iteration) -> Gradient:
    role = works[0].role
    with moved(role, sample):
        train_step(works, it.ctx.metrics, it.ctx.trace)
    it.ctx.metrics.reduce(it.ctx.mesh)
    return gradient(role, it.phase)


def loss_finding(
    found: float, wanted: float, size: float, rounding: float, detail: str, condition: float = 1.0
) -> Finding:
    """How far two losses are apart, as a share of what rows have in them: what cancels has rounded all the same.

    Args:
        condition: how many times larger the numbers are that those in the loss are differences of.
    """
    size = size or 1.0
    return Finding(abs(found - wanted) / size, bound(rounding / size, _SUMS * condition), detail)


def reported_loss(it: Iteration) -> Finding:
    """What the step reports, of every role, against the loss of the same rows without a step."""
    found = [(name, it.figures[f"{name}/loss"], x) for name, x in it.rounding.items()]
    return worst(loss_finding(loss, x.without_step, x.size, x.loss, name) for name, loss, x in found)


def slope(it: Iteration) -> Finding:
    """How much the losses change along the gradients, by two forwards, against what the gradients promise.

    The change that is asked for is between what rounding does to the loss and the loss itself, as many times the one as
    the other is that; and less as long as that is too much for a straight line, as where values are soon clipped. The
    load-balancing loss of experts, which rows have no share of, is left out of both.
    """
    found = []
    for name, works in it.works.items():
        if not all(work.is_derivative for work in works):
            continue
        rounding = it.rounding[name]
        noise = rounding.loss + EPS * rounding.size
        with works[0].role.unbalanced():
            first = _slope(works, it, step := math.sqrt(noise * rounding.size), noise)
            others = (_slope(works, it, step / 4**i, noise) for i in range(1, 10) if step / 4**i > _LEAST * noise)
            found.append(next((finding for finding in itertools.chain([first], others) if finding.excess <= 1), first))
    if not found:
        raise Skipped("the gradient holds a part of the loss constant")
    return worst(found)


def _slope(works: Sequence[Work], it: Iteration, step: float, noise: float) -> Finding:
    role, ratio = works[0].role, 0.0
    if step and (norm := it.figures[f"{role.name}/grad_norm"]):
        with role.on_device(Presence.TRAINING):
            train_step(works, it.ctx.metrics, it.ctx.trace)
            it.ctx.metrics.reduce(it.ctx.mesh)
            gather_gradient(role)
            role.gather()
            promised, change = _walk(works, step / norm**2 / 2)
        ratio = promised / change if change else math.inf
    limit = _BENT + (2 * noise / step if step else 0.0)  # of two losses
    return Finding(abs(ratio - 1), limit, f"{role.name}: the gradient is {ratio:.3g} times the loss's change")


@torch.no_grad()
def _walk(works: Sequence[Work], step: float) -> tuple[float, float]:
    """What a role's loss should change by, and does, between weights moved along the gradient and against it."""
    role = works[0].role
    mine = dict(parameters(role.chunks))
    before = {name: parameter.clone() for name, parameter in mine.items()}
    losses, ends = [], {}
    for sign in (1, -1):
        for name, parameter in mine.items():
            parameter.copy_(before[name] + sign * step * parameter.main_grad)  # type: ignore[attr-defined]
        losses.append(whole_loss(works))
        if sign == 1:
            ends = {name: parameter.clone() for name, parameter in mine.items()}
    # between the ends as the weights' type has rounded them, in the gradient's place
    products = {}
    for name, parameter in mine.items():
        gradient = parameter.main_grad  # type: ignore[attr-defined]
        products[name] = gradient.mul_(ends[name].float() - parameter.float())
        parameter.copy_(before[name])
    parts = whole_tensors(products, Table(role.model, role.head), role.mesh)
    promised = sum(float(tensor.double().sum()) for _, tensor in parts)
    return role.mesh.from_main(promised), losses[0] - losses[1]


def complete(it: Iteration) -> Finding:
    """Parameters that nothing flows back to; experts that no token chose are not among them."""
    names = [
        f"{role}: {name}"
        for role, found in it.gradients.items()
        for name, norm in found.norms.items()
        if norm == 0 and ".experts." not in name
    ]
    return Finding(len(names), 0, f"none in {names[0]}" if names else "")


def micro_batches(it: Iteration) -> Finding:
    """Loss and gradients in micro-batches of one row (or pair), and of as many as a number of tokens holds."""
    found = []
    for name, works in it.works.items():
        work, role = works[0], works[0].role
        together = _PACKED * work.together * int(work.batch["lengths"].max())
        for what, budget in ((f"{name} row by row", 1), (f"{name} packed", together)):
            role.micro_batch_tokens = budget
            with role.on_device(Presence.TRAINING):
                train_step([replace(w) for w in works], it.ctx.metrics, it.ctx.trace)
                role.gather()
                ours = gradient(role, it.phase)
            role.micro_batch_tokens = None
            loss = it.ctx.metrics.reduce(it.ctx.mesh)[0].get(f"{name}/loss", math.nan)
            found += distances(name, what, loss, ours, it)
    return worst(found)


def distances(role: str, what: str, loss: float, found: Gradient, wanted: Iteration) -> list[Finding]:
    """How far loss and gradient of a role are from an iteration's: of the loss, and where the gradient is furthest."""
    rounding, gradients = wanted.rounding[role], wanted.gradients[role]
    of_loss = loss_finding(loss, wanted.figures[f"{role}/loss"], rounding.size, rounding.loss, f"{what}, loss")
    return [of_loss, gradients.finding(found, rounding, what)]
