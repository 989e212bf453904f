"""`fedgpt client KIT`: a site's client, which stays connected until it is stopped."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from fedgpt.core.errors import ConfigError

if TYPE_CHECKING:
    from fedgpt.client.policy import Policy
    from fedgpt.client.site import Site


def main(arguments: list[str]) -> int:
    """Run the client until a signal, or print what would be run."""
    chosen = parser().parse_args(arguments)
    policy = policy_of(chosen)
    if chosen.print or chosen.stock:
        print("\n".join(_described(chosen, policy)))
        return 0
    _log_to_stderr()
    from fedgpt.flower.deploy.kit import read_kit

    site = site_of(chosen, policy, read_kit(chosen.kit).name)
    # after the kit, as this takes seconds
    from fedgpt.flower.deploy.site_client import preflight, run

    return run(preflight(chosen.kit, site, policy), site, policy)


def add_site(one: argparse.ArgumentParser) -> None:
    """The arguments that describe a site."""
    one.add_argument("kit", metavar="KIT", help="the site's kit (fedgpt keys request)")
    one.add_argument("--text", metavar="FOLDER", help="the site's text: a folder or a file")
    one.add_argument("--policy", metavar="FILE", help="what the site allows (docs/site.md)")
    one.add_argument(
        "--state",
        metavar="DIR",
        help="folder of what must stay: ~/.local/state/fedgpt, for all servers of this site",
    )
    one.add_argument(
        "--cache", metavar="DIR", help="folder of prepared text: FEDGPT_CACHE or ~/.cache/fedgpt"
    )


def policy_of(chosen: argparse.Namespace) -> Policy:
    """The policy of the file, with what is typed beside it; raises ConfigError."""
    from fedgpt.client.policy import Policy
    from fedgpt.client.policy_file import read_policy

    policy = read_policy(chosen.policy) if chosen.policy is not None else Policy()
    if chosen.text is not None:
        policy = replace(policy, text=replace(policy.text, path=chosen.text))
    typed = {name: getattr(chosen, name, None) for name in ("device", "threads")}
    if typed["threads"] is not None and not 1 <= typed["threads"] <= 4096:
        raise ConfigError(f"--threads {typed['threads']}: must be from 1 to 4096")
    return replace(policy, **{name: value for name, value in typed.items() if value is not None})


def site_of(chosen: argparse.Namespace, policy: Policy, name: str) -> Site:
    """The site that the command describes; raises ConfigError if it has no text."""
    from fedgpt.client.site import Site

    if not policy.text.path:
        raise ConfigError(
            "--text: is missing, and no policy has text.path; add --text FOLDER, the site's text"
        )
    home = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    state = chosen.state or f"{home}/fedgpt"
    cache = chosen.cache or os.environ.get("FEDGPT_CACHE") or "~/.cache/fedgpt"
    folders = [str(Path(folder).expanduser().absolute()) for folder in (state, cache)]
    return Site(name, policy.text, folders[0], folders[1], policy.device)


def _described(chosen: argparse.Namespace, policy: Policy) -> Iterator[str]:
    """What would be started; with --stock also the files of a SuperNode are written."""
    from fedgpt.flower.deploy.kit import read_kit
    from fedgpt.flower.deploy.stock import WHAT_IT_IS, refuse_limits, stock_command

    kit = read_kit(chosen.kit)
    site = site_of(chosen, policy, kit.name)
    if chosen.stock:
        refuse_limits(policy)
        yield from (f"# {line}" for line in WHAT_IT_IS)
        yield stock_command(kit, site)
        return
    yield f"client  {kit.name}, in this process"
    yield f"server  {kit.approval.address}, CA {kit.approval.ca_fingerprint}"
    yield f"text    {site.corpus.path}"
    yield f"state   {site.state_dir}"
    yield f"cache   {site.cache_dir}"
    yield f"device  {site.device}, threads {policy.threads or 'as torch chooses'}"
    yield f"policy  {chosen.policy or 'none'}"


def parser() -> argparse.ArgumentParser:
    """The arguments of the command."""
    one = argparse.ArgumentParser(
        "fedgpt client",
        description="Connect a site to its server, and train on the site's text when it asks.",
        epilog="Stops at SIGTERM (exit code 0) or SIGINT (130) after the job under way."
        " docs/site.md explains the policy.",
    )
    add_site(one)
    one.add_argument("--device", choices=["auto", "cpu", "cuda"], help="where to train (auto)")
    one.add_argument("--threads", type=int, metavar="N", help="number of PyTorch threads")
    one.add_argument(
        "--stock", action="store_true", help="print the command of Flower's SuperNode instead"
    )
    one.add_argument("--print", action="store_true", help="print what would be started")
    return one


def _log_to_stderr() -> None:
    """Log what happens with its time, in place of the warnings that other commands print."""
    log = logging.getLogger("fedgpt")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    log.handlers = [handler]
    log.setLevel(logging.INFO)
