"""One worker process of the pool: `python -m fedgpt.flower.pool.worker SOCKET LIFELINE`.

Both arguments are inherited descriptors. The process imports the ClientApp once, sends "ready" and
answers jobs until the server closes the socket. The lifeline is a pipe whose other end only the
server has open: when it closes, the process exits at once, even in the middle of a job.
"""

from __future__ import annotations

import importlib
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from flwr.app import Context, Error, Message, Metadata, RecordDict
from flwr.app.message import make_message
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.supercore.task_identity import TaskIdentity

from fedgpt.core.errors import FedGPTError
from fedgpt.core.messages import JobTime
from fedgpt.flower.pool.channel import Channel, Frame, content_of, metadata_to_json, take_apart
from fedgpt.flower.pool.shared_memory import share

_REASON = 2000  # largest length of an exception's text in a reply, in characters


def main(descriptor: int, lifeline: int) -> None:
    """Serve jobs that arrive on the socket `descriptor`."""
    # A copy is used and the descriptor itself is never closed, so that the server sees the end of
    # the socket when this process has ended, not while the interpreter shuts down.
    sock = socket.socket(fileno=os.dup(descriptor))
    os.set_inheritable(descriptor, False)
    # A forked child (of a DataLoader) must not keep the socket open: the server would not notice
    # that this process has ended.
    os.register_at_fork(after_in_child=lambda: (os.close(descriptor), sock.close()))
    _attend(lifeline)
    channel = Channel(sock)
    frames = _frames(channel)
    setup = next(frames, None)
    if setup is None:
        return
    sys.path.extend(entry for entry in setup.header["path"] if entry not in sys.path)
    app = load_app(setup.header["app"])
    # if torch is imported later, by a job, it reads OMP_NUM_THREADS
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(setup.header["threads"])
    _restore_stderr(setup)
    channel.send(Frame({"kind": "ready"}))
    first = True
    for job in frames:
        began = time.monotonic()
        reply = answer(app, job, setup.header["run_config"])
        # the first job also imports modules, reads data and compiles, so it is slower than the next
        took = JobTime(measured=False) if first else JobTime(time.monotonic() - began)
        reply.header["time"] = asdict(took)
        channel.send(reply)
        first = False
        del job, reply  # frees their arrays before the process waits for its next job
        sys.stdout.flush()


def load_app(name: str) -> ClientApp:
    """The ClientApp named `module:attribute`; raises ImportError, AttributeError or TypeError."""
    module, _, attribute = name.partition(":")
    app = importlib.import_module(module)
    for part in attribute.split("."):
        app = getattr(app, part)
    if not isinstance(app, ClientApp):
        raise TypeError(f"{name} is a {type(app).__name__}, not a ClientApp")
    return app


def answer(app: ClientApp, job: Frame, run_config: dict[str, Any]) -> Frame:
    """Run one job; an exception becomes an error reply, and its traceback goes to stderr unless
    its message is meant for the user.
    """
    metadata = Metadata(**job.header["metadata"])
    TaskIdentity.run_id, TaskIdentity.node_id = metadata.run_id, metadata.dst_node_id
    TaskIdentity.task_id = metadata.dst_task_id or 0
    request = make_message(metadata, RecordDict())
    try:
        request.content = content_of(job)
        node_config = job.header["node_config"]
        context = Context(
            metadata.run_id, metadata.dst_node_id, node_config, RecordDict(), dict(run_config)
        )
        return _reply_frame(_checked(app(request, context), metadata.message_id))
    except Exception as error:
        if not isinstance(error, FedGPTError):  # its message says all, and the server shows it
            traceback.print_exc()
        reason = f"{type(error).__name__}: {error}"[:_REASON]
        return _reply_frame(
            Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=request)
        )


def _checked(reply: object, message_id: str) -> Message:
    if not isinstance(reply, Message):
        raise TypeError(f"the ClientApp returned a {type(reply).__name__}, not a Message")
    if reply.metadata.reply_to_message_id != message_id:
        raise ValueError(
            "the ClientApp returned a Message that does not answer the job; build it with"
            " Message(content, reply_to=message)"
        )
    return reply


def _reply_frame(reply: Message) -> Frame:
    header: dict[str, Any] = {"kind": "reply", "metadata": metadata_to_json(reply.metadata)}
    if reply.has_error():
        return Frame(header | {"error": [reply.error.code, reply.error.reason]})
    content = take_apart(reply.content)
    memory, specs = share(content.arrays) if content.arrays else (None, [])
    return Frame(header | {"records": content.records, "arrays": specs}, content.body, memory)


def _frames(channel: Channel) -> Iterator[Frame]:
    """Frames as they arrive, until the server closes the socket."""
    while True:
        try:
            received = channel.receive()
        except EOFError:
            return
        while received:
            # removed from the list, so that the frame's memory can be freed
            yield received.pop(0)


def _attend(lifeline: int) -> None:
    """Ignore SIGINT, which the server handles; exit when the server ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # the server blocked it before it started this process
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    os.set_inheritable(lifeline, False)
    threading.Thread(target=_end_with_server, args=(lifeline,), daemon=True).start()


def _end_with_server(lifeline: int) -> None:
    # nothing is ever written: read returns when the server's end is closed
    os.read(lifeline, 1)
    os._exit(1)


def _restore_stderr(setup: Frame) -> None:
    """Send what stderr got so far, and all that follows, to the server's stderr.

    Before this call stderr is a file, whose end the server reports if the start fails.
    """
    if setup.memory is None:
        return
    sys.stderr.flush()
    earlier = os.pread(2, os.fstat(2).st_size, 0)
    os.dup2(setup.memory.fileno(), 2)
    setup.memory.close()
    if earlier:
        os.write(2, earlier)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
