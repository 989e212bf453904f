"""Noise: normally distributed, unpredictable and never used twice."""

from __future__ import annotations

import hmac
import random
import stat
from pathlib import Path

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from scipy import stats
from support.advice import advises

from fedgpt.core.errors import FedGPTError
from fedgpt.privacy.randomness import SecureStream, derive, secret_key

KEY = bytes(range(32))


def test_noise_is_standard_normal():
    # an odd number, because values are made in pairs
    values = SecureStream(KEY, "a").normal(1_000_001)
    assert stats.kstest(values, "norm").pvalue > 1e-3
    assert abs(values.std() - 1) < 4 / np.sqrt(2 * values.size)
    tail = np.abs(values) > 4
    assert tail.sum() == pytest.approx(63.3, abs=4 * np.sqrt(63.3)), (
        "6.3e-5 of the values are in the tail"
    )


def test_many_short_streams_have_the_right_spread():
    scores = [
        (SecureStream(KEY, "spread", i).normal(2000).var() - 1) * np.sqrt(1000) for i in range(60)
    ]
    assert abs(np.mean(scores)) < 4 / np.sqrt(60)
    assert 0.6 < np.std(scores) < 1.5


def test_no_value_of_the_noise_is_there_a_second_time():
    """Values are made in pairs; if both were the same, their difference would have no noise."""
    size = 10_000
    noise = SecureStream(KEY, "pairs").normal(size)
    assert len(np.unique(np.abs(noise))) > 0.99 * size
    for lag in (1, 2, size // 2):
        assert abs(np.corrcoef(noise[:-lag], noise[lag:])[0, 1]) < 4 / np.sqrt(size - lag), lag


class Extreme(SecureStream):
    """A stream of one word only."""

    def __init__(self, word: int):
        self.word = word

    def _words(self, count: int) -> np.ndarray:
        return np.full(count, self.word, np.uint32)


@pytest.mark.parametrize(("word", "radius"), [(0, 6.76), (1 << 31, 1.18), ((1 << 32) - 1, 0.0)])
def test_noise_of_extreme_random_words_is_finite(word, radius):
    assert np.hypot(*Extreme(word).normal(2)) == pytest.approx(radius, abs=0.01)


def test_uniforms_are_uniform():
    values = SecureStream(KEY, "u").uniform(100_000)
    assert stats.kstest(values, "uniform").pvalue > 1e-3
    assert values.min() >= 0 and values.max() < 1


def test_another_word_or_key_gives_another_stream():
    one = SecureStream(KEY, "a", 1).normal(10_000)
    np.testing.assert_array_equal(one, SecureStream(KEY, "a", 1).normal(10_000))
    for other in (
        SecureStream(KEY, "a", 2),
        SecureStream(KEY, "a1"),
        SecureStream(bytes(32), "a", 1),
    ):
        assert abs(np.corrcoef(one, other.normal(10_000))[0, 1]) < 4 / 100
    assert derive(KEY, "ab", "c") != derive(KEY, "a", "bc"), "the lengths of the words count"


def test_a_stream_continues_and_does_not_repeat_itself():
    stream = SecureStream(KEY, "a")
    first, second = stream.normal(10_000), stream.normal(10_000)
    assert abs(np.corrcoef(first, second)[0, 1]) < 4 / 100


def test_noise_is_added_in_place_to_vectors_of_any_length():
    for size in (1, 2, 3, (1 << 20) + 5):
        vector = torch.full((size,), 100.0)
        SecureStream(KEY, size).add_normal(vector, 0.5)
        assert vector.isfinite().all() and (vector != 100).any()
        assert float((vector - 100).abs().max()) < 0.5 * 6.8
    assert float((vector - 100).std()) == pytest.approx(0.5, rel=0.01)


def test_a_stream_is_aes_256_in_counter_mode_under_a_key_of_its_own():
    """Block by block, with the block cipher of another mode and the key by the rule in words."""
    words = b"".join(len(word).to_bytes(4, "big") + word for word in (b"noise", b"3"))
    own = hmac.digest(KEY, words, "sha256")
    assert len(own) * 8 == 256
    block = Cipher(algorithms.AES(own), modes.ECB()).encryptor()
    bits = b"".join(block.update(counter.to_bytes(16, "big")) for counter in range(50))
    expected = (np.frombuffer(bits, np.uint64) >> 11) * 2.0**-53
    np.testing.assert_array_equal(SecureStream(KEY, "noise", 3).uniform(100), expected)


def test_noise_longer_than_a_chunk_does_not_repeat_itself(monkeypatch):
    whole = SecureStream(KEY, "a").normal(20_000)
    monkeypatch.setattr("fedgpt.privacy.randomness.CHUNK", 10_000)
    parts = SecureStream(KEY, "a").normal(20_000)
    assert abs(np.corrcoef(parts[:10_000], parts[10_000:])[0, 1]) < 4 / 100
    assert stats.kstest(parts, "norm").pvalue > 1e-3 and parts.shape == whole.shape


def test_global_seeds_have_no_effect(tmp_path):
    keys = []
    for name in "ab":
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        keys.append(secret_key(tmp_path / name, fresh=True))
    assert keys[0] != keys[1]
    one, other = (SecureStream(key, "a").normal(100) for key in keys)
    assert (one != other).all()


def test_only_the_owner_may_read_the_key_and_a_restart_finds_it(tmp_path):
    path = tmp_path / "run" / "privacy.key"
    key = secret_key(path, fresh=True)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert secret_key(path, fresh=True) == secret_key(path, fresh=False) == key
    assert secret_key(tmp_path / "other.key", fresh=True) != key
    path.unlink()
    assert secret_key(path, fresh=True) != key, "it does not follow from the name of the file"


def test_a_new_key_is_on_the_disk_before_it_is_used(tmp_path, monkeypatch):
    synced = []

    def record(descriptor: int) -> None:
        synced.append(Path(f"/proc/self/fd/{descriptor}").resolve())

    monkeypatch.setattr("fedgpt.core.files.os.fsync", record)
    secret_key(tmp_path / "privacy.key", fresh=True)
    assert synced == [(tmp_path / "privacy.key").resolve(), tmp_path.resolve()]


def test_a_missing_or_damaged_key_is_refused(tmp_path):
    with pytest.raises(FedGPTError, match=r"privacy\.key is missing") as missing:
        secret_key(tmp_path / "privacy.key", fresh=False)
    advises(missing.value, "cannot continue; start a new run in another folder")
    (tmp_path / "privacy.key").write_bytes(b"short")
    with pytest.raises(FedGPTError, match="has 5 bytes") as damaged:
        secret_key(tmp_path / "privacy.key", fresh=True)
    advises(damaged.value, "it is damaged; start a new run in another folder")
    secret_key(tmp_path / "new" / "privacy.key", fresh=True)
