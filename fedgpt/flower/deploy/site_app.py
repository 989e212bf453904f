"""The ClientApp of a site: its own text and folders, within its policy."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedgpt.client.account import SiteAccount
from fedgpt.client.bases import SiteBases
from fedgpt.client.limits import refuse_without_room
from fedgpt.client.policy import Policy, PolicyRefused
from fedgpt.client.site import Site
from fedgpt.client.texts import SiteText
from fedgpt.client.work import ClientWork
from fedgpt.core.errors import ConfigError
from fedgpt.core.lines import one_line
from fedgpt.core.messages import BaseInfo, BasePiece, ClientInfo
from fedgpt.core.options import RunOptions
from fedgpt.flower import base_delivery, finished
from fedgpt.flower.messages import (
    info_content,
    read_job,
    read_question,
    refusal_content,
    update_content,
)
from fedgpt.flower.reported import reported
from fedgpt.flower.run_config import options_of_server_run

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Work:
    """What a site has of one run."""

    options: RunOptions
    text: SiteText
    bases: SiteBases
    work: ClientWork

    def base_of(self, info: BaseInfo | None) -> int:
        """Bytes that are here of the base weights that a server names."""
        if info is None:
            return 0
        self.bases.tidy(info.digest)
        return self.bases.begin(info, self.text.tokenizer.vocab_size)

    def keep(self, piece: BasePiece) -> int:
        """Keep a piece of base weights; the bytes that are here then."""
        self.text.use(piece.tokenizer)
        return self.bases.add(piece, self.text.tokenizer.vocab_size)


def site_app(site: Site, policy: Policy) -> ClientApp:
    """An app that answers for a site what its policy allows."""
    app = ClientApp()
    account = SiteAccount(site.state_dir, policy.privacy, site.server)
    # run config -> what there is of the latest run, for its next message
    works: dict[str, _Work] = {}

    def work_of(context: Context) -> _Work:
        key = repr(sorted(context.run_config.items()))
        if key not in works:
            options = options_of_server_run(context.run_config)
            policy.refuse_run(options, datetime.now())  # before anything is done for it
            text = SiteText(site, options)
            bases = SiteBases(Path(site.state_dir) / "bases", options.model)
            works.clear()
            work = ClientWork(site.options(options), site.runs, text, account, bases)
            works[key] = _Work(options, text, bases, work)
        return works[key]

    @app.query()
    def query(message: Message, context: Context) -> Message:
        """Answer who this site is, or why it takes no part in the run."""
        try:
            run = work_of(context)
        except ConfigError as error:  # it has only what the server has sent
            log.warning("refused: %s", one_line("; ".join(error.problems)))
            return Message(refusal_content(error.problems), reply_to=message)
        policy.refuse_run(run.options, datetime.now())
        refuse_without_room(site)
        with reported(run.work):
            question = read_question(message)
            size = run.text.introduce(question.tokenizer)
            have = run.base_of(question.base)
        if run.options.privacy.unit != "none":
            size = 1 << (size.bit_length() - 1)  # down to a power of two
        content = info_content(ClientInfo(site.name, size), run.text.tokenizer.digest, have)
        return Message(content, reply_to=message)

    @app.query(base_delivery.ACTION)
    def base(message: Message, context: Context) -> Message:
        """Keep a piece of the run's base weights."""
        run = work_of(context)
        policy.refuse_run(run.options, datetime.now())
        with reported(run.work):
            have = run.keep(base_delivery.read_piece(message))
        return Message(base_delivery.kept_content(have), reply_to=message)

    @app.query(finished.ACTION)
    def model(message: Message, context: Context) -> Message:
        """Keep the model of a run that has ended, at any hour."""
        options = options_of_server_run(context.run_config)
        policy.refuse_options(options)
        refuse_without_room(site)
        return Message(finished.keep(message, site, options.name), reply_to=message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        """Do one job."""
        run = work_of(context)
        job = read_job(message)
        policy.refuse_job(run.options, job, datetime.now())
        refuse_without_room(site)
        if job.plan.seconds:  # in which a client of a simulated fleet waits
            raise PolicyRefused("no waiting, as that of every site", "and the job has a duration")
        with reported(run.work):
            header, delta = run.work.train(job, index=0)
        return Message(update_content(header, delta), reply_to=message)

    return app
