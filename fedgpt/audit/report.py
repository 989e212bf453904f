"""`fedgpt audit` as a person and a script read it: three attacks, a table each, and one line of
JSON.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from fedgpt.audit.attacks import PER_TOKEN, audit_client, audit_example, membership, token_leak
from fedgpt.core.errors import ConfigError
from fedgpt.core.options import RunOptions
from fedgpt.data.partition import Shard
from fedgpt.data.prepare import Prepared
from fedgpt.model.shape import is_trainable
from fedgpt.privacy.plan import make_plan

MEMBER_STEPS = 300  # of one client: enough for a small model to know some of its text by heart


def audit_report(
    o: RunOptions, strategy: Any, prepared: Prepared, shards: Sequence[Shard]
) -> tuple[str, bool]:
    """The report, and whether every promise held; raises ConfigError where there is no mechanism to
    audit.
    """
    if o.privacy.unit == "local":
        raise ConfigError(
            "privacy=local: an update is noised before it leaves; audit privacy=example or client"
        )
    if o.model.trainable and not any(is_trainable([n], o.model.trainable) for n in PER_TOKEN):
        raise ConfigError(
            f"model.trainable={o.model.trainable}: fedgpt audit looks for tokens in the update of"
            " the embedding or the head; add transformer.wte.* or lm_head.*, or leave it out"
        )
    plan = make_plan(o, [shard.size for shard in shards]) if o.privacy.unit != "none" else None
    vocab = prepared.tokenizer.vocab_size
    told: dict[str, Any] = {"unit": o.privacy.unit}
    lines: list[str] = []
    holds = True
    if plan is not None:
        attack = (
            audit_client(o, strategy, plan)
            if plan.unit == "client"
            else audit_example(o, vocab, plan)
        )
        found, holds = attack.bounds, attack.holds
        told |= {
            "claimed_mu": attack.mu,
            "mu_bound": found.mu_bound,
            "claimed_epsilon": attack.epsilon,
        }
        told |= {"epsilon_bound": found.epsilon_bound, "holds": holds}
        lines += [
            f"canaries: {attack.what}",
            (
                f"  promised        mu {attack.mu:.3g}, epsilon {attack.epsilon:.3g} at delta"
                f" {plan.delta:.2g}"
            ),
            (
                f"  proved at least mu {found.mu_bound:.3g} (estimate {found.mu:.3g}), "
                f"epsilon {found.epsilon_bound:.3g} by ranks"
            ),
            (
                "  the promise holds"
                if holds
                else "  THE PROMISE IS BROKEN: do not publish this model"
            ),
        ]
    # the client whose shard is closest to the middle stands for the others
    shard = sorted(shards, key=lambda s: s.size)[len(shards) // 2]
    tokens = shard.read(prepared.tokens)
    inside = membership(o, vocab, tokens, plan, MEMBER_STEPS)
    leak = token_leak(o, vocab, tokens, plan, o.local.steps)
    told |= {"membership": inside, "token_leak": leak}
    lines += [
        f"membership: {MEMBER_STEPS} steps on half of the blocks of client {shard.client}",
        (
            f"  a lower loss tells members from others: AUC {inside['auc']:.3f}, "
            f"{inside['tpr_at_1_percent_fpr']:.1%} found at 1 % false alarms"
        ),
        (
            f"token leak: one update of {o.local.steps} steps of client {shard.client}, on"
            f" {leak['present']:.0f} different tokens; {leak['absent']:.0f} are not in its text"
        ),
        f"  rows of the embedding tell the ones from the others: AUC {leak['auc']:.3f}",
    ]
    if o.privacy.unit == "client":
        lines.append(
            "  that is the update, which the server sees; a release tells, if all others in it are"
            f" known: AUC {leak['released_auc']:.3f}"
        )
    return "\n".join([*lines, json.dumps(told)]), holds
