"""The ClientApp of a site: its own text and folders, within its policy."""

from __future__ import annotations

from datetime import datetime

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedgpt.client.account import SiteAccount
from fedgpt.client.limits import refuse_without_room
from fedgpt.client.policy import Policy, PolicyRefused
from fedgpt.client.site import Site
from fedgpt.client.texts import SiteText
from fedgpt.client.work import ClientWork
from fedgpt.core.errors import ConfigError
from fedgpt.core.messages import ClientInfo
from fedgpt.core.options import RunOptions
from fedgpt.flower.finished import ACTION, keep
from fedgpt.flower.messages import (
    info_content,
    read_job,
    read_question,
    refusal_content,
    update_content,
)
from fedgpt.flower.reported import reported
from fedgpt.flower.run_config import options_of_server_run


def site_app(site: Site, policy: Policy) -> ClientApp:
    """An app that answers for a site what its policy allows."""
    app = ClientApp()
    account = SiteAccount(site.state_dir, policy.privacy, site.server)
    # run config -> options, text and work of the latest run, for its next message
    works: dict[str, tuple[RunOptions, SiteText, ClientWork]] = {}

    def work_of(context: Context) -> tuple[RunOptions, SiteText, ClientWork]:
        key = repr(sorted(context.run_config.items()))
        if key not in works:
            options = options_of_server_run(context.run_config)
            policy.refuse_run(options, datetime.now())  # before anything is done for it
            text = SiteText(site, options)
            works.clear()
            work = ClientWork(site.options(options), site.runs, text, account)
            works[key] = options, text, work
        return works[key]

    @app.query()
    def query(message: Message, context: Context) -> Message:
        """Answer who this site is, or why it takes no part in the run."""
        try:
            options, text, work = work_of(context)
        except ConfigError as error:  # it has only what the server has sent
            return Message(refusal_content(error.problems), reply_to=message)
        policy.refuse_run(options, datetime.now())
        refuse_without_room(site)
        with reported(work):
            size = text.introduce(read_question(message))
        if options.privacy.unit != "none":
            size = 1 << (size.bit_length() - 1)  # down to a power of two
        content = info_content(ClientInfo(site.name, size), text.tokenizer.digest)
        return Message(content, reply_to=message)

    @app.query(ACTION)
    def finished(message: Message, context: Context) -> Message:
        """Keep the model of a run that has ended, at any hour."""
        options = options_of_server_run(context.run_config)
        policy.refuse_options(options)
        refuse_without_room(site)
        return Message(keep(message, site, options.name), reply_to=message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        """Do one job."""
        options, _, work = work_of(context)
        job = read_job(message)
        policy.refuse_job(options, job, datetime.now())
        refuse_without_room(site)
        if job.plan.seconds:  # in which a client of a simulated fleet waits
            raise PolicyRefused("no waiting, as that of every site", "and the job has a duration")
        with reported(work):
            header, delta = work.train(job, index=0)
        return Message(update_content(header, delta), reply_to=message)

    return app
