"""The ClientApp of a site: its own text, folders and device, within its policy."""

from __future__ import annotations

from datetime import datetime

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedgpt.client.policy import Policy
from fedgpt.client.site import Site
from fedgpt.flower import client_app
from fedgpt.flower.messages import read_job
from fedgpt.flower.run_config import options_of


def site_app(site: Site, policy: Policy) -> ClientApp:
    """An app for the persistent client of `site`."""
    app = ClientApp()

    @app.query()
    def query(message: Message, context: Context) -> Message:
        policy.refuse_run(options_of(context.run_config), datetime.now())
        return client_app.app(message, context)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        policy.refuse_job(options_of(context.run_config), read_job(message), datetime.now())
        return client_app.app(message, context)

    return app
