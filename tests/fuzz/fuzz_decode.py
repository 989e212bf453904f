"""Coverage-guided fuzzing of `decode`, through which every update passes.

It needs `pip install atheris`:

    PYTHONPATH=tests python tests/fuzz/fuzz_decode.py -max_total_time=60
"""

from __future__ import annotations

import sys

import atheris

with atheris.instrument_imports(include=["fedgpt.update"]):
    from support.mutations import check, message


def one(data: bytes) -> None:
    """A message that the fuzzer's bytes choose."""
    source = atheris.FuzzedDataProvider(data)
    check(*message(lambda count: source.ConsumeIntInRange(0, count - 1)))


if __name__ == "__main__":
    atheris.Setup(sys.argv, one)
    atheris.Fuzz()
