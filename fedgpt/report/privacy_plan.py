"""`fedgpt privacy plan`: the epsilon of a private run, and how its options change it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from fedgpt.core.errors import ConfigError
from fedgpt.core.options import RunOptions
from fedgpt.model.shape import count_trainable
from fedgpt.privacy.accounting import epsilon_of, renyi_epsilon
from fedgpt.privacy.plan import PrivacyPlan, make_plan
from fedgpt.privacy.statement import rows, statement


def refuse_no_privacy(o: RunOptions) -> None:
    """Raise ConfigError for privacy=none, before text is read for a plan."""
    if o.privacy.unit == "none":
        raise ConfigError(
            "privacy=none: has no cost to plan; choose privacy=example, client or local"
        )


def plan_text(o: RunOptions, shards: Sequence[int], vocab_size: int) -> str:
    """Return the privacy statement, the size of the noise, and epsilon for other noise and lengths.

    `shards` are the tokens of each client. Raises ConfigError for privacy=none.
    """
    refuse_no_privacy(o)
    plan = make_plan(o, shards)
    facts = [*rows(statement(o, plan, len(shards))), *_noise_rows(o, plan, vocab_size)]
    lines = [f"{name:>12}  {text}" for name, text in facts]
    lines += ["", f"{'noise':>12}  {'planned':>10}  {'half as long':>12}  {'twice as long':>13}"]
    for factor in (0.5, 1.0, 2.0):
        costs = [_cost(o, shards, plan, factor, times) for times in (1.0, 0.5, 2.0)]
        lines.append(
            f"{plan.noise_multiplier * factor:12.4g}  {costs[0]:10.3g}  {costs[1]:12.3g} "
            f" {costs[2]:13.3g}"
        )
    return "\n".join(lines)


def _noise_rows(o: RunOptions, plan: PrivacyPlan, vocab_size: int) -> list[tuple[str, str]]:
    parameters = count_trainable(o.model, vocab_size)
    units = o.local.batch_size * o.local.accumulate if plan.unit == "example" else plan.cohort
    # sensitivity of a release to one unit, as a multiple of the clip
    reach = 2.0 if plan.unit == "local" else plan.scale
    units = 1 if plan.unit == "local" else units
    ratio = plan.noise_multiplier * reach * math.sqrt(parameters) / units
    release, signal, more = {
        "example": ("step", "gradient", f"larger batches (now {units}), "),
        "client": ("release", "update", f"more clients a round (now {units:g}), "),
        "local": ("update", "update", ""),
    }[plan.unit]
    times = f"{ratio:,.0f}" if ratio >= 100 else f"{ratio:.3g}"
    found = [
        (
            "noise/clip",
            (
                f"{times}: norm of the noise of one {release}, divided by the largest norm of a"
                f" clipped {signal}"
            ),
        ),
        ("lower with", f"{more}fewer parameters (now {parameters:,}), a larger epsilon"),
    ]
    if 0 < plan.planned.sampling_probability < 1:
        event = plan.planned
        without = epsilon_of((replace(event, sampling_probability=1.0),), plan.delta)
        found.append(
            (
                "cross-check",
                f"{renyi_epsilon((event,), plan.delta):.3g} by Renyi divergences, an upper bound",
            )
        )
        found.append(
            ("unsampled", f"epsilon would be {without:.3g} if the participants were known")
        )
    return found


def _cost(
    o: RunOptions, shards: Sequence[int], plan: PrivacyPlan, factor: float, times: float
) -> float:
    """Return epsilon with `factor` times the noise in a run that is `times` as long."""
    noise = replace(
        o.privacy, noise_multiplier=plan.noise_multiplier, target_epsilon=None, adaptive=False
    )
    other = make_plan(replace(o, rounds=max(1, round(o.rounds * times)), privacy=noise), shards)
    z = plan.noise_multiplier * factor * plan.scale / other.scale  # the noise of each release
    return epsilon_of((replace(other.planned, noise_multiplier=z),), plan.delta)
