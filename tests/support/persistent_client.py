"""A process with one PersistentNode; what it needs comes on its standard input as JSON."""

from __future__ import annotations

import importlib
import json
import signal
import sys
import time

from cryptography.hazmat.primitives.serialization import load_pem_private_key
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp

from fedgpt.flower.deploy.connection import FleetConnection
from fedgpt.flower.deploy.node import PersistentNode

echo = ClientApp()


@echo.train()
def answer(message: Message, context) -> Message:
    """Say what the message says; a message may ask for an error or for a long time."""
    about = message.content["about"]
    if "error" in about:
        raise ValueError(about["error"])
    time.sleep(about.get("seconds", 0.0))
    said = {**about, "index": context.node_config["index"], **context.run_config}
    return Message(RecordDict({"about": ConfigRecord(said)}), reply_to=message)


def main() -> None:
    about = json.load(sys.stdin)
    key = load_pem_private_key(about["key"].encode(), None)
    module, _, name = about["app"].partition(":")
    app = echo if module == "echo" else getattr(importlib.import_module(module), name)
    ca = about["ca"].encode() if about.get("ca") else None
    node = PersistentNode(FleetConnection(about["address"], key, ca), app, about["config"])
    signal.signal(signal.SIGTERM, lambda *_: node.stop())
    node.run()


if __name__ == "__main__":
    main()
