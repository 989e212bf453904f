"""The command line: one list of commands, and one file for each.

A command is a line of COMMANDS and a module fedgpt/cli/<name>.py with the help text HELP, and
`main`, which takes the arguments of the command and returns the exit code. Modules import large
libraries inside `main`, so that help and error messages appear at once.
"""

from __future__ import annotations

import importlib
import logging
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from fedgpt.core.errors import FedGPTError, nearest
from fedgpt.core.notices import Warnings


@dataclass(frozen=True)
class Command:
    """A command: its arguments, and its purpose in one line."""

    name: str
    arguments: str
    help: str
    parses_help: bool = False  # whether its own parser answers --help

    @property
    def usage(self) -> str:
        """The command as it is typed."""
        return f"fedgpt {self.name} {self.arguments}"

    @property
    def module(self) -> ModuleType:
        """The file of the command."""
        return importlib.import_module(f"fedgpt.cli.{self.name}")


COMMANDS = {
    command.name: command
    for command in (
        Command("run", "[OPTIONS]", "train a model; resume=FOLDER continues a run"),
        Command("data", "[OPTIONS]", "show the text and the clients of a run"),
        Command("privacy", "plan [OPTIONS]", "show what a private run would cost"),
        Command("audit", "[OPTIONS]", "test a privacy guarantee with attacks"),
        Command(
            "generate", "FOLDER [--prompt TEXT]", "generate text with the model of a run", True
        ),
        Command(
            "keys",
            "init|request|approve|revoke|renew|list",
            "make, approve and revoke the keys of a server and its sites",
            True,
        ),
        Command(
            "server",
            "DIR [OPTIONS]",
            "serve real clients: one run, or a queue of runs",
            True,
        ),
        Command("submit", "DIR [OPTIONS]", "queue a run at a server", True),
        Command("cancel", "DIR [RUN]", "end a run of a server, or take it from the queue", True),
        Command("status", "DIR [--json]", "show a server, its run and its queue", True),
        Command("client", "KIT --text FOLDER", "connect a site to its server", True),
        Command("doctor", "KIT", "find out what keeps a site from its server", True),
        Command("help", "[TOPIC]", "explain a command, a group or an option"),
    )
}


def dispatch(command: str, arguments: list[str]) -> int:
    """Run a command; a failure that a user can act on is a message and an exit code without a
    traceback.
    """
    if command not in COMMANDS:
        print(
            f"fedgpt: no command {command!r}{nearest(command, COMMANDS)} (fedgpt --help)",
            file=sys.stderr,
        )
        return 2
    if {"-h", "--help"} & set(arguments) and not COMMANDS[command].parses_help:
        command, arguments = "help", [command]
    if (here := str(Path.cwd())) not in sys.path:
        # as `python -m fedgpt` has it: where a user's own strategy._target_=mine.Rule is
        sys.path.append(here)
    if os.environ.get("HYDRA_FULL_ERROR") == "1":  # Hydra's own switch for its tracebacks
        logging.basicConfig()
        logging.getLogger("fedgpt").setLevel(logging.DEBUG)
    elif not (log := logging.getLogger("fedgpt")).handlers:
        log.addHandler(Warnings(logging.WARNING))
    # a stop request ends like Ctrl-C: checkpoint, 130
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return COMMANDS[command].module.main(arguments)
    except FedGPTError as error:
        print(f"fedgpt: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("fedgpt: interrupted", file=sys.stderr)
        return 130
