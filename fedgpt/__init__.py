"""fedgpt: federated training of small GPTs.

>>> import fedgpt
>>> finished = fedgpt.run("rounds=5")  # doctest: +SKIP
>>> finished.summary["final"]["bits_per_byte"]  # doctest: +SKIP
>>> finished.generate("Fellow citizens")  # doctest: +SKIP
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedgpt.api import Run, open_run, run

__version__ = "0.1.0"
__all__ = ["Run", "__version__", "open_run", "run"]


def __dir__() -> list[str]:
    """Include the names that `__getattr__` imports."""
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    """Import the API when it is first used, so that `fedgpt --help` is fast."""
    if name in ("Run", "open_run", "run"):
        from fedgpt import api

        return getattr(api, name)
    raise AttributeError(f"module 'fedgpt' has no attribute {name!r}")
