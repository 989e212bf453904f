"""What the processes of a deployment log at Flower's DEBUG level."""

from __future__ import annotations

import base64
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from fedgpt.flower.deploy.kit import read_kit

SIMULATION = Path(__file__).parents[3] / "simulations" / "deploy"
sys.path.insert(0, str(SIMULATION))
from deployment import SITES, deployment, wait_until  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.long]
CANARY = "Zimtquarkstollen"  # in no text but the sites'
SMALL = [
    *("model.n_layer=1", "model.n_embd=16", "model.n_head=2", "model.block_size=16"),
    *("local.steps=2", "local.batch_size=2", "evaluate.tokens=1024", "evaluate.samples=0"),
    *("tokenizer.vocab_size=300", "rounds=3", "pace.clients=0"),
]


def forms(secret: bytes) -> set[bytes]:
    """A secret as it may stand in a log."""
    return {secret, secret.hex().encode(), base64.b64encode(secret), repr(secret)[2:-1].encode()}


def lines(pem: bytes) -> set[bytes]:
    """The lines of a private key, without its first and last one."""
    return set(pem.splitlines()[1:-1])


def test_no_log_has_a_key_a_token_or_a_text(short_folder, monkeypatch):
    monkeypatch.setenv("FLWR_LOG_LEVEL", "DEBUG")
    secrets: set[bytes] = set()
    with deployment(short_folder / "deployment", say=False) as one:
        one.write_texts()
        one.make_keys()
        for site in SITES:
            (one.text(site) / f"{CANARY}.txt").write_text(f"{CANARY} for {site}.\n" * 50)
            one.start_client(site)
        server = one.start_server(*one.run_options(*SMALL))

        def token() -> bytes:
            with suppress(OSError, ValueError, IndexError):
                (pid,) = one.pids("flwr-serverapp")
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                return words[words.index(b"--token") + 1]
            return b""

        wait_until(token, 300, "the ServerApp")
        secrets.add(token())
        secrets |= forms((one.server / "superexec.secret").read_bytes())
        assert server.wait(timeout=300) == 0, one.log("server")
        for name in ("server.key", "ca.key"):
            secrets |= lines((one.server / name).read_bytes())
        for site in SITES:
            private = read_kit(one.folder / f"{site}.kit").private_key
            for kind in (
                PrivateFormat.PKCS8,
                PrivateFormat.OpenSSH,
                PrivateFormat.TraditionalOpenSSL,
            ):
                secrets |= lines(private.private_bytes(Encoding.PEM, kind, NoEncryption()))
        logs = {path.name: path.read_bytes() for path in (one.folder / "logs").iterdir()}
        logs["audit.jsonl"] = (one.server / "audit.jsonl").read_bytes()
    assert b"" not in secrets and len(secrets) > 20
    assert b"DEBUG" in logs["server.log"]
    for name, log in logs.items():
        assert not [secret for secret in secrets if secret in log], name
        assert CANARY.encode() not in log, name
    assert str(one.folder / "texts").encode() not in logs["server.log"] + logs["audit.jsonl"]
