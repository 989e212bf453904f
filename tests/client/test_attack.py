"""Simulated attackers: what they send, that it is deterministic, and who attacks."""

from __future__ import annotations

import numpy as np
import pytest

from fedgpt.client.attack import attacked
from fedgpt.client.work import ClientWork
from fedgpt.config import compose
from fedgpt.core.flat import flatten
from fedgpt.core.messages import Job, Plan, Reply, Update
from fedgpt.core.options import AttackOptions
from fedgpt.model.gpt import GPT
from fedgpt.server.limits import ABSOLUTE
from fedgpt.update.wire import Expected, decode

DELTA = np.linspace(-1, 2, 10_000, dtype=np.float32)
ATTACKS = ("sign_flip", "scale", "gaussian")
STEPS, TOKENS = 3, 3 * 4 * 16


def attack_update(name: str, client: str = "eve", number: int = 0, seed: int = 0) -> np.ndarray:
    return attacked(DELTA, AttackOptions(name, clients=1, strength=3.0), seed, client, number)


def test_sign_flip_and_scale_are_multiples_of_the_update():
    assert np.array_equal(attack_update("sign_flip"), -3 * DELTA)
    assert np.array_equal(attack_update("scale"), 3 * DELTA)


def test_gaussian_noise_has_the_requested_length_and_no_direction():
    noise, lengths = attack_update("gaussian"), 3 * np.linalg.norm(DELTA) ** 2
    assert np.linalg.norm(noise) == pytest.approx(3 * np.linalg.norm(DELTA), rel=1e-5)
    assert abs(noise @ DELTA) < 0.05 * lengths


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_is_deterministic_and_float32(name):
    assert attack_update(name).dtype == np.float32
    assert np.array_equal(attack_update(name), attack_update(name))


def test_noise_differs_by_seed_client_and_job_number():
    for other in (
        attack_update("gaussian", seed=1),
        attack_update("gaussian", client="mallory"),
        attack_update("gaussian", number=1),
    ):
        assert not np.array_equal(attack_update("gaussian"), other)


@pytest.fixture
def train(tmp_path):
    """(client number, options) -> that client's update of one job, as the server decodes it."""
    (tmp_path / "text").mkdir()
    for name in ("ann", "bob", "eve"):
        (tmp_path / "text" / f"{name}.txt").write_text(f"{name} saw the river rise again. " * 200)

    def update(index: int, *overrides: str) -> Update:
        options = compose.load(
            [
                "corpus=files",
                f"corpus.path={tmp_path / 'text'}",
                f"cache_dir={tmp_path / 'cache'}",
                "tokenizer=bytes",
                "partition=iid",
                "partition.clients=3",
                "partition.piece=64",
                "model.n_layer=1",
                "model.n_head=2",
                "model.n_embd=16",
                "model.block_size=16",
                f"local.steps={STEPS}",
                "local.batch_size=4",
                "local=reset",
                *overrides,
            ]
        )
        work = ClientWork(options, str(tmp_path / "clients"))
        params = flatten(GPT(options.model, 257))[1].numpy()
        job = Job(
            work.texts.shards[index].client,
            0,
            0,
            params,
            Plan("run", STEPS, 0, TOKENS, 10 * TOKENS),
        )
        header, array = work.train(job, index)
        limit = ABSOLUTE * max(1.0, float(np.linalg.norm(params)))
        return decode(
            Reply(job.client, 0, header, array),
            Expected("run", job.client, 0, 0, params.size, TOKENS, limit),
        )

    return update


@pytest.mark.parametrize("name", ATTACKS)
def test_only_the_first_clients_attack_and_their_updates_are_accepted(train, name):
    honest = [train(index).delta.copy() for index in range(3)]
    updates = [train(index, f"attack={name}", "attack.clients=2").delta for index in range(3)]
    assert [np.array_equal(a, b) for a, b in zip(honest, updates, strict=True)] == [
        False,
        False,
        True,
    ]
