"""A site as a stock SuperNode: the command, and the files that it needs."""

from __future__ import annotations

import shlex
from pathlib import Path

from cryptography.hazmat.primitives import serialization

from fedgpt.client.site import Site
from fedgpt.core.errors import FedGPTError
from fedgpt.core.files import PRIVATE, write_text
from fedgpt.flower.deploy.kit import Kit

WHAT_IT_IS = (
    "A stock SuperNode runs whatever app the server sends, as this user, and knows no policy.",
    "Let it run as a user of its own, who can read nothing but the text of this site.",
)


def stock_command(kit: Kit, site: Site) -> str:
    """The `flower-supernode` command of a kit, whose key and CA are written for it.

    They are STATE/stock/NAME.key (for its owner only) and NAME.ca.pem. Raises FedGPTError if they
    cannot be written.
    """
    folder = Path(site.state_dir) / "stock"
    key, ca = folder / f"{kit.name}.key", folder / f"{kit.name}.ca.pem"
    openssh = kit.private_key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.OpenSSH,
        serialization.NoEncryption(),
    )
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_text(key, openssh.decode(), mode=PRIVATE)
        write_text(ca, kit.approval.ca, mode=0o644)
    except OSError as error:
        raise FedGPTError(f"{folder} cannot be written: {error.strerror}") from None
    own = {"name": kit.name, "text": str(Path(site.corpus.path or "").absolute())}
    own |= {"state-dir": site.state_dir, "cache-dir": site.cache_dir, "device": site.device}
    config = " ".join(f'{name}="{value}"' for name, value in own.items())
    words = [
        *("flower-supernode", "--superlink", kit.approval.address),
        *("--root-certificates", str(ca), "--auth-supernode-private-key", str(key)),
        *("--node-config", config),
    ]
    return shlex.join(words)
