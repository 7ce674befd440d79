"""How many replicas there should be: a rule that knows neither the clock nor what a replica is."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

from servesim.config.fleet import AutoscalerConfig
from servesim.engine.router import held_tokens, outstanding
from servesim.engine.scheduler import Scheduler

__all__ = ["Autoscaler"]

_TOLERANCE = 1e-9  # a rounding error more than the target is no reason for another replica


class Autoscaler:
    """As many replicas as bring the load of each to the target, as Kubernetes' autoscaler counts them.

    More at once; fewer only when ``cooldown_s`` have passed since the number was last raised or lowered.
    """

    def __init__(self, rule: AutoscalerConfig) -> None:
        self.rule = rule
        self._changed_s = 0.0

    def wanted(self, serving: Sequence[Scheduler], current: int, now_s: float) -> int:
        """How many there should be, of ``current`` that serve or start."""
        rule = self.rule
        load: float = sum(map(outstanding if rule.metric == "outstanding" else _kv_usage, serving))
        wanted = min(max(ceil(load / rule.target - _TOLERANCE), rule.min_replicas), rule.max_replicas)
        if wanted == current or (wanted < current and now_s < self._changed_s + rule.cooldown_s):
            return current
        self._changed_s = now_s
        return wanted


def _kv_usage(scheduler: Scheduler) -> float:
    usage = scheduler.kv.account.usage(*scheduler.levels())
    return held_tokens(scheduler) / (sum(usage) - usage.logical)
