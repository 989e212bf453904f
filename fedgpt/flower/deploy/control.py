"""A client of Flower's control API at the link of a server's folder, over its unix socket.

The run that it submits has no code in it: its app names the ServerApp that is installed here.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import httpx
from flwr.cli.build import build_fab_from_files
from flwr.common.serde import fab_to_proto, user_config_to_proto
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    StartRunRequest,
    StopRunRequest,
    StreamLogsRequest,
)
from flwr.supercore.constant import NOOP_FEDERATION_ID
from flwr.supercore.control.control_http_client import ControlHttpClient
from flwr.supercore.fab import Fab

from fedgpt.core.errors import FedGPTError
from fedgpt.core.options import RunOptions
from fedgpt.flower.deploy.inner import CONTROL_SOCKET
from fedgpt.flower.deploy.node import reason_of
from fedgpt.flower.run_config import APP, run_config_of

CALL_SECONDS = 30.0  # for an answer
FINISHED, COMPLETED, ONLINE = "finished", "completed", "online"
_URL = "http://link"  # the name is not looked up


class LinkDown(FedGPTError):
    """No link answers in the folder."""


@dataclass(frozen=True)
class RunStatus:
    """Flower's status of a run: `state`, and when it is finished how and why it ended."""

    state: str  # pending, starting, running or finished
    how: str = ""  # completed, failed or stopped
    why: str = ""

    @property
    def finished(self) -> bool:
        """Whether its ServerApp has ended."""
        return self.state == FINISHED

    @property
    def completed(self) -> bool:
        """Whether its ServerApp has ended by itself and without an exception."""
        return self.finished and self.how == COMPLETED


class Control:
    """Starts, watches and stops runs. Every call raises LinkDown if the link does not answer."""

    def __init__(self, folder: Path):
        transport = httpx.HTTPTransport(uds=str(folder / CONTROL_SOCKET))
        self._http = httpx.Client(transport=transport, timeout=CALL_SECONDS)
        self.api = ControlHttpClient(_URL)
        self.api.close()
        self.api._client = self._http  # Flower's own client speaks TCP only
        self._folder = folder

    def __enter__(self) -> Control:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._http.close()

    def healthy(self) -> bool:
        """Whether the link answers."""
        try:
            with self._asking():
                return self._http.get(f"{_URL}/health").status_code == httpx.codes.OK
        except FedGPTError:
            return False

    def submit(self, options: RunOptions) -> int:
        """Start a run; returns its id at this link."""
        fab = Fab("", build_fab_from_files({"pyproject.toml": APP.encode()})[0], {})
        request = StartRunRequest(
            fab=fab_to_proto(fab),
            override_config=user_config_to_proto(run_config_of(options)),
            federation=NOOP_FEDERATION_ID,
        )
        with self._asking():
            return self.api.StartRun(request).run_id

    def status(self, run_id: int) -> RunStatus:
        """The status of a run; raises FedGPTError if this link has no run of this id."""
        with self._asking(f" (run {run_id})"):
            found = self.api.ListRuns(ListRunsRequest(run_id=run_id)).run_dict
        if run_id not in found:
            raise FedGPTError(f"the link has no run {run_id}")
        status = found[run_id].status
        return RunStatus(status.status, status.sub_status, status.details)

    def stop(self, run_id: int) -> None:
        """End a run at once, without a checkpoint; raises FedGPTError as `status` does.

        A run that has ended stays as it is.
        """
        if self.status(run_id).finished:
            return
        with self._asking():
            self.api.StopRun(StopRunRequest(run_id=run_id))

    def output(self, run_id: int) -> Iterator[str]:
        """What the server of a run prints, in pieces as they come, until it ends."""
        with self._asking():
            for piece in self.api.StreamLogs(StreamLogsRequest(run_id=run_id)):
                yield piece.log_output

    def online(self) -> set[bytes]:
        """The public keys of the clients that are connected now."""
        with self._asking():
            nodes = self.api.ListNodes(ListNodesRequest()).nodes_info
        return {node.public_key for node in nodes if node.status == ONLINE}

    @contextmanager
    def _asking(self, about: str = "") -> Iterator[None]:
        try:
            with socket.socket(socket.AF_UNIX) as probe:  # httpx does not close one that fails
                probe.settimeout(CALL_SECONDS)
                probe.connect(str(self._folder / CONTROL_SOCKET))
            yield
        except (OSError, httpx.TransportError) as error:
            raise LinkDown(f"no link answers in {self._folder} ({error})") from error
        except httpx.HTTPStatusError as error:
            raise FedGPTError(f"{reason_of(error)}{about}") from error
