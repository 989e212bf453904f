"""The model on its way to the clients: whole, in bf16, or as steps from a version that a client
already has.

    P_0 = w_0                        what clients get at version 0, whole
    s_v = encode(w_v - P_{v-1})      the step to version v, in int8 or int4
    P_v = P_{v-1} + decode(s_v)      what all clients start from at version v, however they came to it

A client that has P_u gets s_{u+1}, ..., s_v and adds them up, in that order and to the same bits;
another one, or one so far behind that its steps would be no shorter, gets P_v whole. What a step
leaves out is in the next one, as that is measured from P: the error never adds up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from fedgpt.core.messages import ServerState
from fedgpt.update.blockwise import bf16_rounded
from fedgpt.update.compress import Compressor, make_compressor

STEPS = ("int8", "int4")  # values of update.downlink under which steps are sent
WAYS = ("fp32", "bf16", *STEPS)
PREFIX = "downlink/"


class Published:
    """The server's side: P, and the latest steps."""

    def __init__(self, downlink: str, extra: Mapping[str, np.ndarray]):
        """`extra`: what `memory` gave a checkpoint."""
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
        """What clients start from at this version: (parameters,) float32; to be called once for
        each, in order.
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

    def steps(self, held: int, version: int) -> tuple[np.ndarray, ...] | None:
        """What a client that has version `held` needs for `version`; None where it must get the
        whole vector.
        """
        wanted = range(held + 1, version + 1)
        if self._codec is None or held < 0 or any(number not in self._steps for number in wanted):
            return None
        return tuple(self._steps[number] for number in wanted)

    def memory(self) -> dict[str, np.ndarray]:
        """For a checkpoint."""
        if self._vector is None:
            return {}
        steps = {f"{PREFIX}step/{version}": step for version, step in self._steps.items()}
        return {f"{PREFIX}vector": self._vector, **steps}

    def _most(self, size: int) -> int:
        """How many steps are shorter than the vector."""
        assert self._vector is not None, "there are steps from a vector only"
        return (self._vector.nbytes - 1) // size


def rebuilt(held: np.ndarray, steps: np.ndarray, downlink: str) -> np.ndarray:
    """The client's side: P from the P that it has and the bytes of the steps since, new; raises
    UpdateRejected.
    """
    codec = step_codec(downlink)
    assert codec is not None, f"update.downlink={downlink} sends no steps"
    vector = held
    for payload in np.split(steps, steps.size // codec.most_bytes(held.size)):
        vector = vector + codec.decode(payload, held.size)
    return vector


def joined(steps: Sequence[np.ndarray]) -> np.ndarray:
    """Steps as the one array of a message; a client that has the version gets one byte, as no array
    may be empty.
    """
    return np.concatenate(steps) if steps else np.zeros(1, np.uint8)


def step_codec(downlink: str) -> Compressor | None:
    """The codec of the steps, or None where none are sent."""
    return make_compressor(downlink) if downlink in STEPS else None
