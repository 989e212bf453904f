"""The cost of a server step: fedgpt's aggregation against Flower's, on updates of a 10 M GPT.

    python benchmarks/aggregate.py            # about 4 minutes, 3 GB of memory
    python benchmarks/aggregate.py --quick    # a smoke run

Each side starts from what it has in memory when the replies have arrived. For Flower these are
messages with the weights of a client, tensor by tensor; timed is `aggregate_train` of FedAvg,
FedMedian, FedTrimmedAvg and Krum, which also decodes the arrays. For fedgpt they are decoded, flat
updates; timed is `combine`, or adding every update and dividing once (`ExactSum`, whose result does
not depend on the order). Validation is timed on neither side: Flower does none, and fedgpt's gives
the norm of an update to `ExactSum`. fedgpt's sum and its Krum use every core, Flower's Krum as many
as OMP_NUM_THREADS allows; everything else runs in one thread.

The sides take turns. Figures are medians of the rounds, and a speed is Flower's seconds over
fedgpt's. `exact_model_copies` is the memory at the peak of the sum, without the updates, in copies
of the model. Every result is compared with one computed in float64: `error` is the largest
difference over the largest element.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import time
import tracemalloc
from collections.abc import Callable, Sequence

import numpy as np
from common import machine
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import strategy as stock
from flwr.supercore.task_identity import TaskIdentity

from fedgpt.aggregate.base import Strategy
from fedgpt.aggregate.exact import ExactSum
from fedgpt.aggregate.krum import Krum
from fedgpt.aggregate.median import Median
from fedgpt.aggregate.trimmed_mean import TrimmedMean
from fedgpt.config.compose import load
from fedgpt.core.flat import flatten
from fedgpt.core.messages import ServerState, Update
from fedgpt.model.gpt import GPT

TOKENS = (
    512.0  # tokens of every update: equal weights, because Flower's robust strategies have none
)
MANY, FEW = 32, 8  # numbers of updates


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="rounds to take medians of (5)")
    parser.add_argument("--quick", action="store_true", help="a smoke run: nano model, two rounds")
    chosen = parser.parse_args()
    rounds, name = (2, "nano") if chosen.quick else (chosen.rounds, "mini")
    logging.getLogger("flwr").setLevel(logging.WARNING)
    # Flower needs these ids to make a message
    TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1
    start, shapes = model(name)
    rng = np.random.default_rng(0)
    deltas = [(0.01 * rng.standard_normal(start.size)).astype(np.float32) for _ in range(MANY)]
    state = ServerState(start)
    pairs: dict[str, tuple[int, stock.Strategy, Strategy | None]] = {
        "exact_10m_x32": (MANY, stock.FedAvg(), None),
        "median_x8": (FEW, stock.FedMedian(), Median()),
        "trimmed_x8": (FEW, stock.FedTrimmedAvg(beta=0.25), TrimmedMean(trim=2)),
        "krum_x8": (FEW, stock.Krum(num_malicious_nodes=2), Krum(attackers=2, keep=1)),
    }
    figures: dict[str, object] = {}
    print(f"{'':<16}{'Flower s':>10}{'ours s':>10}{'speed':>8}{'error':>10}{'Flower error':>14}")
    for key, (count, theirs, ours) in pairs.items():
        part = deltas[:count]
        weights = [start - delta for delta in part]
        times, results = turns(rounds, theirs, weights, shapes, work(ours, part, state))
        expected = reference(key, part)
        errors = [error(start - results[0], expected), error(results[1], expected)]
        figures[key] = round(times[0] / times[1], 2)
        figures[f"{key}_seconds"], figures[f"{key}_error"] = round(times[1], 4), errors[1]
        row = f"{key:<16}{times[0]:>10.3f}{times[1]:>10.3f}{figures[key]:>8}"
        print(f"{row}{errors[1]:>10.1e}{errors[0]:>14.1e}")
        del weights
    copies = round(peak(work(None, deltas, state)) / start.nbytes, 2)
    figures["exact_model_copies"] = copies
    print(f"the sum of {MANY} updates needs {copies} copies of the model at its peak")
    about = {"parameters": start.size, "rounds": rounds, "model": name, **machine()}
    print(json.dumps({**figures, **about}))


def model(name: str) -> tuple[np.ndarray, list[tuple[str, tuple[int, ...]]]]:
    """A model's flat parameters, and the names and shapes of its tensors."""
    gpt = GPT(load([f"model={name}"]).model, 4097)
    gpt.init_weights(0)
    shapes = [(name, tuple(p.shape)) for name, p in gpt.named_parameters()]
    return flatten(gpt)[1].numpy().copy(), shapes


def reply(weights: np.ndarray, shapes: Sequence[tuple[str, tuple[int, ...]]], node: int) -> Message:
    """A client's reply as in Flower's quickstart: weights by tensor and number of examples."""
    arrays, begin = {}, 0
    for name, shape in shapes:
        end = begin + int(np.prod(shape))
        arrays[name] = Array(weights[begin:end].reshape(shape))
        begin = end
    request = Message(RecordDict(), dst_node_id=node + 1, message_type="train")
    request.metadata.__dict__["_message_id"] = str(node)
    content = RecordDict(
        {"arrays": ArrayRecord(arrays), "metrics": MetricRecord({"num-examples": int(TOKENS)})}
    )
    return Message(content, reply_to=request)


def work(
    rule: Strategy | None, deltas: Sequence[np.ndarray], state: ServerState
) -> Callable[[], np.ndarray]:
    """fedgpt's side: a rule over all updates, or the exact sum of updates as they arrive."""
    # validation has computed the norm of a decoded update
    norms = [float(np.linalg.norm(delta)) for delta in deltas]
    updates = [
        Update(f"{i:02}", 0, 0, delta, int(TOKENS), {"update_norm": norm})
        for i, (delta, norm) in enumerate(zip(deltas, norms, strict=True))
    ]
    if rule is not None:
        return lambda: rule.combine(updates, state)
    bound = 10 * norms[0]
    total = ExactSum(state.params.size, bound, len(deltas), TOKENS)
    total.add(deltas[0], TOKENS)  # touches the accumulator, as the version before does in a run

    def add_all() -> np.ndarray:
        total.reset(bound, len(deltas), TOKENS)
        for delta, norm in zip(deltas, norms, strict=True):
            total.add(delta, TOKENS, norm)
        return total.mean(TOKENS * len(deltas))

    return add_all


def turns(
    rounds: int,
    theirs: stock.Strategy,
    weights: Sequence[np.ndarray],
    shapes: Sequence[tuple[str, tuple[int, ...]]],
    ours: Callable[[], np.ndarray],
) -> tuple[list[float], list[np.ndarray]]:
    """Median seconds and last results of both sides.

    The replies are made anew in each round, because Flower's strategies empty them.
    """
    seconds: list[list[float]] = [[], []]
    arrays, result = None, weights[0]
    for _ in range(rounds):
        replies = [reply(vector, shapes, number) for number, vector in enumerate(weights)]
        began = time.perf_counter()
        arrays, _ = theirs.aggregate_train(1, replies)
        middle = time.perf_counter()
        result = ours()
        seconds[0].append(middle - began)
        seconds[1].append(time.perf_counter() - middle)
    assert arrays is not None, "every reply is valid"
    flat = np.concatenate([array.numpy().reshape(-1) for array in arrays.values()])
    return [statistics.median(times) for times in seconds], [flat, result]


def reference(key: str, deltas: Sequence[np.ndarray]) -> np.ndarray:
    """The rule's D in float64, computed as in its definition."""
    if key.startswith("exact"):
        total = sum((delta.astype(np.float64) for delta in deltas), np.zeros(deltas[0].size))
        return total / len(deltas)
    if key.startswith("krum"):
        rows = [delta.astype(np.float64) for delta in deltas]
        squares = np.array([[np.sum((a - b) ** 2) for b in rows] for a in rows])
        # the n - f - 2 nearest others
        nearest = np.sort(squares, axis=1)[:, 1 : len(deltas) - 2 - 1].sum(axis=1)
        return deltas[int(np.argmin(nearest))].astype(np.float64)
    columns = np.sort(np.stack(deltas).astype(np.float64), axis=0)
    cut = 2 if key.startswith("trimmed") else (len(deltas) - 1) // 2
    return columns[cut : len(deltas) - cut].mean(axis=0)


def error(result: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference, over the largest element."""
    return float(np.abs(result - expected).max() / np.abs(expected).max())


def peak(do: Callable[[], np.ndarray]) -> float:
    """Bytes that the sum needs at its peak: its accumulator, what it allocates, and its result."""
    tracemalloc.start()
    try:
        do()
        # the float64 accumulator was allocated before tracing started
        return tracemalloc.get_traced_memory()[1] + 2 * 4 * do().size
    finally:
        tracemalloc.stop()


if __name__ == "__main__":
    main()
