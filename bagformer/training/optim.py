"""Optimisers and schedules of timm, with the parameters sorted and frozen by name."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from fnmatch import fnmatch
from typing import Any

import torch
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import create_scheduler_v2
from torch import nn

from bagformer.training.config import ConfigError, OptimConfig, TrainConfig

# The original warms up in steps of so many iterations.
_ORIGINAL_STRIDE = 100


def freeze(model: nn.Module, names: list[str]) -> int:
    """Stop the parameters of these modules, or those that a pattern matches, from learning.

    Returns how many values that are. Raises ConfigError for a name that matches nothing.
    """
    parameters = dict(model.named_parameters())
    for name in names:
        hit = [key for key in parameters if key.startswith(f"{name}.") or fnmatch(key, name)]
        if not hit:
            known = ", ".join(child for child, _ in model.named_children())
            raise ConfigError(f"freeze: {name!r} matches no parameter; modules are {known}")
        for key in hit:
            parameters[key].requires_grad_(False)
    return sum(p.numel() for p in parameters.values() if not p.requires_grad)


def train_mode(model: nn.Module) -> None:
    """Training mode, except for frozen modules: these draw no dropout and move no statistics."""
    model.train()
    for module in model.modules():
        own = list(module.parameters())
        if own and not any(parameter.requires_grad for parameter in own):
            module.eval()


def spared_by_timm(model: nn.Module) -> set[str]:
    """Names of the parameters that ``no_weight_decay`` of a module inside ``model`` lists."""
    found: set[str] = set()
    for prefix, module in model.named_modules():
        if callable(listed := getattr(module, "no_weight_decay", None)):
            found |= {f"{prefix}.{name}" if prefix else name for name in listed()}
    return found


def decays(name: str, parameter: torch.Tensor, rule: str, spared: Collection[str] = ()) -> bool:
    """Whether weight decay applies to a parameter, under the rule of ``optim.param_groups``.

    ``spared``: what :func:`spared_by_timm` gives, which the rule ``default`` heeds.
    """
    if rule == "original":
        return parameter.dim() != 1 and not name.endswith(".bias")
    return parameter.dim() > 1 and not name.endswith(".bias") and name not in spared


def param_groups(model: nn.Module, options: OptimConfig) -> list[dict[str, Any]]:
    """Two groups of the parameters that learn: with weight decay and without."""
    groups: dict[bool, list[Any]] = {True: [], False: []}
    spared = spared_by_timm(model)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[decays(name, parameter, options.param_groups, spared)].append(parameter)
    if not any(groups.values()):
        raise ConfigError("freeze: nothing is left to learn")
    decay = {True: options.weight_decay, False: 0.0}
    return [{"params": own, "weight_decay": decay[k]} for k, own in groups.items() if own]


def make_optimizer(model: nn.Module, options: OptimConfig) -> torch.optim.Optimizer:
    """Raises ConfigError for a name or an option that timm does not know."""
    if options.name not in list_optimizers(exclude_filters=["bnb*", "fused*", "apex*"]):
        raise ConfigError(f"optim.name: timm.optim has no {options.name!r}")
    if options.name == "adahessian":
        raise ConfigError(
            "optim.name: 'adahessian' needs second derivatives, which maxsim does not have"
        )
    extra = dict(options.options)
    if options.betas is not None:
        extra["betas"] = tuple(options.betas)
    if options.eps is not None:
        extra["eps"] = options.eps
    groups = param_groups(model, options)
    try:
        return create_optimizer_v2(groups, opt=options.name, lr=options.lr, **extra)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"optim: {options.name} does not take {extra}: {error}") from error


class Schedule:
    """The learning rate as a function of the number of updates already made."""

    def __init__(
        self, optimizer: torch.optim.Optimizer, config: TrainConfig, total: int, per_epoch: int
    ) -> None:
        options, self.per_epoch = config.schedule, per_epoch
        if options.name == "none" and options.warmup:
            raise ConfigError(
                "schedule.warmup: with schedule.name none nothing sets the rate; take constant"
            )
        self.original = options.unit == "original"
        self.warmup = self._warmup(options.warmup, total)
        name = {"linear": "poly"}.get(options.name, options.name)
        extra = dict(options.options)
        if options.name == "linear":
            extra["decay_rate"] = 1.0
        length = -(-total // per_epoch) if self.original else total
        if self.original:
            extra.setdefault("warmup_prefix", True)
        unit: dict[str, Any] = (
            {} if self.original else {"step_on_epochs": False, "updates_per_epoch": 1}
        )
        try:
            self.scheduler, _ = create_scheduler_v2(
                optimizer,
                name,
                num_epochs=length,
                warmup_epochs=self.warmup,
                warmup_lr=options.warmup_lr,
                min_lr=options.min_lr,
                **unit,
                **extra,
            )
        except (TypeError, ValueError) as error:
            raise ConfigError(f"schedule: {options.name}: {error}") from error

    def _warmup(self, warmup: float, total: int) -> int:
        if 0 < warmup < 1 and not self.original:
            warmup = warmup * total
        if not self.original and warmup >= total:
            raise ConfigError(f"schedule.warmup: {warmup:g} of {total} updates leave none to learn")
        return round(warmup)

    def time(self, update: int) -> int:
        """The scheduler's own time before update ``update`` (from 0)."""
        if not self.original:
            return update
        epoch, place = divmod(update, self.per_epoch)
        if epoch:
            return epoch + self.warmup
        return min(max(place - 1, 0) // _ORIGINAL_STRIDE, self.warmup)

    def set(self, update: int) -> None:
        """Give every group its rate for update ``update`` (from 0)."""
        if self.scheduler is None:
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            step = self.scheduler.step if self.original else self.scheduler.step_update
            step(self.time(update))
