"""Noise that nobody without the key can predict or repeat: AES-256 in counter mode.

A run's key comes from the system's generator and stays in one file that only its owner may read
(0600). Every use derives a key of its own, HMAC-SHA256(key, purpose), so that no two uses share a
value. The purpose includes the sum that is released. If the server computes the same release again
after a crash, it gets the same noise and reveals nothing new. A release of any other sum gets
independent noise and is charged as another release.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import os
import secrets
from pathlib import Path

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from fedgpt.core.errors import FedGPTError
from fedgpt.core.files import sync

KEY_BYTES = 32
# number of values generated at a time, so that the intermediate arrays stay in the cache
CHUNK = 1 << 20


class SecureStream:
    """An endless stream of random values; the same key and words give the same stream."""

    def __init__(self, key: bytes, *words: str | float):
        derived = derive(key, *words)
        self._bits = Cipher(algorithms.AES(derived), modes.CTR(bytes(16))).encryptor()

    def uniform(self, count: int) -> np.ndarray:
        """(count,) float64 in [0, 1), 53 random bits each."""
        return (self._words(2 * count).view(np.uint64) >> 11) * 2.0**-53

    def add_normal(self, out: torch.Tensor, std: float) -> None:
        """Add N(0, std^2) to every element of a contiguous float32 vector, on any device.

        Box-Muller from two 32-bit uniforms in (0, 1): no value is beyond 6.8 standard deviations.
        """
        flat = out.view(-1)
        for start in range(0, flat.numel(), CHUNK):
            part = flat[start : start + CHUNK]
            part.add_(self._normal(part.numel()).to(part.device), alpha=std)

    def normal(self, count: int) -> np.ndarray:
        """(count,) float32 from N(0, 1)."""
        out = torch.zeros(count)
        self.add_normal(out, 1.0)
        return out.numpy()

    def _normal(self, count: int) -> torch.Tensor:
        half = (count + 1) // 2
        # float32 keeps 24 bits of the small uniforms, which give the tail; those next to 1 are
        # rounded to 1, a radius of 0
        uniforms = (
            torch.from_numpy(self._words(2 * half).astype(np.float32)).add_(0.5).mul_(2.0**-32)
        )
        radius = uniforms[:half].log_().mul_(-2).sqrt_()
        angle = uniforms[half:].mul_(2 * math.pi)
        return torch.cat((radius * angle.cos(), radius * angle.sin()))[:count]

    def _words(self, count: int) -> np.ndarray:
        """(count,) uint32 of the key stream."""
        return np.frombuffer(self._bits.update(bytes(4 * count)), np.uint32)


def derive(key: bytes, *words: str | float) -> bytes:
    """A key for one use: HMAC-SHA256 of the words.

    Each word is preceded by its length, so that no two lists of words give the same text.
    """
    text = b"".join(
        len(part).to_bytes(4, "big") + part for part in (str(word).encode() for word in words)
    )
    return hmac.new(key, text, hashlib.sha256).digest()


def secret_key(path: Path, fresh: bool) -> bytes:
    """The key in `path`; created there, readable only by its owner, if missing and `fresh`.

    Raises FedGPTError if it is missing otherwise, or damaged.
    """
    if not path.exists():
        if not fresh:
            raise FedGPTError(
                f"{path} is missing: without its key a private run cannot continue; start a new"
                " run in another folder"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "wb") as stream:
            stream.write(secrets.token_bytes(KEY_BYTES))
        sync(path)
        sync(path.parent)
    key = path.read_bytes()
    if len(key) != KEY_BYTES:
        raise FedGPTError(
            f"{path} has {len(key)} bytes, a key has {KEY_BYTES}: it is damaged; start a new run"
            " in another folder"
        )
    return key
