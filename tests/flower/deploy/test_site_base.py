"""Runs over a real SuperLink in which the sites get the frozen weights from the server."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import RecordDict
from support.here import run_here
from support.site_thread import site_in_thread
from support.sites import NAMES, Texts, start_site
from support.superlink import live_superlink, persistent_node
from test_site_run import events, when
from torch import Tensor

from fedgpt.client.policy import Policy
from fedgpt.config.compose import load
from fedgpt.core.errors import StoppedEarly
from fedgpt.core.flat import base_values
from fedgpt.flower import base_delivery, fetch
from fedgpt.flower.base_delivery import BaseDelivery
from fedgpt.flower.messages import vector_record
from fedgpt.flower.run_config import run_config_of
from fedgpt.flower.serve import serve

pytestmark = pytest.mark.slow
TRAINED = "model.trainable=[transformer.ln_f.*,transformer.h.0.mlp.*]"


@pytest.fixture
def texts(tmp_path, monkeypatch) -> Texts:
    monkeypatch.setattr(fetch, "NODES_SECONDS", 0.1)
    return Texts.write(tmp_path)


def in_one_place(texts: Texts, *more: str) -> dict[str, Any]:
    """The summary of a run with simulated clients on the same shards, in this process."""
    corpus = ["corpus=files", "corpus.client=folder", f"corpus.path={texts.folder / 'sites'}"]
    return run_here(*corpus, *texts.own, *more)


@pytest.fixture
def start(texts, tmp_path) -> Path:
    """The folder of a finished run, from whose weights the others start."""
    in_one_place(texts, f"run_dir={tmp_path / 'start'}", "rounds=1")
    return tmp_path / "start"


@pytest.fixture
def sent(monkeypatch) -> list[int]:
    """The offsets of the pieces that the server has sent."""
    offsets: list[int] = []
    piece = BaseDelivery.piece

    def noted(self: BaseDelivery, offset: int) -> RecordDict:
        offsets.append(offset)
        return piece(self, offset)

    monkeypatch.setattr(base_delivery, "PIECE", 5000)
    monkeypatch.setattr(BaseDelivery, "piece", noted)
    return offsets


def at_sites(texts: Texts, name: str, *more: str) -> dict[str, Any]:
    """The summary of a run of three sites, which begin and end with it."""
    options = load(texts.at_sites(TRAINED, f"run_dir={texts.folder / name}", *more))
    with live_superlink(run_config_of(options)) as link, ExitStack() as nodes:
        for site in NAMES:
            nodes.enter_context(site_in_thread(link, texts, site))
        return serve(options, link.grid())


def bases(texts: Texts) -> list[Path]:
    """The base of each site."""
    return [path for name in NAMES for path in (texts.folder / "state" / name).glob("bases/?*[!k]")]


def test_a_frozen_model_gives_the_weights_of_the_pool_and_is_sent_once(
    texts, tmp_path, start, sent, caplog
):
    """Not again in a second run with new starts of the sites; a damaged file is."""
    init = f"init_from={start}"
    pool = in_one_place(texts, TRAINED, init, f"run_dir={tmp_path / 'pool'}")
    first = at_sites(texts, "first", init)
    assert first["weights_sha256"] == pool["weights_sha256"] != "" and first["rejected"] == {}
    assert first["final"] == pool["final"]
    once, again = sorted(set(sent)), sent.copy()
    assert len(once) > 2 and sorted(again) == sorted(once * len(NAMES)), "each piece, to each site"
    files = bases(texts)
    assert len(files) == len(NAMES) and len({path.read_bytes() for path in files}) == 1

    sent.clear()
    second = at_sites(texts, "second", init)
    assert second["weights_sha256"] == pool["weights_sha256"] and sent == []

    with files[0].open("r+b") as stream:
        stream.seek(400)
        stream.write(b"damage")
    third = at_sites(texts, "third", init)
    assert third["weights_sha256"] == pool["weights_sha256"] and sorted(sent) == once
    assert third["rejected"] == {}
    assert "those that a server has sent are gone or damaged" in caplog.text
    assert len({path.read_bytes() for path in files}) == 1


def test_without_init_from_nothing_is_sent(texts, tmp_path, sent):
    pool = in_one_place(texts, TRAINED, f"run_dir={tmp_path / 'pool'}")
    assert at_sites(texts, "run")["weights_sha256"] == pool["weights_sha256"]
    assert sent == [] and bases(texts) == []


class TooLong(BaseDelivery):
    """More values than the server has said."""

    def piece(self, offset: int) -> RecordDict:
        content = super().piece(offset)
        values = base_values(self._base, 0, 1 << 40)
        content["values"] = vector_record(np.concatenate([values, values]))
        return content


def not_finite(base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    changed = {name: values.clone() for name, values in base.items()}
    next(iter(changed.values())).view(-1)[7] = float("nan")
    return changed


HOSTILE = {
    "names": (lambda base, t: BaseDelivery({f"x{n}": base[n] for n in base}, t), "names or shapes"),
    "shapes": (
        lambda base, t: BaseDelivery({n: base[n].reshape(-1) for n in base}, t),
        "names or shapes",
    ),
    "not finite": (lambda base, t: BaseDelivery(not_finite(base), t), "not finite"),
    "too large": (TooLong, "sends more than the"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_base_is_refused_and_the_server_reads_why(
    texts, start, monkeypatch, caplog, kind
):
    delivery, why = HOSTILE[kind]
    monkeypatch.setattr("fedgpt.flower.serve.BaseDelivery", delivery)
    monkeypatch.setattr("fedgpt.server.loop.SITES_SECONDS", 10)
    words = [TRAINED, f"init_from={start}", f"run_dir={texts.folder / 'run'}", "pace.begin=1"]
    options = load([word for word in texts.at_sites(*words) if word != "pace.begin=3"])
    with live_superlink(run_config_of(options)) as link, ExitStack() as nodes:
        nodes.enter_context(site_in_thread(link, texts, "ann"))
        with pytest.raises(StoppedEarly, match=f"BaseRefused.*{why}"):
            serve(options, link.grid())
    assert "a node is left out" in caplog.text and bases(texts) == []


def test_a_run_that_the_policy_refuses_sends_no_base(texts, start, sent, monkeypatch):
    monkeypatch.setattr("fedgpt.server.loop.SITES_SECONDS", 10)
    words = [TRAINED, f"init_from={start}", f"run_dir={texts.folder / 'run'}"]
    options = load(texts.at_sites(*words))
    with live_superlink(run_config_of(options)) as link, ExitStack() as nodes:
        nodes.enter_context(site_in_thread(link, texts, "ann", Policy(runs=["another"])))
        with pytest.raises(StoppedEarly, match=r"runs=\[another\]"):
            serve(options, link.grid())
    assert sent == [] and bases(texts) == []


def test_a_site_that_has_lost_its_state_gets_it_again_in_the_same_run(texts, start, sent, caplog):
    """It comes back while the run goes on, as the same client, and trains again."""
    caplog.set_level(logging.INFO)
    folder = texts.folder / "run"
    # a round has both clients, so the run waits for the one that is away
    words = [TRAINED, f"init_from={start}", "pace.clients=2", "pace.minimum=2", "rounds=25"]
    options = load([*texts.at_sites(*words, f"run_dir={folder}"), "pace.begin=2"])
    key = ec.generate_private_key(ec.SECP384R1())
    app, about = "fedgpt.flower.client_app:app", texts.config("ann")
    with live_superlink(run_config_of(options)) as link, ExitStack() as nodes:
        ann = nodes.enter_context(persistent_node(link, key, app, about))
        start_site(nodes, link, texts, "bob")

        def come_back() -> None:
            ann.terminate()
            ann.wait(60)
            for part in ("bases", "tokenizers"):
                shutil.rmtree(texts.folder / "state" / "ann" / part)
            nodes.enter_context(persistent_node(link, key, app, about))

        back = when(lambda: len(events(folder, "accept")) > 3, come_back)
        summary = serve(options, link.grid())
        back.join(60)
    assert summary["versions"] == 25 and summary["rejected"] == {}
    assert sorted(sent) == sorted(sorted(set(sent)) * 3), "twice to ann, once to bob"
    assert "client ann is offline" in caplog.text and events(folder, "join") == []
    last = [one["client"] for one in events(folder, "accept")][-2:]
    assert sorted(last) == ["ann", "bob"]
