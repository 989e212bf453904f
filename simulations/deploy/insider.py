"""The client of a site that misbehaves: it does its jobs, and sends something else.

    python simulations/deploy/insider.py KIT DEED --text FOLDER --state DIR --cache DIR

| deed | what it does |
|---|---|
| broken | announces its reply to a job, and uploads nothing of it |
| nan | sends an update of NaN, with the right digest |
| damaged | sends other bytes than those of the digest |
| old | sends its reply to an earlier job once more |
| repeats | sends 200 MB of zeros, of which Flower uploads 5 MB |
"""

from __future__ import annotations

import argparse
import json
import logging
import signal
import sys
import time
from typing import Any

import numpy as np
from flwr.app import Context, Message, MessageType, RecordDict

from fedgpt.cli.client import add_site, policy_of, site_of
from fedgpt.flower.deploy.connection import FleetConnection, Upload, UploadEnded
from fedgpt.flower.deploy.doctor import Doctor
from fedgpt.flower.deploy.kit import read_kit
from fedgpt.flower.deploy.node import App, PersistentNode
from fedgpt.flower.deploy.site_app import site_app
from fedgpt.flower.messages import update_content
from fedgpt.update.wire import digest

DEEDS = ("broken", "nan", "damaged", "old", "repeats")
REPEATED = 50_000_000  # float32 zeros: 200 MB


class Insider:
    """An app that changes the replies to jobs of `app`."""

    def __init__(self, app: App, deed: str):
        self._app, self._deed = app, deed
        self._first: RecordDict | None = None  # the content of the first reply
        self.in_job = False

    def __call__(self, message: Message, context: Context) -> Message:
        """Answer honestly, or not if it is a job."""
        reply = self._app(message, context)
        self.in_job = message.metadata.message_type == MessageType.TRAIN and reply.has_content()
        if self.in_job:
            content = self._changed(reply.content)
            self._first = self._first or content
            reply.content = content
        return reply

    def _changed(self, content: RecordDict) -> RecordDict:
        header: dict[str, Any] = json.loads(content["update"]["json"])
        delta = content["delta"]["flat"].numpy()
        match self._deed:
            case "nan":
                delta = np.full_like(delta, np.nan)
                header["sha256"] = digest(delta)
            case "damaged":
                delta = delta + 1
            case "old":
                return self._first or content
            case "repeats":
                delta = np.zeros(REPEATED, np.float32)
        return update_content(json.dumps(header), delta)


class Breaking(FleetConnection):
    """A connection that uploads no reply to a job."""

    insider: Insider
    stopped = False

    def upload(self, upload: Upload) -> bool:
        """Send nothing of a reply to a job until `stopped`, and nothing of it then."""
        while self.insider.in_job:
            if self.stopped:
                raise UploadEnded
            time.sleep(0.2)
        return super().upload(upload)


def main() -> int:
    """Take part as the site of a kit until a signal."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_site(parser)
    parser.add_argument("deed", choices=DEEDS)
    chosen = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    kit, policy = read_kit(chosen.kit), policy_of(chosen)
    doctor = Doctor(chosen.kit)
    for finding in doctor.findings(key=False):
        print(finding, flush=True)
    insider = Insider(site_app(site_of(chosen, policy, kit.name), policy), chosen.deed)
    kind = Breaking if chosen.deed == "broken" else FleetConnection
    address = f"{doctor.host}:{kit.approval.port}"
    connection = kind(address, kit.private_key, kit.approval.ca.encode())
    if isinstance(connection, Breaking):
        connection.insider = insider
    node = PersistentNode(connection, insider, {})

    def stop(number: int, frame: object) -> None:
        if isinstance(connection, Breaking):
            connection.stopped = True
        node.stop()

    signal.signal(signal.SIGTERM, stop)
    node.run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
