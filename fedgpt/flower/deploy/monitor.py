"""Health and metrics of a server, over HTTP on a loopback port.

/metrics has the text format of Prometheus, version 0.0.4
(https://prometheus.io/docs/instrumenting/exposition_formats/). Every process of this machine may
read it; of a run with privacy=client it has only what may be published.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from fedgpt import __version__
from fedgpt.core.errors import ConfigError, FedGPTError
from fedgpt.flower.deploy.status import Progress, Status, progress_of, status_of

PORT = 9444
LAST_PORT = (1 << 16) - 1
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_LOOPBACK = "127.0.0.1"
_REQUEST_SECONDS = 10.0  # for a request to arrive


@dataclass(frozen=True)
class Metric:
    """A number, or one for each value of a label, with the text of Prometheus' HELP line."""

    name: str  # that of a counter ends in _total
    help: str
    value: float | Mapping[str, float]
    label: str = ""
    run: int | None = None

    def lines(self) -> Iterator[str]:
        """Its lines."""
        kind = "counter" if self.name.endswith("_total") else "gauge"
        yield f"# HELP fedgpt_{self.name} {self.help}"
        yield f"# TYPE fedgpt_{self.name} {kind}"
        own = {} if self.run is None else {"run": str(self.run)}
        values = self.value if isinstance(self.value, Mapping) else {"": self.value}
        for label, value in values.items():
            labels = own | ({self.label: label} if self.label else {})
            shown = ",".join(f'{name}="{_escaped(text)}"' for name, text in labels.items())
            braces = f"{{{shown}}}" if shown else ""
            yield f"fedgpt_{self.name}{braces} {_number(value)}"


def text_of(status: Status) -> str:
    """The metrics of a server and of its newest run.

    >>> text = text_of(Status(True, True, ("north", "south"), ("north",), ()))
    >>> [line for line in text.splitlines() if line.startswith("fedgpt_clients")]
    ['fedgpt_clients_approved 2', 'fedgpt_clients_online 1']
    """
    metrics = [
        Metric("info", "The version of fedgpt, as a label.", {__version__: 1}, "fedgpt"),
        Metric("link_up", "Whether the link answers.", status.link),
        Metric("clients_approved", "Sites that may connect.", len(status.approved)),
        Metric("clients_online", "Sites that are connected.", len(status.online)),
        Metric("queue_length", "Runs that have not begun.", len(status.waiting)),
        Metric("run_active", "Whether a run has begun and not ended.", status.running is not None),
    ]
    if run := status.newest:
        progress = progress_of(run)
        metrics.append(Metric("starts_total", "Starts of the run.", run.starts, run=run.number))
        metrics += _of_run(progress, run.number, run.published_only)
    return "".join(f"{line}\n" for metric in metrics for line in metric.lines())


def _of_run(progress: Progress, run: int, published_only: bool) -> Iterator[Metric]:
    if progress.version is None:
        return
    yield Metric("version", "The newest version of the model.", progress.version, run=run)
    yield Metric("tokens_total", "Tokens trained by all clients.", progress.tokens, run=run)
    if progress.epsilon is not None:
        yield Metric("epsilon", "Privacy spent until now.", progress.epsilon, run=run)
    if "loss" in progress.scores:
        yield Metric("loss", "Loss of the newest scored version.", progress.scores["loss"], run=run)
    yield Metric("score", "Scores of the newest scored version.", progress.scores, "score", run)
    if published_only:
        return
    yield Metric("updates_accepted_total", "Accepted updates.", progress.accepted, run=run)
    yield Metric(
        "updates_rejected_total",
        "Rejected and missing updates, by reason.",
        progress.rejected,
        "reason",
        run,
    )
    yield Metric("received_bytes_total", "Bytes of updates.", progress.bytes_up, run=run)
    yield Metric("sent_bytes_total", "Bytes of models.", progress.bytes_down, run=run)


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _number(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    return str(int(value)) if value == int(value) else repr(float(value))


class _Handler(BaseHTTPRequestHandler):
    """Answers GET /health and GET /metrics."""

    folder: Path
    timeout = _REQUEST_SECONDS

    def do_GET(self) -> None:
        """Answer a request."""
        try:
            if self.path == "/health":
                link = status_of(self.folder).link
                self._answer(200 if link else 503, "ok\n" if link else "the link does not answer\n")
            elif self.path == "/metrics":
                self._answer(200, text_of(status_of(self.folder)))
            else:
                self._answer(404, "there are /health and /metrics\n")
        except FedGPTError as error:  # such as a list of sites that is damaged
            self._answer(500, f"{error}\n")

    def _answer(self, status: int, text: str) -> None:
        content = text.encode()
        self.send_response(status)
        self.send_header("content-type", CONTENT_TYPE)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing: a monitoring system asks every few seconds."""


@contextmanager
def monitored(folder: Path, port: int) -> Iterator[None]:
    """Serve health and metrics while the block runs, unless `port` is 0; raises FedGPTError."""
    if port == 0:
        yield
        return
    handler = type("Handler", (_Handler,), {"folder": folder})
    try:
        server = ThreadingHTTPServer((_LOOPBACK, port), handler)
    except OSError as error:
        raise FedGPTError(
            f"--status-port={port}: cannot listen ({error.strerror}); name another port, or 0 for"
            " none"
        ) from None
    with server:
        thread = threading.Thread(target=server.serve_forever, name="monitor", daemon=True)
        thread.start()
        try:
            yield
        finally:
            server.shutdown()
            thread.join()


def checked_port(port: int) -> int:
    """The port; raises ConfigError if it is none."""
    if not 0 <= port <= LAST_PORT:
        raise ConfigError(f"--status-port={port}: must be from 0 (none) to {LAST_PORT}")
    return port
