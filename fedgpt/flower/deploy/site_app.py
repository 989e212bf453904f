"""The ClientApp of a site: its own text and folders, within its policy."""

from __future__ import annotations

from datetime import datetime

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedgpt.client.account import SiteAccount
from fedgpt.client.policy import Policy
from fedgpt.client.site import Site
from fedgpt.client.texts import SiteText
from fedgpt.client.work import ClientWork
from fedgpt.core.errors import ConfigError
from fedgpt.core.options import RunOptions
from fedgpt.flower.client_app import check_kind, introduction, trained
from fedgpt.flower.finished import ACTION, keep
from fedgpt.flower.messages import read_job, refusal_content
from fedgpt.flower.run_config import options_of


def site_app(site: Site, policy: Policy) -> ClientApp:
    """An app that answers as `client_app` does for a node with text of its own, if the policy
    allows it.
    """
    app = ClientApp()
    account = SiteAccount(site.state_dir, policy.privacy)
    # run config -> the run's options and its work: of the latest run, for its next message
    works: dict[str, tuple[RunOptions, ClientWork]] = {}

    def work_of(context: Context) -> tuple[RunOptions, ClientWork]:
        key = repr(sorted(context.run_config.items()))
        if key not in works:
            options = options_of(context.run_config)
            policy.refuse_run(options, datetime.now())  # before anything is done for it
            check_kind(options, site)
            text = SiteText(site, options)
            works.clear()
            works[key] = options, ClientWork(site.options(options), site.runs, text, account)
        return works[key]

    @app.query()
    def query(message: Message, context: Context) -> Message:
        """Answer who this site is, or why it takes no part in the run."""
        try:
            options, work = work_of(context)
            policy.refuse_run(options, datetime.now())
            return introduction(work, message, context)
        except ConfigError as error:
            return Message(refusal_content(error.problems), reply_to=message)

    @app.query(ACTION)
    def finished(message: Message, context: Context) -> Message:
        """Keep the model of a run that has ended, at any hour."""
        options = options_of(context.run_config)
        policy.refuse_options(options)
        return Message(keep(message, site, options.name), reply_to=message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        """Do one job."""
        options, work = work_of(context)
        policy.refuse_job(options, read_job(message), datetime.now())
        return trained(work, message, 0)

    return app
