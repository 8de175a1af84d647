"""Checks of the update of a phase's first iteration, of every role that it trains."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..hf.files import SCORE_BIAS
from ..hf.weights import Table, parameters, whole_tensors
from ..models.residency import Presence
from ..models.stream import Work, infer, train_step
from .findings import TOLERANCES, Finding, Tolerance, relative
from .measure import Gradient, Iteration, gather_gradient, gradient

_PACKED = 3  # rows of the longest length that a packed micro-batch holds

Check = Callable[[Iteration], Finding]


def tolerance(it: Iteration) -> Tolerance:
    return TOLERANCES[next(iter(it.ctx.roles.values())).dtype]  # the same for all of a run


def whole_loss(works: Sequence[Work]) -> float:
    """The loss of a role's step without the step."""
    parts = []
    for work in works:

        def fn(output: Tensor, batch: Mapping[str, Tensor], work: Work = work) -> Tensor:
            rows = []
            for i in range(0, len(output), work.together):
                part = {name: field[i : i + work.together] for name, field in batch.items()}
                loss, count, _ = work.fn(output[i : i + work.together], part)
                rows += [torch.stack([loss.double(), count.to(loss.device).double()])] * work.together
            return torch.stack(rows)

        parts.append(infer([replace(work, fn=fn)])[0].sum(0) / work.together)
    loss, count = torch.stack(parts).sum(0)
    return float(loss / count)


def reported_loss(it: Iteration) -> Finding:
    """What the step reports, of every role, against the loss of the same rows without a step."""
    gaps = {name: relative(it.figures[f"{name}/loss"], whole_loss(works)) for name, works in it.works.items()}
    worst = max(gaps, key=lambda name: gaps[name])
    return Finding(gaps[worst], tolerance(it).loss, worst)


def slope(it: Iteration) -> Finding:
    """How much the losses change along the gradients, by two forwards, against what the gradients promise."""
    ratios = {name: _slope(works, it) for name, works in it.works.items()}
    worst = max(ratios, key=lambda name: abs(ratios[name] - 1))
    detail = f"{worst}: the gradient is {ratios[worst]:.3g} times the loss's change"
    return Finding(abs(ratios[worst] - 1), tolerance(it).slope, detail)


def _slope(works: Sequence[Work], it: Iteration) -> float:
    """A gradient's promise as a multiple of the change that comes; 0 of no gradient at all."""
    role = works[0].role
    if not (norm := it.figures[f"{role.name}/grad_norm"]):
        return 0.0
    with role.on_device(Presence.TRAINING):
        train_step(works, it.ctx.metrics, it.ctx.trace)
        it.ctx.metrics.reduce(it.ctx.mesh)
        gather_gradient(role)
        role.gather()
        promised, change = _walk(works, tolerance(it).step / norm**2 / 2)
    return promised / change if change else math.inf


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
        # a reward model's bias makes no difference between two answers
        if norm == 0 and ".experts." not in name and (it.phase, name) != ("reward", SCORE_BIAS)
    ]
    return Finding(len(names), 0, f"none in {names[0]}" if names else "")


def micro_batches(it: Iteration) -> Finding:
    """Loss and gradients in micro-batches of one row (or pair), and of as many as a number of tokens holds."""
    found = {}
    for name, works in it.works.items():
        work, role = works[0], works[0].role
        together = _PACKED * work.together * int(work.batch["lengths"].max())
        for what, budget in ((f"{name} row by row", 1), (f"{name} packed", together)):
            role.micro_batch_tokens = budget
            with role.on_device(Presence.TRAINING):
                train_step([replace(w) for w in works], it.ctx.metrics, it.ctx.trace)
                role.gather()
                ours = gradient(role)
            role.micro_batch_tokens = None
            loss = it.ctx.metrics.reduce(it.ctx.mesh)[0].get(f"{name}/loss", math.nan)
            found[what] = distance(name, (loss, ours), it)
    worst = max(found, key=lambda what: found[what][0])
    return Finding(found[worst][0], tolerance(it).gradient, f"{worst}, {found[worst][1]}")


def distance(role: str, found: tuple[float, Gradient], wanted: Iteration) -> tuple[float, str]:
    """How far loss and gradient of a role are from an iteration's, and where most."""
    loss = relative(found[0], wanted.figures[f"{role}/loss"])
    gap, where = found[1].gap(wanted.gradients[role])
    return (gap, where) if gap > loss else (loss, "loss")
