"""Payloads of compressed updates: their format, and hostile ones."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from support.codecs import delta_of, every_codec, through

from fedgpt.core.errors import UpdateRejected
from fedgpt.update.codecs.base import CHUNK, Codec
from fedgpt.update.compress import CODECS, make_codec
from fedgpt.update.wire import REASONS

# the format


@pytest.mark.parametrize(
    "name, options, delta, payload",
    [
        ("none", {}, [1, -2], "0000803f 000000c0"),
        ("bf16", {}, [1, -2, 1 + 2**-8, 1 + 3 * 2**-8], "803f 00c0 803f 823f"),
        ("int8", {}, [127, -64, 0, 1.4], "0000803f 7fc00001"),
        ("int8", {"block": 16}, [127] + 16 * [0], "0000803f 00008000 7f" + 16 * "00"),
        ("int4", {}, [7, -4, 0, 1, 3], "0000803f c7 10 03"),
        ("e3m0", {}, [1, -0.5, 0, 2**-6, 0.25], "0000803f e7 10 05"),
        ("topk", {"density": 0.5}, [0, 3, 0, -1], "00004040 000080bf c0 a0"),
        ("sparse_loco", {}, 3 * [0] + [1, 0, -2] + 59 * [0], "803f0040 e4000050"),
        *[(name, {}, [], "") for name in CODECS.names()],
    ],
)
def test_the_format_is_frozen(name, options, delta, payload):
    codec, delta = make_codec(name, **options), np.array(delta, np.float32)
    assert codec.encode(delta).tobytes().hex() == payload.replace(" ", "")


@every_codec
def test_a_payload_may_be_unaligned_strided_or_read_only(codec):
    delta = delta_of(4097, "gaussian", 0)
    payload = codec.encode(delta)
    expected = codec.decode(payload, delta.size)
    shifted = np.empty(payload.size + 1, np.uint8)[1:]
    shifted[:] = payload
    strided = np.repeat(payload, 2)[::2]
    from_wire = np.frombuffer(payload.tobytes(), np.uint8)  # not writable
    for other in (shifted, strided, from_wire):
        np.testing.assert_array_equal(codec.decode(other, delta.size), expected)
    np.testing.assert_array_equal(codec.encode(np.repeat(delta, 2)[::2]), payload)


# hostile payloads


def code_of(codec: Codec, payload: object, size: int) -> str:
    with pytest.raises(UpdateRejected) as caught:
        codec.decode(payload, size)
    assert caught.value.code in REASONS
    return caught.value.code


@every_codec
def test_only_bytes_of_the_exact_length_are_read(codec):
    delta = delta_of(1000, "gaussian", 0)
    good = codec.encode(delta)
    assert code_of(codec, None, 1000) == code_of(codec, good.tobytes(), 1000) == "bad_encoding"
    assert code_of(codec, good.tolist(), 1000) == "bad_encoding"
    for other in (
        good.view(np.int8),
        good.astype(np.float32),
        np.array([object()] * good.size),
        good.astype("U3"),
    ):
        assert code_of(codec, other, 1000) == "wrong_dtype"
    for other in (good[None], good[:, None], np.zeros((), np.uint8)):
        assert code_of(codec, other, 1000) == "wrong_shape"
    for other in (good[:-1], good[:0], np.append(good, np.uint8(0)), np.zeros(10**6, np.uint8)):
        assert code_of(codec, other, 1000) == "size_mismatch"


def mutants(good: np.ndarray, rng: np.random.Generator, count: int):
    for turn in range(count):
        bad, kind = good.copy(), turn % 6
        at = rng.integers(0, max(bad.size, 1), rng.integers(1, 4))
        if kind == 0 and bad.size:
            bad[at] ^= np.uint8(1) << rng.integers(0, 8, at.size, dtype=np.uint8)
        elif kind == 1 and bad.size:
            bad[at] = rng.choice([0, 0x7F, 0x80, 0xFF])
        elif kind == 2:
            bad = bad[: at[0]]
        elif kind == 3:
            bad = np.append(bad, rng.integers(0, 256, at.size, dtype=np.uint8))
        elif kind == 4:
            bad = rng.integers(0, 256, bad.size, dtype=np.uint8)
        elif bad.size:  # a piece over another
            length = int(rng.integers(0, bad.size))
            to, source = rng.integers(0, bad.size - length, 2)
            bad[to : to + length] = good[source : source + length]
        yield bad


@every_codec
def test_a_mutant_is_refused_or_finite(codec):
    rng = np.random.default_rng(5)
    taken = 0
    for size, count in ((0, 20), (1, 300), (65, 1000), (257, 700), (4099, 300)):
        good = codec.encode(delta_of(size, "few" if size == 257 else "gaussian", size))
        for bad in mutants(good, rng, count):
            try:
                values = codec.decode(bad, size)
            except UpdateRejected as refused:
                assert refused.code in ("size_mismatch", "bad_encoding", "non_finite"), refused
                continue
            assert bad.size == good.size
            assert (
                values.shape == (size,) and values.dtype == np.float32 and np.isfinite(values).all()
            )
            assert through(codec, values).shape == (size,)
            taken += 1
    assert taken, "some mutants are valid payloads of other values; the digest detects those"


@every_codec
def test_memory_depends_on_what_the_server_expects_and_not_on_the_payload(codec):
    size = 1 << 18
    good = codec.encode(delta_of(size, "gaussian", 0))
    rng = np.random.default_rng(0)
    hostile = [
        good,
        rng.integers(0, 256, good.size, dtype=np.uint8),
        np.full(good.size, 255, np.uint8),
        np.zeros_like(good),
    ]
    tracemalloc.start()
    try:
        for payload in (*hostile, np.zeros(32 * size, np.uint8)):
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            try:
                codec.decode(payload, size)
            except UpdateRejected as refused:
                assert len(str(refused)) < 100
            # the delta, and scratch space: positions are 8 bytes each, and topk with density 1
            # sends all of them
            room = 4 * size + (40 * codec.kept(size) if codec.name == "topk" else size) + (1 << 20)
            assert tracemalloc.get_traced_memory()[1] - before <= room
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name, options", [("none", {}), ("bf16", {}), ("topk", {"density": 1.0})])
def test_a_value_that_is_not_finite_is_refused_wherever_it_is(name, options):
    """Codecs look at CHUNK values at a time."""
    codec, delta = make_codec(name, **options), np.ones(CHUNK + 2, np.float32)
    for at in (0, CHUNK - 1, CHUNK, CHUNK + 1):
        bad = delta.copy()
        bad[at] = -np.inf
        assert code_of(codec, codec.encode(bad), bad.size) == "non_finite"


def patched(codec: Codec, delta: np.ndarray, at: int, piece: np.ndarray) -> np.ndarray:
    payload = codec.encode(delta)
    piece = np.atleast_1d(piece).view(np.uint8)
    payload[at : at + piece.size] = piece
    return payload


@pytest.mark.parametrize("name", ["int8", "int4", "e3m0"])
def test_a_scale_is_finite_and_not_negative_and_cannot_overflow(name):
    codec = make_codec(name, block=16)
    delta = delta_of(33, "gaussian", 0)
    for scale, code in [
        (np.nan, "non_finite"),
        (np.inf, "non_finite"),
        (-np.inf, "non_finite"),
        (-1, "bad_encoding"),
    ]:
        assert code_of(codec, patched(codec, delta, 8, np.float32(scale)), 33) == code
    assert np.isfinite(codec.decode(patched(codec, delta, 8, codec.limit), 33)).all()
    if name != "e3m0":
        above = np.nextafter(codec.limit, np.float32(np.inf))
        assert code_of(codec, patched(codec, delta, 8, above), 33) == "bad_encoding"


@pytest.mark.parametrize(
    "name, at, byte",
    [
        ("int8", 8, 0x80),
        ("int4", 8, 0x08),
        ("int4", 8, 0x80),
        ("int4", -1, 0x10),
        ("e3m0", 8, 0x08),
        ("e3m0", -1, 0x70),
    ],
)
def test_a_code_that_no_encoder_writes_is_refused(name, at, byte):
    codec = make_codec(name, block=16)
    payload = codec.encode(delta_of(17, "gaussian", 0))
    payload[at] = byte  # -1: the half byte after the last of 17 codes
    assert code_of(codec, payload, 17) == "bad_encoding"


@pytest.mark.parametrize(
    "tail",
    [
        "c0 00",  # no marks
        "c0 80",  # one of two
        "c0 e0",  # three
        "c0 b0",  # two and one after the end of the bitmap
        "c0 90",  # the second mark lies after the end
        "00 c0",  # both positions are 0
        "80 c0",  # 1, then 0
        "e0 a0",  # bits after the low bits
    ],
)
def test_topk_refuses_positions_that_do_not_rise(tail):
    codec = make_codec("topk", density=0.5)
    good = np.frombuffer(bytes.fromhex("00004040 000080bf c0 a0"), np.uint8)
    np.testing.assert_array_equal(codec.decode(good, 4), np.array([0, 3, 0, -1], np.float32))
    bad = np.append(good[:8], np.frombuffer(bytes.fromhex(tail), np.uint8))
    assert code_of(codec, bad, 4) == "bad_encoding"


def test_topk_refuses_a_position_after_the_end_of_the_delta():
    codec = make_codec("topk", density=0.4)  # 2 of 5: low bits 1, bitmap of 4
    good = np.frombuffer(bytes.fromhex("00004040 000080bf 00 90"), np.uint8)
    np.testing.assert_array_equal(codec.decode(good, 5), np.array([3, 0, 0, 0, -1], np.float32))
    bad = np.append(good[:8], np.array([0x40, 0x90], np.uint8))  # 5 instead of 4
    assert code_of(codec, bad, 5) == "bad_encoding"


def sparse_payload(entries: list[int], levels: list[int]) -> np.ndarray:
    bits = [entry >> bit & 1 for bit in range(14) for entry in entries]
    return np.append(np.array(levels, "<u2").view(np.uint8), np.packbits(bits))


@pytest.mark.parametrize(
    "entries, levels, code",
    [
        ([3, 64], [0x3F80, 0x4000], None),
        ([3, 0], [0x3F80, 0x4000], None),  # one element
        ([0, 0], [0, 0], None),  # no element
        ([3, 3], [0x3F80, 0x4000], "bad_encoding"),
        ([3, 2], [0x3F80, 0x4000], "bad_encoding"),
        ([3, 4096], [0x3F80, 0x4000], "bad_encoding"),  # position 0 with another magnitude
        ([3, 65], [0x3F80, 0x4000], "bad_encoding"),  # of 65 elements
        ([3, 4095], [0x3F80, 0x4000], "bad_encoding"),
        ([3, 4], [0x4000, 0x3F80], "bad_encoding"),
        ([3, 4], [0xBF80, 0x3F80], "bad_encoding"),
        ([3, 4], [0xBF80, 0xC000], "bad_encoding"),
        ([3, 4], [0x3F80, 0x7F80], "non_finite"),
        ([3, 4], [0x7FC0, 0x7FC0], "non_finite"),
    ],
)
def test_sparse_loco_refuses_positions_that_do_not_rise_and_wrong_scales(entries, levels, code):
    codec, payload = make_codec("sparse_loco"), sparse_payload(entries, levels)
    if code:
        assert code_of(codec, payload, 65) == code
    else:
        values = codec.decode(payload, 65)
        assert set(np.flatnonzero(values)) == {at for at in entries if at}
        np.testing.assert_array_equal(codec.encode(values)[4:], payload[4:])
    payload[-1] |= 1
    assert code_of(codec, payload, 65) in ("bad_encoding", "non_finite")
