"""Bytes, error and speed of every codec, on a delta of Gaussian numbers.

    python benchmarks/compress.py            # 10 M elements, five rounds, about half a minute
    python benchmarks/compress.py --quick    # a smoke run

Each codec takes turns with a plain copy of the float32 delta into an allocated buffer; everything
runs in one thread, and the clock is the CPU time of the process. `encode` and `decode` are GB/s of
float32 input, medians over rounds. `encode_vs_copy` and `decode_vs_copy` are medians of the ratio
to the copy in the same round, which depends less on the machine and on other jobs. `percent` is the
size of the payload in percent of float32, `error` the relative L2 error of the delta, and
`error_sent` that of the elements that did not become zero.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import numpy as np
from common import machine

from fedgpt.update.codecs.base import Codec
from fedgpt.update.compress import make_codec

CODECS: tuple[tuple[str, dict[str, object]], ...] = (
    ("none", {}),
    ("bf16", {}),
    ("int8", {}),
    ("int8", {"block": 256}),
    ("int4", {}),
    ("int4", {"block": 64}),
    ("e3m0", {}),
    ("topk", {}),
    ("topk", {"density": 1 / 8}),
    ("sparse_loco", {}),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--size", type=int, default=10_000_000, help="elements of the delta (10,000,000)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="rounds to take medians of (5)")
    parser.add_argument("--quick", action="store_true", help="a smoke run: 200,000 elements")
    chosen = parser.parse_args()
    size, rounds = (200_000, 2) if chosen.quick else (chosen.size, chosen.rounds)
    about = {"elements": size, "rounds": rounds, "model": "none", **machine()}
    delta = np.random.default_rng(0).standard_normal(size).astype(np.float32)
    copy = np.empty_like(delta)
    lines, copies = [], []
    sizes = ("codec", "% of fp32", "error", "sent")
    speeds = ("encode", "decode GB/s", "encode", "decode / copy")
    print(("{:<30}" + "{:>14}" * 7).format(*sizes, *speeds))
    for name, options in CODECS:
        codec = make_codec(name, **options)
        figures, seconds = measured(codec, delta, copy, rounds)
        copies += seconds
        lines.append(figures)
        print(("{:<30}" + "{:>14.4g}" * 7).format(*figures.values()))
    copy_speed = 4e-9 * size / statistics.median(copies)
    print(json.dumps({"codecs": lines, "copy_gb_per_second": copy_speed, **about}))


def measured(
    codec: Codec, delta: np.ndarray, copy: np.ndarray, rounds: int
) -> tuple[dict[str, object], list[float]]:
    """Figures of one codec, and the seconds of a plain copy in each round."""
    payload = codec.encode(delta)  # not timed: allocates memory and warms caches
    back = codec.decode(payload, delta.size)
    kept = back != 0
    seconds = [
        [
            cpu(lambda: np.copyto(copy, delta)),
            cpu(lambda: codec.encode(delta)),
            cpu(lambda: codec.decode(payload, delta.size)),
        ]
        for _ in range(rounds)
    ]
    copies, encodes, decodes = zip(*seconds, strict=True)
    gigabytes = 4e-9 * delta.size
    figures = {
        "codec": repr(codec),
        "percent": 100 * payload.size / (4 * delta.size),
        "error": float(np.linalg.norm(back - delta) / np.linalg.norm(delta)),
        "error_sent": float(np.linalg.norm(back[kept] - delta[kept]) / np.linalg.norm(delta[kept])),
        "encode": gigabytes / statistics.median(encodes),
        "decode": gigabytes / statistics.median(decodes),
        "encode_vs_copy": statistics.median(c / e for c, e in zip(copies, encodes, strict=True)),
        "decode_vs_copy": statistics.median(c / d for c, d in zip(copies, decodes, strict=True)),
    }
    return figures, list(copies)


def cpu(work: Callable[[], object]) -> float:
    """CPU seconds that this process needs for `work`."""
    began = time.process_time()
    work()
    return max(time.process_time() - began, 1e-9)


if __name__ == "__main__":
    main()
