"""The app of a site with a policy, for a process of `support/superlink.py`; the environment has
its policy's file, and the node configuration the site.
"""

from __future__ import annotations

import os

from flwr.app import Context, Message

from fedgpt.client.policy_file import read_policy
from fedgpt.flower.deploy.site_app import site_app
from fedgpt.flower.deploy.site_client import JobLog
from fedgpt.flower.site_config import site_of

_apps: list[JobLog] = []


def app(message: Message, context: Context) -> Message:
    """Answer as `fedgpt client` does."""
    if not _apps:
        site = site_of(context.node_config)
        assert site is not None, "the node configuration has one"
        _apps.append(JobLog(site_app(site, read_policy(os.environ["POLICY"]))))
    return _apps[0](message, context)
