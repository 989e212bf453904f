"""Error feedback: a client adds the compression error of one update to its next update.

    u = beta e + D         D: the client's delta; e: its residual, zero at first
    q = decode(encode(u))  what the server receives
    e <- u - q             compression error, stored by the client

(1809.07599, 2508.15706.) With beta = 1 no part of an update is lost. With beta < 1 an old residual
decays, which is intended because it was computed on an old model. The sum is preserved: over the
accepted jobs t = 1 .. T, e_T + sum beta^(T-t) q_t = sum beta^(T-t) D_t.

The residual is client state like Adam's moments: it is saved with the number of the job that wrote
it, and a job starts from the residual of the last ACCEPTED job, which the server names. So a retry
sends the same bytes, and a job that was rejected, late or lost does not change the residual: its
delta is dropped, as if the client had not been selected. Its q must not be added to e again,
because e still contains that part.

Error feedback is wrong under local differential privacy: the residual contains data without noise
and sends it later. It is also wrong for clients that are selected so rarely that their residual is
out of date. Start those from None.
"""

from __future__ import annotations

import numpy as np

BETA = 0.95  # the decay that SparseLoCo uses


def feed(delta: np.ndarray, residual: np.ndarray | None, beta: float = BETA) -> np.ndarray:
    """Return u = beta e + D, a new array, of (n,) delta D and (n,) residual e.

    The residual is None before the first accepted job.

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
    """Return e = u - q, a new array, of (n,) u as encoded and (n,) q as the server decodes it.

    >>> rest(np.array([1.0, 4.0]), np.array([0.0, 4.0]))
    array([1., 0.])
    """
    with np.errstate(over="ignore"):
        return fed - sent


def measured(fed: np.ndarray, left: np.ndarray) -> dict[str, float]:
    """Return the metrics of (n,) u and e: the norm of e, and this norm divided by the norm of u.

    >>> measured(np.array([0.0, 5.0]), np.array([3.0, 4.0]))
    {'compress_error': 1.0, 'residual_norm': 5.0}
    """
    of, out = float(np.linalg.norm(fed)), float(np.linalg.norm(left))
    return {"compress_error": out / of if of > 0 else 0.0, "residual_norm": out}
