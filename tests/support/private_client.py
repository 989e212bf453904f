"""The private part of a client's jobs, without training: small options, jobs, and its ledger."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from fedgpt.client.privacy import ClientPrivacy
from fedgpt.core.messages import Job, Plan
from fedgpt.core.options import LocalOptions, ModelOptions, PrivacyOptions, RunOptions
from fedgpt.data.text import Text
from fedgpt.privacy.plan import make_plan
from fedgpt.tasks.lm import LanguageModel

TOKENS = np.random.default_rng(0).integers(64, size=40 * 17)


def options(unit: str = "example", **privacy) -> RunOptions:
    return RunOptions(
        rounds=5,
        model=ModelOptions(n_layer=1, n_head=1, n_embd=8, block_size=16, positions="learned"),
        local=LocalOptions(steps=3, batch_size=4),
        privacy=PrivacyOptions(**{"unit": unit, "target_epsilon": 4.0, **privacy}),
    )


def job(o: RunOptions, number: int = 0, **plan) -> Job:
    planned = make_plan(o, [TOKENS.size])
    numbers = {
        "noise_multiplier": planned.noise_multiplier,
        "participations": planned.participations,
        "delta": planned.delta,
        "state_job": number - 1,
        "tokens_done": 0,
        "tokens_per_step": 64,
        **plan,
    }
    params = np.full(10, number, np.float32)
    return Job(
        "alice", number, number, params, Plan("run", o.local.steps, tokens_total=1000, **numbers)
    )


def client(o: RunOptions, folder: Path, tokens: Any = TOKENS, **environment: Any) -> ClientPrivacy:
    return ClientPrivacy(o, folder, Text.of([tokens]), environment, LanguageModel())


def events(folder) -> list[dict]:
    return json.loads((folder / "ledger.json").read_text())["events"]
