"""`fedgpt doctor KIT`: what keeps a site from its server."""

from __future__ import annotations

import argparse

from fedgpt.cli.client import add_site, policy_of, site_of


def main(arguments: list[str]) -> int:
    """Print a line for each check; returns 1 if one has failed."""
    chosen = parser().parse_args(arguments)
    policy = policy_of(chosen)

    from fedgpt.flower.deploy.doctor import Doctor

    site = site_of(chosen, policy, "") if policy.text.path else None
    failed = False
    for finding in Doctor(chosen.kit, site, policy).findings():
        print(finding, flush=True)
        failed |= bool(finding.problem) and not finding.warning
    return int(failed)


def parser() -> argparse.ArgumentParser:
    """The arguments of the command."""
    one = argparse.ArgumentParser(
        "fedgpt doctor",
        description="Check what a site's client needs: kit, network, server, key, text and disk.",
        epilog="The client connects for a moment, and no job is done. Exit code 1: a check failed.",
    )
    add_site(one)
    return one
