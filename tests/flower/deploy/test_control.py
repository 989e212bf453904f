"""The client of Flower's control API."""

from __future__ import annotations

import socket

import pytest
from flwr.proto.control_pb2 import ListRunsResponse

from fedgpt.core.errors import FedGPTError
from fedgpt.flower.deploy.control import Control
from fedgpt.flower.deploy.inner import CONTROL_SOCKET


def test_a_run_that_the_link_does_not_know_is_an_error_with_its_number(tmp_path, monkeypatch):
    """Also where Flower leaves it out of its answer without a word."""
    with socket.socket(socket.AF_UNIX) as link, Control(tmp_path) as control:
        link.bind(str(tmp_path / CONTROL_SOCKET))
        link.listen()
        monkeypatch.setattr(control.api, "ListRuns", lambda request: ListRunsResponse())
        with pytest.raises(FedGPTError, match="the link has no run 7"):
            control.status(7)
