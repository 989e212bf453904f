"""A network of its own for one site: a namespace with a link that can be cut and slowed down.

Needs root and iproute2. A kernel without netem can limit the rate (tbf), but neither delay nor lose
packets.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Line:
    """What a link carries: kbit/s, milliseconds on the way, and percent of packets lost."""

    rate: int
    delay: int = 0
    loss: int = 0


class Namespace:
    """A namespace whose programs reach this machine at the address `host`, over one link."""

    def __init__(self) -> None:
        number = os.getpid()
        self.name, self._here, self._there = f"fedgpt{number}", f"fh{number}", f"ft{number}"
        # a network of four addresses, of those that are kept for tests of networks (RFC 2544)
        network = f"198.18.{number // 64 % 256}"
        first = number % 64 * 4
        self.host, self._own = f"{network}.{first + 1}", f"{network}.{first + 2}"

    def inside(self, *words: str) -> list[str]:
        """A command as it is started in the namespace."""
        return ["ip", "netns", "exec", self.name, *words]

    def cut(self) -> None:
        """Let nothing pass until `join`; neither end of a connection notices."""
        _run("ip", "link", "set", self._here, "down")

    def join(self) -> None:
        """Let everything pass again."""
        _run("ip", "link", "set", self._here, "up")

    def slow(self, line: Line) -> str:
        """Send from the namespace as over `line`; returns the name of the kernel's tool, and what
        it cannot do.
        """
        device = [*self.inside("tc", "qdisc", "replace"), "dev", self._there, "root"]
        netem = ["netem", "rate", f"{line.rate}kbit", "delay", f"{line.delay}ms"]
        if _runs(*device, *netem, "loss", f"{line.loss}%"):
            return "netem"
        _run(*device, "tbf", "rate", f"{line.rate}kbit", "burst", "4kb", "latency", "2s")
        return "tbf, as this kernel has no netem: without delay and loss"

    def free(self) -> None:
        """Send without a limit again."""
        _run(*self.inside("tc", "qdisc", "del"), "dev", self._there, "root")

    def make(self) -> None:
        """Make the namespace and its link; raises CalledProcessError if the system refuses."""
        _run("ip", "netns", "add", self.name)
        _run("ip", "link", "add", self._here, "type", "veth", "peer", self._there)
        _run("ip", "link", "set", self._there, "netns", self.name)
        _run("ip", "address", "add", f"{self.host}/30", "dev", self._here)
        self.join()
        _run(*self.inside("ip", "address", "add", f"{self._own}/30", "dev", self._there))
        _run(*self.inside("ip", "link", "set", self._there, "up"))
        _run(*self.inside("ip", "link", "set", "lo", "up"))

    def remove(self) -> None:
        """Remove what there is of it."""
        _runs("ip", "link", "del", self._here)
        _runs("ip", "netns", "del", self.name)


@contextmanager
def namespace() -> Iterator[Namespace]:
    """A namespace, which is gone after the block."""
    one = Namespace()
    try:
        one.make()
        yield one
    finally:
        one.remove()


def why_not() -> str:
    """Why this machine cannot have a namespace; an empty text if it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if missing := [name for name in ("ip", "tc") if shutil.which(name) is None]:
        return f"{' and '.join(missing)} of iproute2 missing"
    try:
        with namespace():
            return ""
    except subprocess.CalledProcessError as error:
        return f"{' '.join(error.cmd)}: {error.stderr.strip()}"


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


def _runs(*command: str) -> bool:
    return subprocess.run(command, check=False, capture_output=True).returncode == 0
