"""Decoding an update: a valid one or a reason code, and nothing else."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from fedgpt.core.errors import UpdateRejected
from fedgpt.core.messages import Reply, Update
from fedgpt.update.codecs.base import Codec
from fedgpt.update.wire import REASONS, Expected, decode, encode

DELTA = np.linspace(-1, 1, 40, dtype=np.float32)
EXPECTED = Expected("run", "alice", 3, 5, DELTA.size, 100, norm_limit=50.0)
UPDATE = Update("alice", 3, 5, DELTA, 64, {"train_loss": 2.5})


def reply(**changes) -> Reply:
    header, payload = encode("run", UPDATE)
    fields = json.loads(header) | changes.pop("header", {})
    return Reply("alice", 3, json.dumps(fields), changes.pop("payload", payload), **changes)


def code_of(bad: Reply) -> str:
    with pytest.raises(UpdateRejected) as caught:
        decode(bad, EXPECTED)
    assert caught.value.code in REASONS
    return caught.value.code


def test_a_valid_update_is_decoded_unchanged_with_its_norm():
    update = decode(reply(), EXPECTED)
    assert update.tokens == 64 and update.client == "alice"
    assert update.metrics == {
        "train_loss": 2.5,
        "update_norm": pytest.approx(np.linalg.norm(DELTA), rel=1e-6),
    }
    np.testing.assert_array_equal(update.delta, DELTA)


def test_negative_zero_and_denormals_are_accepted():
    delta = np.array([-0.0, 1e-45, *DELTA[2:]], np.float32)
    header, payload = encode("run", replace(UPDATE, delta=delta))
    np.testing.assert_array_equal(decode(Reply("alice", 3, header, payload), EXPECTED).delta, delta)


@pytest.mark.parametrize(
    "header, code",
    [
        ({"run": "other"}, "wrong_run"),
        ({"client": "mallory"}, "wrong_sender"),
        ({"task": 2}, "unknown_job"),
        ({"task": 3.0}, "unknown_job"),
        ({"version": 4}, "late"),
        ({"size": 10**13}, "size_mismatch"),
        ({"sha256": "0" * 64}, "digest_mismatch"),
        ({"sha256": None}, "digest_mismatch"),
        ({"format": 1}, "bad_encoding"),
        ({"compress": "int8"}, "bad_encoding"),
        *[
            ({"tokens": t}, "bad_num_tokens")
            for t in (0, -1, 101, 1e12, 5.0, "5", [5], None, True, float("nan"))
        ],
        *[
            ({"metrics": m}, "bad_metric")
            for m in (None, [], {"a": "b"}, {"a": None}, {"a": True}, {"a": float("nan")})
        ],
    ],
)
def test_a_wrong_header_has_its_code(header, code):
    assert code_of(reply(header=header)) == code


@pytest.mark.parametrize(
    "header",
    [
        {"metrics": {"z" * 1000: "a"}},
        {"metrics": {"a": "z" * 1000}},
        {"tokens": "z" * 1000},
        {"run": "z" * 1000},
        {"compress": "z" * 1000},
    ],
)
def test_what_a_client_writes_in_its_header_is_cut_in_the_detail_of_its_rejection(header):
    with pytest.raises(UpdateRejected) as caught:
        decode(reply(header=header), EXPECTED)
    assert 0 < caught.value.detail.count("z") < 60


@pytest.mark.parametrize(
    "payload, code",
    [
        (None, "bad_encoding"),
        (b"\x80\x04", "bad_encoding"),
        (DELTA.tolist(), "bad_encoding"),
        (np.array([object()] * 40), "wrong_dtype"),
        (DELTA.astype(np.float64), "wrong_dtype"),
        (DELTA.astype(np.int64), "wrong_dtype"),
        (DELTA.astype(">f4"), "wrong_dtype"),
        (DELTA[:-1], "wrong_shape"),
        (DELTA[:1], "wrong_shape"),
        (np.stack([DELTA, DELTA]), "wrong_shape"),
        (DELTA[None], "wrong_shape"),
        (DELTA * 2, "digest_mismatch"),
    ],
)
def test_a_wrong_payload_has_its_code(payload, code):
    assert code_of(reply(payload=payload)) == code


@pytest.mark.parametrize(
    "value, code",
    [
        (np.nan, "non_finite"),
        (np.inf, "non_finite"),
        (-np.inf, "non_finite"),
        (3e38, "norm_limit"),
        (60, "norm_limit"),
    ],
)
def test_wrong_values_have_their_code_though_the_digest_fits(value, code):
    delta = DELTA.copy()
    delta[:10] = value
    header, payload = encode("run", replace(UPDATE, delta=delta))
    assert code_of(Reply("alice", 3, header, payload)) == code


def test_an_error_reply_is_a_client_error_with_its_reason():
    with pytest.raises(UpdateRejected, match="client_error: code 2: no disk"):
        decode(Reply("alice", 3, error="code 2: no disk"), EXPECTED)


@pytest.mark.parametrize(
    "text, code",
    [
        ("", "bad_encoding"),
        ("null", "bad_encoding"),
        ("[" * 50_000, "bad_encoding"),
        ("9" * 9_999, "bad_encoding"),
        ('{"format": 2', "bad_encoding"),
        ("x" * 70_000, "too_large"),
        ("\ud800", "bad_encoding"),
    ],
)
def test_a_header_that_cannot_be_read_has_its_code(text, code):
    assert code_of(Reply("alice", 3, text, DELTA)) == code


def test_the_largest_header_the_largest_metric_and_the_longest_update_are_accepted():
    """And nothing above them."""
    longest = float(np.linalg.norm(DELTA))
    expected = replace(EXPECTED, norm_limit=decode(reply(), EXPECTED).metrics["update_norm"])
    assert decode(reply(), expected).metrics["update_norm"] == pytest.approx(longest)
    with pytest.raises(UpdateRejected, match="norm_limit"):
        decode(reply(), replace(expected, norm_limit=np.nextafter(expected.norm_limit, 0)))

    for metric in (1e30, -1e30):
        assert decode(reply(header={"metrics": {"a": metric}}), EXPECTED).metrics["a"] == metric
        assert code_of(reply(header={"metrics": {"a": metric * 1.001}})) == "bad_metric"

    room = 65_536 - len(reply(header={"padding": ""}).header)
    assert decode(reply(header={"padding": "x" * room}), EXPECTED)
    assert code_of(reply(header={"padding": "x" * (room + 1)})) == "too_large"


@pytest.mark.parametrize(
    "missing",
    [
        "format",
        "run",
        "client",
        "task",
        "version",
        "size",
        "compress",
        "sha256",
        "tokens",
        "metrics",
    ],
)
def test_a_header_without_a_field_is_rejected(missing):
    header, payload = encode("run", UPDATE)
    fields = {name: value for name, value in json.loads(header).items() if name != missing}
    assert code_of(Reply("alice", 3, json.dumps(fields), payload)) in REASONS


class Careless(Codec):
    """A codec whose `decode` violates the interface in the way that `broken` says."""

    def __init__(self, broken: object):
        self.broken = broken

    def payload_bytes(self, size: int) -> int:
        return size

    def encode(self, delta: np.ndarray) -> np.ndarray:
        return np.ones(delta.size, np.uint8)

    def decode(self, payload: np.ndarray, size: int) -> np.ndarray:
        if isinstance(self.broken, Exception):
            raise self.broken
        return self.broken  # pyright: ignore[reportReturnType]  # wrong on purpose


@pytest.mark.parametrize(
    "broken, code",
    [
        (ValueError("x"), "bad_encoding"),
        (None, "bad_encoding"),
        (DELTA.tolist(), "bad_encoding"),
        (DELTA.astype(np.float64), "bad_encoding"),
        (DELTA[:-1], "bad_encoding"),
        (DELTA[None], "bad_encoding"),
        (np.full(DELTA.size, np.nan, np.float32), "non_finite"),
        (np.full(DELTA.size, 60, np.float32), "norm_limit"),
    ],
)
def test_invalid_results_of_a_codec_are_rejected(broken, code):
    codec = Careless(broken)
    header, payload = encode("run", UPDATE, codec)
    with pytest.raises(UpdateRejected) as caught:
        decode(Reply("alice", 3, header, payload), replace(EXPECTED, codec=codec))
    assert caught.value.code == code
