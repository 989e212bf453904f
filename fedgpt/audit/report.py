"""The output of `fedgpt audit`: a paragraph for each attack, then one line of JSON for scripts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from fedgpt.audit.attacks import Findings, Verdict, audit
from fedgpt.core.options import RunOptions
from fedgpt.data.partition import Shard
from fedgpt.data.prepare import Prepared


def audit_report(
    o: RunOptions, strategy: Any, prepared: Prepared, shards: Sequence[Shard]
) -> tuple[str, bool]:
    """Run all attacks; returns the report, and whether the guarantee holds."""
    findings = audit(o, strategy, prepared, shards)
    return report(findings), findings.holds


def report(found: Findings) -> str:
    """All findings, as text and as JSON."""
    lines = [*_leaks(found), json.dumps(_as_json(found))]
    return "\n".join(lines if found.canaries is None else [*_canaries(found.canaries), *lines])


def _canaries(verdict: Verdict) -> list[str]:
    bounds, broken = verdict.bounds, "THE GUARANTEE IS REFUTED: do not publish this model"
    return [
        f"canaries: {verdict.what}",
        f"  guaranteed        mu {verdict.mu:.3g}, epsilon {verdict.epsilon:.3g} at delta"
        f" {verdict.delta:.2g}",
        f"  proved at least   mu {bounds.mu_bound:.3g} (estimate {bounds.mu:.3g}), epsilon"
        f" {bounds.epsilon_bound:.3g} by ranks",
        f"  {'the guarantee holds' if verdict.holds else broken}",
    ]


def _leaks(found: Findings) -> list[str]:
    member, leak = found.membership, found.token_leak
    lines = [
        f"membership: {found.member_steps} steps on every second block of client {found.client}",
        f"  a lower loss separates trained blocks from others with AUC {member['auc']:.3f};"
        f" {member['tpr_at_1_percent_fpr']:.1%} are found at 1 % false positives",
        f"token leak: one update of {found.leak_steps} steps of client {found.client}, trained on"
        f" {leak['present']:.0f} different tokens; {leak['absent']:.0f} are not in its text",
        f"  rows of the embedding separate the first from the second with AUC {leak['auc']:.3f}",
    ]
    if "released_auc" in leak:
        lines.append(
            "  this is the update that the server sees; for an attacker who sees the release and"
            f" knows all other updates in it, AUC {leak['released_auc']:.3f}"
        )
    return lines


def _as_json(found: Findings) -> dict[str, Any]:
    numbers: dict[str, Any] = {"unit": found.unit}
    if (verdict := found.canaries) is not None:
        numbers |= {
            "claimed_mu": verdict.mu,
            "mu_bound": verdict.bounds.mu_bound,
            "claimed_epsilon": verdict.epsilon,
            "epsilon_bound": verdict.bounds.epsilon_bound,
            "holds": verdict.holds,
        }
    return numbers | {"membership": found.membership, "token_leak": found.token_leak}
