"""The interface of a runtime, which starts the clients of a run and transports their messages.

A member is one file in fedgpt/flower/runtimes/ with one class, and `runtime=pool` chooses it by the
name of the file. A class of another package is named by `runtime=custom` and
`runtime._target_=package.module.Class`. Nothing here imports Flower or torch, and a member's file
imports them only inside `start`: the options of a run are checked before heavy libraries are
loaded.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import ClassVar

from fedgpt.core.errors import ConfigError
from fedgpt.core.members import Members
from fedgpt.core.options import RunOptions
from fedgpt.core.resources import Resources
from fedgpt.core.targets import problems_of


class Runtime(ABC):
    """One way to run the clients of a run; this toy prints instead of training.

    >>> class Printing(Runtime):
    ...     name = "printing"
    ...     limits = ("No client trains.",)
    ...
    ...     def problems(self, options, clients):
    ...         if clients > 3:
    ...             yield (
    ...                 f"runtime=printing: takes at most 3 clients, not {clients}; take"
    ...                 " runtime=pool"
    ...             )
    ...
    ...     def start(self, options, clients, resources, environment):
    ...         print(f"{options.name}: {clients} clients")
    >>> Printing().start(RunOptions(name="test"), 2, None, {})
    test: 2 clients
    >>> list(Printing().problems(RunOptions(), 9))
    ['runtime=printing: takes at most 3 clients, not 9; take runtime=pool']
    """

    name: ClassVar[str]  # as in `runtime=name`; that of a built-in runtime is its file's name
    # its limitations, each a sentence that ends with a full stop. A built-in runtime has at least
    # one, and `fedgpt help runtime` prints them.
    limits: ClassVar[tuple[str, ...]] = ()

    def problems(self, options: RunOptions, clients: int) -> Iterator[str]:
        """Yield a message for each reason why the run cannot start here; `clients` is 0 if unknown.

        A message begins with `runtime=` and the runtime's name, and ends with what to take instead,
        such as `runtime=pool`. The method is called before data is prepared, and again when the
        number of clients is known.
        """
        yield from ()

    @abstractmethod
    def start(
        self,
        options: RunOptions,
        clients: int,
        resources: Resources,
        environment: Mapping[str, str],
    ) -> None:
        """Run `options` with `clients` clients to the end; return when the run folder is complete.

        `resources` are the processes, threads and GPUs to use. `environment` contains the variables
        that the run's processes need besides this process's own. A server in a separate process
        writes the error that ends the run to a file that they name (fedgpt/flower/failure.py).
        Raises FedGPTError if the run fails, and Interrupted after SIGINT or SIGTERM.
        """


class _Members(Members[Runtime]):
    """Members in another folder than their interface, because this package must not import
    Flower.
    """

    @property
    def folder(self) -> str:
        return "fedgpt.flower.runtimes"


RUNTIMES = _Members("runtime", "runtime.name", Runtime)


def runtime_of(options: RunOptions) -> Runtime:
    """The runtime that the options name; raises ConfigError if there is no such class.

    >>> runtime_of(RunOptions()).name
    'pool'
    """
    return RUNTIMES.build(options.runtime, options.trusted_packages)


def runtime_problems(options: RunOptions, clients: int) -> Iterator[str]:
    """Yield a message for each reason why this machine cannot start a run with `clients` clients.

    `clients` is 0 if their number is not known yet.
    """
    try:
        runtime = runtime_of(options)
    except ConfigError as error:
        yield from error.problems
    else:
        yield from problems_of("runtime", runtime, options, clients)
