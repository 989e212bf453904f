"""The client of a site that misbehaves: it does its jobs, and sends something else.

    python simulations/deploy/insider.py KIT DEED,DEED --text FOLDER --state DIR --cache DIR

It answers its first job honestly, and does one deed in each of the next ones, in turn.

| deed | what it does |
|---|---|
| broken | announces its reply to a job, and uploads nothing of it |
| nan | sends an update of NaN, with the right digest |
| damaged | sends other bytes than those of the digest |
| old | sends its reply to an earlier job once more |
| repeats | sends 200 MB of zeros, of which Flower uploads 5 MB |
| records | sends a million numbers beside its update, of which Python makes as many objects |
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import signal
import sys
import time
from dataclasses import replace
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, Context, Message, MessageType, RecordDict

from fedgpt.cli.client import add_site, policy_of, site_of
from fedgpt.flower.deploy.connection import Upload, UploadEnded
from fedgpt.flower.deploy.doctor import Doctor, KitConnection
from fedgpt.flower.deploy.kit import read_kit
from fedgpt.flower.deploy.node import App, PersistentNode
from fedgpt.flower.deploy.site_app import site_app
from fedgpt.flower.messages import read_reply, update_content
from fedgpt.update.wire import digest

DEEDS = ("broken", "nan", "damaged", "old", "repeats", "records")
REPEATED = 50_000_000  # float32 zeros: 200 MB
NUMBERS = 1_000_000


class Insider:
    """An app that changes the replies to jobs of `app`."""

    def __init__(self, app: App, deeds: list[str]):
        self._app, self._deeds = app, itertools.cycle(deeds)
        self._first: RecordDict | None = None  # the content of the first reply
        self.broken = False  # whether nothing of the reply is to be uploaded

    def __call__(self, message: Message, context: Context) -> Message:
        """Answer honestly, or not if it is a job."""
        reply = self._app(message, context)
        if message.metadata.message_type == MessageType.TRAIN and reply.has_content():
            if self._first is None:
                self._first = reply.content
            else:
                reply.content = self._changed(reply, next(self._deeds), self._first)
        return reply

    def _changed(self, reply: Message, deed: str, first: RecordDict) -> RecordDict:
        honest = read_reply(reply, "", 0)
        header: dict[str, Any] = json.loads(honest.header)
        delta: np.ndarray = honest.payload
        self.broken = deed == "broken"
        match deed:
            case "nan":
                delta = np.full_like(delta, np.nan)
                header["sha256"] = digest(delta)
            case "damaged":
                delta = delta + 1
            case "old":
                return first
            case "repeats":
                delta = np.zeros(REPEATED, np.float32)
        content = update_content(json.dumps(header), delta)
        if deed == "records":
            content["numbers"] = ConfigRecord({"numbers": [7] * NUMBERS})
        return content


class Breaking(KitConnection):
    """A connection that uploads nothing of a reply that is to be broken off."""

    insider: Insider
    stopped = False

    def upload(self, upload: Upload) -> bool:
        """Send the next objects, or nothing until `stopped`."""
        while self.insider.broken:
            if self.stopped:
                raise UploadEnded
            time.sleep(0.2)
        return super().upload(upload)


def main() -> int:
    """Take part as the site of a kit until a signal."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_site(parser)
    parser.add_argument("deeds", metavar="DEED,DEED", help=", ".join(DEEDS))
    chosen = parser.parse_args()
    deeds = chosen.deeds.split(",")
    if unknown := sorted(set(deeds) - set(DEEDS)):
        parser.error(f"{', '.join(unknown)}: must be of {', '.join(DEEDS)}")
    logging.basicConfig(level=logging.INFO)
    kit, policy = read_kit(chosen.kit), policy_of(chosen)
    doctor = Doctor(chosen.kit)
    for finding in doctor.findings(key=False):
        print(finding, flush=True)
    site = site_of(chosen, policy, kit.name)
    site = replace(site, server=kit.approval.ca_fingerprint)
    insider = Insider(site_app(site, policy), deeds)
    connection = Breaking(kit, doctor.host)
    connection.insider = insider
    node = PersistentNode(connection, insider, {})

    def stop(number: int, frame: object) -> None:
        connection.stopped = True
        node.stop()

    signal.signal(signal.SIGTERM, stop)
    node.run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
