"""Error feedback: what compression left out of one update is added to the client's next
(1809.07599, 2508.15706).

    u = beta e + D        what the client would send, D its delta and e the residual that it keeps
    q = decode(encode(u)) what the server gets
    e <- u - q

With beta = 1 nothing is ever lost; beta < 1 lets a residual fade that describes an older and older
model. The mass is kept: e_T + sum beta^(T-t) q_t = sum beta^(T-t) D_t over the tasks t that were
accepted.

A round that is dropped: the residual is client state like Adam's moments, written for a task, and a
job starts from the residual of the last ACCEPTED task, as the server names it. So a task that is
tried again sends the same bytes, and one that was refused, late or lost leaves no trace: what its q
held of the old residual is still in the residual, and its own delta is gone, as if the client had
not been asked. A refused q is not put back into e: the residual's part of it was never taken out,
and would be sent twice.

Where the residual is wrong: under local differential privacy (it holds data without noise, and
sends it later), and for clients so rarely seen that it is older than what they train on; start
those from None.
"""

from __future__ import annotations

import numpy as np

BETA = 0.95  # of SparseLoCo


def feed(delta: np.ndarray, residual: np.ndarray | None, beta: float = BETA) -> np.ndarray:
    """u = beta e + D, new, of (n,) delta and (n,) residual; None is the residual before the first
    accepted task.

    >>> feed(np.array([1.0, 2.0]), np.array([0.0, 4.0]), beta=0.5)
    array([1., 4.])
    """
    if residual is None:
        return delta.copy()
    assert residual.shape == delta.shape, (
        f"a residual of {residual.shape} for a delta of {delta.shape}"
    )
    with np.errstate(over="ignore", invalid="ignore"):  # the server refuses what is not finite
        fed = residual * delta.dtype.type(beta)
        fed += delta
    return fed


def rest(fed: np.ndarray, sent: np.ndarray) -> np.ndarray:
    """e = u - q, new, of (n,) u as fed to the codec and (n,) q as the server decodes it.

    >>> rest(np.array([1.0, 4.0]), np.array([0.0, 4.0]))
    array([1., 0.])
    """
    with np.errstate(over="ignore"):
        return fed - sent


def measured(fed: np.ndarray, left: np.ndarray) -> dict[str, float]:
    """What a stage tells of u as fed and e as left out: how long e is, and which share of u's
    length that is.

    >>> measured(np.array([0.0, 5.0]), np.array([3.0, 4.0]))
    {'compress_error': 1.0, 'residual_norm': 5.0}
    """
    of, out = float(np.linalg.norm(fed)), float(np.linalg.norm(left))
    return {"compress_error": out / of if of > 0 else 0.0, "residual_norm": out}
