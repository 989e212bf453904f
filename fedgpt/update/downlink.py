"""The model sent to clients: in fp32, in bf16, or as steps from a cached version.

    P_0 = w_0                        vector that clients get at version 0
    s_v = encode(w_v - P_{v-1})      the step to version v, in int8 or int4
    P_v = P_{v-1} + decode(s_v)      vector from which clients start at version v

A client that has cached P_u gets the steps s_{u+1}, ..., s_v and adds them in that order, which
gives the same bits as the server has. A client without a cached version gets the vector P_v. A
client also gets P_v if its steps together would be longer. The compression error of one step is
part of the next step, because each step is computed from P. So errors do not accumulate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from fedgpt.core.messages import ServerState
from fedgpt.update.codecs.base import Codec
from fedgpt.update.codecs.bf16 import bf16_rounded
from fedgpt.update.compress import make_codec

STEPS = ("int8", "int4")  # values of update.downlink under which steps are sent
PREFIX = "downlink/"  # prefix of the names of these arrays in a checkpoint


class Published:
    """The server's state: P and the latest steps."""

    def __init__(self, downlink: str, extra: Mapping[str, np.ndarray]):
        """`extra` contains the arrays of `memory` in the checkpoint from which the run
        continues.
        """
        self.downlink = downlink
        self._codec = step_codec(downlink)
        self._vector = extra.get(f"{PREFIX}vector")
        start = f"{PREFIX}step/"
        self._steps = {
            int(name.removeprefix(start)): array
            for name, array in extra.items()
            if name.startswith(start)
        }

    def advance(self, state: ServerState) -> np.ndarray:
        """Return the vector from which clients start at this version, (parameters,) float32.

        It must be called once for each version, in order.
        """
        if self._codec is None:
            return bf16_rounded(state.params) if self.downlink == "bf16" else state.params
        if self._vector is None:
            self._vector = state.params
        else:
            step = self._codec.encode(state.params - self._vector)
            self._vector = self._vector + self._codec.decode(step, self._vector.size)
            self._steps[state.version] = step
            for old in [
                version
                for version in self._steps
                if version <= state.version - self._most(step.nbytes)
            ]:
                del self._steps[old]
        return self._vector

    def steps(self, cached: int, version: int) -> tuple[np.ndarray, ...] | None:
        """Return the steps from version `cached` (-1: none is cached) to `version`.

        None means that the client must get the complete vector, as without a cached version: there
        is no step to version 0.
        """
        wanted = range(cached + 1, version + 1)
        if self._codec is None or any(v not in self._steps for v in wanted):
            return None
        return tuple(self._steps[number] for number in wanted)

    def memory(self) -> dict[str, np.ndarray]:
        """Return the arrays for a checkpoint, by name."""
        if self._vector is None:
            return {}
        steps = {f"{PREFIX}step/{version}": step for version, step in self._steps.items()}
        return {f"{PREFIX}vector": self._vector, **steps}

    def _most(self, size: int) -> int:
        """Return the largest number of steps of `size` bytes that are together shorter than the
        vector.
        """
        assert self._vector is not None, "there are steps from a vector only"
        return (self._vector.nbytes - 1) // size


def rebuilt(cached: np.ndarray, steps: np.ndarray, downlink: str) -> np.ndarray:
    """Return the new P at a client, given the cached P and the bytes of the steps since then.

    Raises UpdateRejected for damaged steps.
    """
    codec = step_codec(downlink)
    assert codec is not None, f"update.downlink={downlink} sends no steps"
    vector = cached
    for payload in np.split(steps, steps.size // codec.payload_bytes(cached.size)):
        vector = vector + codec.decode(payload, cached.size)
    return vector


def joined(steps: Sequence[np.ndarray]) -> np.ndarray:
    """Return steps as the one array of a message.

    For a client that already has the version this is one byte, because no array may be empty.
    """
    return np.concatenate(steps) if steps else np.zeros(1, np.uint8)


def step_codec(downlink: str) -> Codec | None:
    """Return the codec of the steps, or None if no steps are sent."""
    return make_codec(downlink) if downlink in STEPS else None
