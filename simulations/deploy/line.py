"""A TCP line to a port of this machine that can be cut, and mended again."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

_LOOPBACK = "127.0.0.1"
_BYTES = 1 << 16  # passed on at a time


class Line:
    """Listens on `port` and passes every connection on to the port `to`.

    While it is cut, nothing passes in either direction and no connection ends: both sides see
    what they see of a network that loses every packet.
    """

    def __init__(self, port: int, to: int):
        self._port, self._to = port, to
        self._loop = asyncio.new_event_loop()
        self._whole = asyncio.Event()
        self._whole.set()

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Listen while the block runs; all connections end with it."""
        server = self._loop.run_until_complete(
            asyncio.start_server(self._connected, _LOOPBACK, self._port)
        )
        thread = threading.Thread(target=self._loop.run_forever, name="line", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            thread.join()
            server.close()
            if tasks := asyncio.all_tasks(self._loop):
                for task in tasks:
                    task.cancel()
                self._loop.run_until_complete(asyncio.wait(tasks))
            self._loop.close()

    @property
    def whole(self) -> bool:
        """Whether it is not cut."""
        return self._whole.is_set()

    def cut(self) -> None:
        """Let nothing pass."""
        self._do(self._whole.clear)

    def mend(self) -> None:
        """Let everything pass that waits, and what comes."""
        self._do(self._whole.set)

    def _do(self, act: Callable[[], None]) -> None:
        """Act in the thread of the line, and return when it is done."""
        done = threading.Event()
        self._loop.call_soon_threadsafe(act)
        self._loop.call_soon_threadsafe(done.set)
        done.wait()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there, back = await asyncio.open_connection(_LOOPBACK, self._to)
        except OSError:  # the server is down: so is this connection
            await _closed(writer)
            return
        await asyncio.gather(self._pass(reader, back), self._pass(there, writer))

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            with suppress(OSError):
                while data := await reader.read(_BYTES):
                    await self._whole.wait()
                    writer.write(data)
                    await writer.drain()
            await self._whole.wait()  # the end of a connection does not pass either
        except asyncio.CancelledError:
            writer.transport.abort()
            raise
        finally:
            await _closed(writer)


async def _closed(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with suppress(OSError):
        await writer.wait_closed()
