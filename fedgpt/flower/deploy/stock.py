"""A site as a stock SuperNode: the command, and the files that it needs."""

from __future__ import annotations

import json
import shlex
from dataclasses import fields, replace
from pathlib import Path

from cryptography.hazmat.primitives import serialization

from fedgpt.client.policy import Policy
from fedgpt.client.site import Site
from fedgpt.core.errors import ConfigError, FedGPTError
from fedgpt.core.files import PRIVATE, write_text
from fedgpt.core.options.option import typed
from fedgpt.flower.deploy.kit import Kit
from fedgpt.flower.site_config import config_of

WHAT_IT_IS = (
    "A stock SuperNode runs whatever app the server sends, as this user, and knows no policy.",
    "Let it run as a user of its own, who can read nothing but the text of this site.",
)

# parts of a policy that a SuperNode's configuration has, too
KNOWN = ("text", "device")


def refuse_limits(policy: Policy) -> None:
    """Raise ConfigError for what a policy says and no stock SuperNode does."""
    standard, problems = Policy(), list[str]()
    for prefix, own, usual in (
        ("", policy, standard),
        ("privacy.", policy.privacy, standard.privacy),
    ):
        for name in (field.name for field in fields(own)):
            value = getattr(own, name)
            if name not in (*KNOWN, "privacy") and value != getattr(usual, name):
                problems.append(
                    f"{prefix}{name}={typed(value)}: a stock SuperNode knows no policy; leave it"
                    " out, or leave out --stock"
                )
    if problems:
        raise ConfigError(problems)


def stock_command(kit: Kit, site: Site) -> str:
    """The `flower-supernode` command of a kit, whose key, CA and site are written for it.

    They are STATE/stock/NAME.key (for its owner only), NAME.ca.pem and NAME.toml. Raises
    FedGPTError if they cannot be written.
    """
    folder = Path(site.state_dir) / "stock"
    key, ca = folder / f"{kit.name}.key", folder / f"{kit.name}.ca.pem"
    config = folder / f"{kit.name}.toml"
    # the SuperNode may be started from another folder
    text = str(Path(site.corpus.path or "").expanduser().absolute())
    own = config_of(replace(site, corpus=replace(site.corpus, path=text)))
    openssh = kit.private_key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.OpenSSH,
        serialization.NoEncryption(),
    )
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_text(key, openssh.decode(), mode=PRIVATE)
        write_text(ca, kit.approval.ca, mode=0o644)
        write_text(config, "".join(f"{name} = {_toml(value)}\n" for name, value in own.items()))
    except OSError as error:
        raise FedGPTError(f"{folder} cannot be written: {error.strerror}") from None
    words = [
        *("flower-supernode", "--superlink", kit.approval.address),
        *("--root-certificates", str(ca), "--auth-supernode-private-key", str(key)),
        *("--node-config", str(config)),
    ]
    return shlex.join(words)


def _toml(value: str | int) -> str:
    """A value in TOML, whose texts are those of JSON but for one character."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
