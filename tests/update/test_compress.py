"""Every codec of the compress stage: round trips, sizes, errors, a slow second version, and hostile payloads."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedgpt.core.errors import ConfigError, UpdateRejected
from fedgpt.update.blockwise import MAX
from fedgpt.update.codec import REASONS
from fedgpt.update.compress import COMPRESSORS, Compressor, make_compressor

FAMILY = [
    make_compressor("none"),
    make_compressor("bf16"),
    *[make_compressor("int8", block=block) for block in (16, 256, 1024)],
    *[make_compressor("int4", block=block) for block in (16, 64, 256)],
    *[make_compressor("e3m0", block=block) for block in (16, 256)],
    *[make_compressor("topk", density=density) for density in (1 / 64, 0.3, 1.0)],
    make_compressor("sparse_loco"),
]
INTEGER = [codec for codec in FAMILY if codec.name in ("int8", "int4")]
every_codec = pytest.mark.parametrize("codec", FAMILY, ids=repr)
quickly = settings(max_examples=40, deadline=None)

SIZES = [0, 1, 2, 3, 15, 16, 17, 63, 64, 65, 127, 129, 255, 256, 257, 1023, 1025, 4095, 4096, 4097, 5000, 8192 + 65]
KINDS = ("gaussian", "heavy", "any bits", "denormal", "huge", "zeros", "spike", "ties", "few")


def delta_of(size: int, kind: str, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(size).astype(np.float32)
    if kind == "heavy":
        x = rng.standard_t(1.5, size).astype(np.float32)
    elif kind == "any bits":
        x = rng.integers(0, 2**32, size, dtype=np.uint32).view(np.float32)
        x[~np.isfinite(x)] = -0.0
    elif kind == "denormal":
        x = (rng.integers(0, 2**20, size, dtype=np.uint32) >> rng.integers(0, 20, size, dtype=np.uint32)).view(
            np.float32
        )
    elif kind == "huge":
        x = np.sign(x) * MAX * rng.choice(np.array([1, 1, 0.99, 0.5], np.float32), size)
    elif kind == "zeros":
        x = np.zeros(size, np.float32)
    elif kind == "spike":
        x *= np.float32(1e-3)
        x[size // 2 : size // 2 + 1] = -1e6
    elif kind == "ties":
        x = np.round(x)
    elif kind == "few":
        x[rng.random(size) < 0.995] = 0
    return x.astype(np.float32)


deltas = st.builds(delta_of, st.sampled_from(SIZES), st.sampled_from(KINDS), st.integers(0, 2**32)) | hnp.arrays(
    np.float32, st.integers(0, 70), elements=st.floats(width=32, allow_nan=False, allow_infinity=False)
)


def through(codec: Compressor, delta: np.ndarray) -> np.ndarray:
    return codec.decode(codec.encode(delta), delta.size)


def blocks(codec, delta: np.ndarray):
    return [slice(at, at + codec.block) for at in range(0, delta.size, codec.block)]


@every_codec
@given(delta=deltas)
@quickly
def test_a_delta_comes_back_in_shape_and_a_second_time_unchanged(codec, delta):
    before = delta.copy()
    payload = codec.encode(delta)
    np.testing.assert_array_equal(payload, codec.encode(delta))
    np.testing.assert_array_equal(delta, before)
    assert payload.dtype == np.uint8 and payload.shape == (codec.most_bytes(delta.size),)
    sent = payload.copy()
    once = codec.decode(payload, delta.size)
    assert once.dtype == np.float32 and once.shape == delta.shape and np.isfinite(once).all()
    assert not np.shares_memory(once, payload) and (payload == sent).all()
    assert not once[delta == 0].any(), "zeros stay zeros"
    np.testing.assert_array_equal(through(codec, once), once)


@every_codec
@pytest.mark.parametrize("kind", ["gaussian", "any bits", "ties"])
def test_many_chunks_of_work_are_joined_without_a_seam(codec, kind):
    delta = delta_of(2 * (1 << 17) + 4096 + 77, kind, 1)
    once = through(codec, delta)
    np.testing.assert_array_equal(through(codec, once), once)
    if codec.name not in ("topk", "none"):  # 4096 is a multiple of every block and chunk
        cut = (1 << 17) - 4096
        np.testing.assert_array_equal(np.append(through(codec, delta[:cut]), through(codec, delta[cut:])), once)


@every_codec
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", ["gaussian", "huge", "zeros"])
def test_what_is_not_finite_is_refused_by_the_server(codec, bad, kind):
    for size in (1, 65, 5000):
        for at in {0, size // 2, size - 1}:
            delta = delta_of(size, kind, size)
            delta[at] = bad
            with pytest.raises(UpdateRejected, match="non_finite"):
                through(codec, delta)
    all_bits = np.array([0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001], np.uint32).view(np.float32)
    with pytest.raises(UpdateRejected, match="non_finite"):
        through(codec, all_bits)


# sizes and errors of the literature


@pytest.mark.parametrize(
    "name, options, percent",
    [
        ("none", {}, 100),
        ("bf16", {}, 50),
        ("int8", {"block": 256}, 25.39),
        ("int8", {}, 25.10),
        ("int8", {"block": 4096}, 25.02),
        ("int4", {}, 12.89),
        ("int4", {"block": 64}, 14.06),
        ("e3m0", {}, 12.89),
        ("topk", {}, 100 / 51.2),
        ("sparse_loco", {}, 100 / 141.24),
    ],
)
def test_a_payload_is_as_small_as_published(name, options, percent):
    size = 1 << 20
    codec = make_compressor(name, **options)
    assert 100 * codec.most_bytes(size) / (4 * size) == pytest.approx(percent, abs=0.006)
    assert codec.encode(np.ones(size, np.float32)).size == codec.most_bytes(size)


@pytest.mark.parametrize(
    "name, options, error",
    [
        ("bf16", {}, 0.00166),
        ("int8", {"block": 256}, 0.0070),
        ("int8", {}, 0.0079),
        ("int4", {}, 0.126),
        ("e3m0", {}, 0.1945),  # .203 where it rounds in the logarithm
        ("sparse_loco", {}, 0.939),
    ],
)
def test_the_error_on_gaussians_is_the_published_one(name, options, error):
    x = delta_of(1 << 18, "gaussian", 0)
    q = through(make_compressor(name, **options), x)
    assert np.linalg.norm(q - x) / np.linalg.norm(x) == pytest.approx(error, rel=0.01)
    if name == "sparse_loco":
        assert np.linalg.norm((q - x)[q != 0]) / np.linalg.norm(x[q != 0]) == pytest.approx(0.066, rel=0.02)


@pytest.mark.parametrize("codec", INTEGER, ids=repr)
@given(delta=deltas)
@quickly
def test_integers_are_off_by_half_a_scale_at_most(codec, delta):
    once = through(codec, delta)
    for where in blocks(codec, delta):
        x = delta[where].astype(np.float64)
        scale = max(abs(x).max() / codec.top, 2.0**-126)
        assert abs(x - once[where]).max() <= scale / 2 * (1 + 2.0**-14)  # the quotient is a float32


@given(codec=st.sampled_from([c for c in FAMILY if c.name == "e3m0"]), data=st.data())
@quickly
def test_powers_of_two_of_the_block_maximum_are_exact_in_e3m0(codec, data):
    top = data.draw(st.floats(2.0**-119, float(MAX), width=32))
    powers = data.draw(st.lists(st.tuples(st.integers(0, 6), st.sampled_from([1, -1])), max_size=codec.block - 1))
    x = np.array([top, *(sign * top * 2.0**-power for power, sign in powers)], np.float32)
    np.testing.assert_array_equal(through(codec, x), x)


# a slow second version of each, in float64 or in torch


def near(values: np.ndarray, ties: np.ndarray) -> np.ndarray:
    return (abs(values[:, None] - ties) < 1e-4 * abs(ties)).any(axis=1)


@pytest.mark.parametrize("codec", [c for c in FAMILY if hasattr(c, "block")], ids=repr)
@given(delta=deltas)
@quickly
def test_blockwise_takes_the_nearest_code_of_the_grid(codec, delta):
    once = through(codec, delta)
    if codec.name == "e3m0":
        grid = np.array([sign * 2.0**-k for k in range(7) for sign in (1, -1)] + [0])
    else:
        grid = np.arange(-codec.top, codec.top + 1)
    grid = np.sort(grid)
    for where in blocks(codec, delta):
        x = delta[where].astype(np.float64)
        scale = max(float(np.float32(abs(x).max() / codec.top)), codec.floor)
        nearest = grid[abs(x[:, None] / scale - grid).argmin(axis=1)] * scale
        clear = ~near(x / scale, (grid[1:] + grid[:-1]) / 2)
        np.testing.assert_allclose(once[where][clear], nearest[clear], rtol=2e-7, atol=0)


@given(delta=deltas)
@quickly
def test_bf16_is_what_torch_makes_of_it(delta):
    expected = torch.from_numpy(delta.copy()).bfloat16().float().numpy()
    largest = np.array([0x7F7F0000], np.uint32).view(np.float32)[0]
    np.testing.assert_array_equal(through(make_compressor("bf16"), delta), expected.clip(-largest, largest))


@given(delta=deltas, density=st.floats(1e-3, 1))
@quickly
def test_topk_is_the_head_of_the_sorted_delta(delta, density):
    codec = make_compressor("topk", density=density)
    kept = min(delta.size, max(1, round(density * delta.size)))
    expected = np.zeros_like(delta)
    for at in sorted(range(delta.size), key=lambda i: (-abs(float(delta[i])), i))[:kept]:
        expected[at] = delta[at]
    np.testing.assert_array_equal(through(codec, delta), expected)


@given(delta=deltas)
@quickly
def test_sparse_loco_is_two_means_of_the_head_of_each_chunk(delta):
    expected = np.zeros(delta.size)
    for start in range(0, delta.size, 4096):
        chunk = {at: float(value) for at, value in enumerate(delta[start : start + 4096], start)}
        head = sorted(chunk, key=lambda i: (-abs(chunk[i]), i))[: math.ceil(len(chunk) / 64)]
        head = [at for at in head if chunk[at]]
        middle = math.fsum(abs(chunk[at]) for at in head) / max(len(head), 1)
        for group in ([i for i in head if abs(chunk[i]) > middle], [i for i in head if abs(chunk[i]) <= middle]):
            mean = math.fsum(abs(chunk[i]) for i in group) / max(len(group), 1)
            for at in group:
                expected[at] = math.copysign(mean, chunk[at])
    found = through(make_compressor("sparse_loco"), delta)
    assert ((found != 0) <= (expected != 0)).all()
    np.testing.assert_allclose(found, expected, rtol=2.0**-8, atol=2.0**-133)


@pytest.mark.parametrize("reach", [1 << 16, (1 << 17) + 5, 1 << 19])
def test_topk_finds_the_largest_wherever_its_sample_misleads(reach):
    rng = np.random.default_rng(0)
    for numbers in (
        np.sort(rng.standard_normal(reach)),
        np.where(np.arange(reach) % (reach >> 16) == 0, 5, rng.random(reach)),  # all that is sampled is large
        np.where(np.arange(reach) % (reach >> 16) == 0, 0, rng.random(reach)),
        rng.integers(0, 3, reach),
    ):
        x = numbers.astype(np.float32)
        expected = np.zeros_like(x)
        head = np.argsort(-abs(x), kind="stable")[: round(reach / 64)]
        expected[head] = x[head]
        np.testing.assert_array_equal(through(make_compressor("topk"), x), expected)


# the bytes on the wire


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
        *[(name, {}, [], "") for name in COMPRESSORS],
    ],
)
def test_the_format_is_frozen(name, options, delta, payload):
    codec, delta = make_compressor(name, **options), np.array(delta, np.float32)
    assert codec.encode(delta).tobytes().hex() == payload.replace(" ", "")


@every_codec
def test_bytes_may_lie_anywhere(codec):
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


def code_of(codec: Compressor, payload: object, size: int) -> str:
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
    for other in (good.view(np.int8), good.astype(np.float32), np.array([object()] * good.size), good.astype("U3")):
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
            assert values.shape == (size,) and values.dtype == np.float32 and np.isfinite(values).all()
            assert through(codec, values).shape == (size,)
            taken += 1
    assert taken, "values may change without harm: that is the digest's business"


@every_codec
def test_memory_follows_what_the_server_expects_and_not_what_it_gets(codec):
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
            # the delta, and scratch space: positions are 8 bytes each, and topk with density 1 sends all of them
            room = 4 * size + (40 * codec.kept(size) if codec.name == "topk" else size) + (1 << 20)
            assert tracemalloc.get_traced_memory()[1] - before <= room
    finally:
        tracemalloc.stop()


def patched(codec: Compressor, delta: np.ndarray, at: int, piece: np.ndarray) -> np.ndarray:
    payload = codec.encode(delta)
    piece = np.atleast_1d(piece).view(np.uint8)
    payload[at : at + piece.size] = piece
    return payload


@pytest.mark.parametrize("name", ["int8", "int4", "e3m0"])
def test_a_scale_is_finite_and_not_negative_and_cannot_overflow(name):
    codec = make_compressor(name, block=16)
    delta = delta_of(33, "gaussian", 0)
    for scale, code in [(np.nan, "non_finite"), (np.inf, "non_finite"), (-np.inf, "non_finite"), (-1, "bad_encoding")]:
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
    codec = make_compressor(name, block=16)
    payload = codec.encode(delta_of(17, "gaussian", 0))
    payload[at] = byte  # -1: the half byte behind the last of 17 codes
    assert code_of(codec, payload, 17) == "bad_encoding"


@pytest.mark.parametrize(
    "tail",
    [
        "c0 00",  # no marks
        "c0 80",  # one of two
        "c0 e0",  # three
        "c0 b0",  # two and one behind the end of the bitmap
        "c0 90",  # the second mark lies behind the end
        "00 c0",  # both positions are 0
        "80 c0",  # 1, then 0
        "e0 a0",  # bits behind the low bits
    ],
)
def test_topk_refuses_positions_that_are_not_a_rising_row(tail):
    codec = make_compressor("topk", density=0.5)
    good = np.frombuffer(bytes.fromhex("00004040 000080bf c0 a0"), np.uint8)
    np.testing.assert_array_equal(codec.decode(good, 4), np.array([0, 3, 0, -1], np.float32))
    bad = np.append(good[:8], np.frombuffer(bytes.fromhex(tail), np.uint8))
    assert code_of(codec, bad, 4) == "bad_encoding"


def test_topk_refuses_a_position_behind_the_delta():
    codec = make_compressor("topk", density=0.4)  # 2 of 5: low bits 1, bitmap of 4
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
        ([3, 0], [0x3F80, 0x4000], None),  # one element only
        ([0, 0], [0, 0], None),  # none
        ([3, 3], [0x3F80, 0x4000], "bad_encoding"),
        ([3, 2], [0x3F80, 0x4000], "bad_encoding"),
        ([3, 4096], [0x3F80, 0x4000], "bad_encoding"),  # position 0 with another magnitude
        ([3, 65], [0x3F80, 0x4000], "bad_encoding"),  # of 65 elements
        ([3, 4095], [0x3F80, 0x4000], "bad_encoding"),
        ([3, 4], [0x4000, 0x3F80], "bad_encoding"),
        ([3, 4], [0xBF80, 0x3F80], "bad_encoding"),
        ([3, 4], [0x3F80, 0x7F80], "non_finite"),
        ([3, 4], [0x7FC0, 0x7FC0], "non_finite"),
    ],
)
def test_sparse_loco_refuses_positions_that_do_not_rise_and_wrong_scales(entries, levels, code):
    codec, payload = make_compressor("sparse_loco"), sparse_payload(entries, levels)
    if code:
        assert code_of(codec, payload, 65) == code
    else:
        values = codec.decode(payload, 65)
        assert set(np.flatnonzero(values)) == {at for at in entries if at}
        np.testing.assert_array_equal(codec.encode(values)[4:], payload[4:])
    payload[-1] |= 1
    assert code_of(codec, payload, 65) in ("bad_encoding", "non_finite")


# names and options


def test_names_are_the_registrys():
    assert list(COMPRESSORS) == ["none", "bf16", "int8", "int4", "e3m0", "topk", "sparse_loco"]
    for name in COMPRESSORS:
        codec = make_compressor(name)
        assert codec.name == name and codec == make_compressor(name) and hash(codec) == hash(make_compressor(name))


@pytest.mark.parametrize(
    "name, options, text",
    [
        ("int16", {}, "update.compress=int16: expected one of none, bf16, .*; did you mean 'int"),
        ("int8", {"block": 100}, "update.block=100: expected a power of two from 16 to 65536"),
        ("int4", {"block": 8}, "update.block=8: "),
        ("e3m0", {"block": 256.0}, "update.block=256.0: "),
        ("int8", {"block": True}, "update.block=True: "),
        ("int8", {"block": "256"}, "update.block=256: "),
        ("topk", {"density": 0}, "update.density=0: expected a number above 0 and at most 1"),
        ("topk", {"density": 1.5}, "update.density=1.5: "),
        ("topk", {"density": math.nan}, "update.density=nan: "),
        ("topk", {"density": True}, "update.density=True: "),
        ("topk", {"density": None}, "update.density=None: "),
        ("topk", {"block": 256}, "update.block=256: no option of update.compress=topk; it has density"),
        ("bf16", {"block": 256, "density": 1}, "(?s)update.block=256: .* it has none.*update.density=1: "),
    ],
)
def test_a_wrong_option_is_told_as_typed(name, options, text):
    with pytest.raises(ConfigError, match=text):
        make_compressor(name, **options)


@given(size=st.integers(0, 10**12), density=st.floats(1e-6, 1))
@example(size=124_000_000, density=1 / 64)
def test_sizes_are_known_without_an_array(size, density):
    codec = make_compressor("topk", density=density)
    kept = codec.kept(size)
    assert min(size, 1) <= kept <= size
    spent = codec.most_bytes(size) - 4 * kept
    if kept:
        assert spent <= kept * (2 + math.log2(size / kept)) / 8 + 2, "Elias-Fano's bound"
    for other in FAMILY:
        assert 0 <= other.most_bytes(size) <= 4.3 * size + 8
