"""Every codec of the compress stage: round trips, sizes, errors, and a slow reference version."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from support.codecs import FAMILY, INTEGER, KINDS, SIZES, delta_of, every_codec, through

from fedgpt.core.errors import ConfigError, UpdateRejected
from fedgpt.core.options import UpdateOptions
from fedgpt.update.codecs.base import MAX
from fedgpt.update.compress import CODECS, codec_of, make_codec

ROOT = Path(__file__).parents[2]
quickly = settings(max_examples=40, deadline=None)
deltas = st.builds(
    delta_of, st.sampled_from(SIZES), st.sampled_from(KINDS), st.integers(0, 2**32)
) | hnp.arrays(
    np.float32,
    st.integers(0, 70),
    elements=st.floats(width=32, allow_nan=False, allow_infinity=False),
)


def blocks(codec, delta: np.ndarray):
    return [slice(at, at + codec.block) for at in range(0, delta.size, codec.block)]


@every_codec
@given(delta=deltas)
@quickly
def test_a_round_trip_keeps_the_shape_and_a_second_one_changes_nothing(codec, delta):
    before = delta.copy()
    payload = codec.encode(delta)
    np.testing.assert_array_equal(payload, codec.encode(delta))
    np.testing.assert_array_equal(delta, before)
    assert payload.dtype == np.uint8 and payload.shape == (codec.payload_bytes(delta.size),)
    sent = payload.copy()
    once = codec.decode(payload, delta.size)
    assert once.dtype == np.float32 and once.shape == delta.shape and np.isfinite(once).all()
    assert not np.shares_memory(once, payload) and (payload == sent).all()
    assert not once[delta == 0].any(), "zeros stay zeros"
    np.testing.assert_array_equal(through(codec, once), once)


@every_codec
@pytest.mark.parametrize("kind", ["gaussian", "any bits", "ties"])
def test_a_delta_of_many_chunks_is_compressed_as_its_parts_are(codec, kind):
    delta = delta_of(2 * (1 << 17) + 4096 + 77, kind, 1)
    once = through(codec, delta)
    np.testing.assert_array_equal(through(codec, once), once)
    if codec.name not in ("topk", "none"):  # 4096 is a multiple of every block and chunk
        cut = (1 << 17) - 4096
        np.testing.assert_array_equal(
            np.append(through(codec, delta[:cut]), through(codec, delta[cut:])), once
        )


@every_codec
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", ["gaussian", "huge", "zeros"])
def test_a_delta_that_is_not_finite_is_rejected_by_the_server(codec, bad, kind):
    for size in (1, 65, 5000):
        for at in {0, size // 2, size - 1}:
            delta = delta_of(size, kind, size)
            delta[at] = bad
            with pytest.raises(UpdateRejected, match="non_finite"):
                through(codec, delta)
    all_bits = np.array([0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001], np.uint32).view(np.float32)
    with pytest.raises(UpdateRejected, match="non_finite"):
        through(codec, all_bits)


# sizes and errors from the literature


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
    codec = make_codec(name, **options)
    assert 100 * codec.payload_bytes(size) / (4 * size) == pytest.approx(percent, abs=0.006)
    assert codec.encode(np.ones(size, np.float32)).size == codec.payload_bytes(size)


@pytest.mark.parametrize(
    "name, options, error",
    [
        ("bf16", {}, 0.00166),
        ("int8", {"block": 256}, 0.0070),
        ("int8", {}, 0.0079),
        ("int4", {}, 0.126),
        ("e3m0", {}, 0.1945),  # 0.203 if it rounded in the logarithm
        ("sparse_loco", {}, 0.939),
    ],
)
def test_the_error_on_gaussians_is_the_published_one(name, options, error):
    x = delta_of(1 << 18, "gaussian", 0)
    q = through(make_codec(name, **options), x)
    assert np.linalg.norm(q - x) / np.linalg.norm(x) == pytest.approx(error, rel=0.01)
    if name == "sparse_loco":
        assert np.linalg.norm((q - x)[q != 0]) / np.linalg.norm(x[q != 0]) == pytest.approx(
            0.066, rel=0.02
        )


def test_the_documented_error_of_int8_is_the_measured_one():
    x = delta_of(1 << 18, "gaussian", 0)
    error = np.linalg.norm(through(make_codec("int8"), x) - x) / np.linalg.norm(x)
    for path in ("docs/runs.md", "fedgpt/update/codecs/int8.py"):
        assert f"{100 * error:.2f} %" in (ROOT / path).read_text(encoding="utf-8"), path


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
    powers = data.draw(
        st.lists(st.tuples(st.integers(0, 6), st.sampled_from([1, -1])), max_size=codec.block - 1)
    )
    x = np.array([top, *(sign * top * 2.0**-power for power, sign in powers)], np.float32)
    np.testing.assert_array_equal(through(codec, x), x)


# a slow reference version of each, in float64 or in torch


def near_a_tie(values: np.ndarray, ties: np.ndarray) -> np.ndarray:
    return (abs(values[:, None] - ties) < 1e-4 * abs(ties)).any(axis=1)


@pytest.mark.parametrize("codec", [c for c in FAMILY if hasattr(c, "block")], ids=repr)
@given(delta=deltas)
@quickly
def test_blockwise_codecs_take_the_nearest_code_of_the_grid(codec, delta):
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
        clear = ~near_a_tie(x / scale, (grid[1:] + grid[:-1]) / 2)
        np.testing.assert_allclose(once[where][clear], nearest[clear], rtol=2e-7, atol=0)


@given(delta=deltas)
@quickly
def test_bf16_equals_that_of_torch(delta):
    expected = torch.from_numpy(delta.copy()).bfloat16().float().numpy()
    largest = np.array([0x7F7F0000], np.uint32).view(np.float32)[0]
    np.testing.assert_array_equal(
        through(make_codec("bf16"), delta), expected.clip(-largest, largest)
    )


@given(delta=deltas, density=st.floats(1e-3, 1))
@quickly
def test_topk_is_the_head_of_the_sorted_delta(delta, density):
    codec = make_codec("topk", density=density)
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
        for group in (
            [i for i in head if abs(chunk[i]) > middle],
            [i for i in head if abs(chunk[i]) <= middle],
        ):
            mean = math.fsum(abs(chunk[i]) for i in group) / max(len(group), 1)
            for at in group:
                expected[at] = math.copysign(mean, chunk[at])
    found = through(make_codec("sparse_loco"), delta)
    assert ((found != 0) <= (expected != 0)).all()
    np.testing.assert_allclose(found, expected, rtol=2.0**-8, atol=2.0**-133)


@pytest.mark.parametrize("size", [1 << 16, (1 << 17) + 5, 1 << 19])
def test_topk_finds_the_largest_where_its_sample_is_not_representative(size):
    rng = np.random.default_rng(0)
    for numbers in (
        np.sort(rng.standard_normal(size)),
        # every sampled value is large, so that the bound from the sample is too high
        np.where(np.arange(size) % (size >> 16) == 0, 5, 0) + rng.random(size),
        np.where(np.arange(size) % (size >> 16) == 0, 0, rng.random(size)),
        rng.integers(0, 3, size),
    ):
        x = numbers.astype(np.float32)
        expected = np.zeros_like(x)
        head = np.argsort(-abs(x), kind="stable")[: round(size / 64)]
        expected[head] = x[head]
        np.testing.assert_array_equal(through(make_codec("topk"), x), expected)


# names and options


def test_every_codec_in_the_folder_is_tested():
    assert CODECS.names() == ["bf16", "e3m0", "int4", "int8", "none", "sparse_loco", "topk"]
    assert {codec.name for codec in FAMILY} == {*CODECS.names(), "outsider.Sign"}
    for name in CODECS.names():
        codec = make_codec(name)
        assert codec.name == name
        assert codec == make_codec(name) and hash(codec) == hash(make_codec(name))


@pytest.mark.parametrize(
    "name, options, text",
    [
        ("int16", {}, "update.compress=int16: allowed are bf16, .*, custom; did you mean 'int"),
        ("int8", {"block": 100}, "update.block=100: expected a power of two from 16 to 65536"),
        ("int4", {"block": 8}, "update.block=8: "),
        ("e3m0", {"block": 256.0}, "update.block=256.0: "),
        ("int8", {"block": True}, "update.block=True: "),
        ("int8", {"block": "256"}, "update.block=256: "),
        ("topk", {"density": 0}, "update.density=0: expected a number above 0 and at most 1"),
        ("topk", {"density": 1.5}, "update.density=1.5: "),
        ("topk", {"density": math.nan}, "update.density=nan: "),
        ("topk", {"density": True}, "update.density=True: "),
        (
            "topk",
            {"block": 256},
            "update.block=256: has no effect with update=topk; add update=int8 or",
        ),
        (
            "bf16",
            {"block": 256, "density": 1},
            "(?s)update.block=256: has no effect.*update.density=1: has no effect with update=bf16",
        ),
    ],
)
def test_a_wrong_option_is_named_as_typed(name, options, text):
    with pytest.raises(ConfigError, match=text):
        make_codec(name, **options)


def custom(target: str | None = "outsider.Sign", **more) -> UpdateOptions:
    return UpdateOptions(compress="custom", _target_=target, **more)


def test_a_codec_from_outside_is_built_from_its_name_and_arguments():
    codec = codec_of(custom(arguments={"step": 0.5}), ["outsider"])
    assert (codec.name, codec.step) == ("outsider.Sign", 0.5)
    assert CODECS.problems(custom(), ["outsider"]) == []
    built_in = custom("fedgpt.update.codecs.topk.TopK", arguments={"density": 0.5})
    assert codec_of(built_in) == make_codec("topk", density=0.5)


@pytest.mark.parametrize(
    "options, text",
    [
        (custom(None), "update._target_ is not set: update=custom needs the full name"),
        (custom("other.Sign"), "update._target_=other.Sign: only classes in .* are used"),
        (custom("outsider.Sing"), "outsider has no class Sing; did you mean 'Sign'"),
        (custom("outsider.Codec"), "must define decode and encode and payload_bytes"),
        (custom("outsider.UpdateRejected"), "must inherit from fedgpt.update.codecs.base.Codec"),
        (
            custom(arguments={"steps": 1}),
            "update.arguments.steps=1: the options of Sign are step; did you mean 'step'",
        ),
        (custom(arguments=3), "update.arguments=3: must be names and values"),
        (
            custom(block=64),
            "update.block=64: has no effect with update=custom, whose class has step; leave",
        ),
        (
            UpdateOptions(compress="int8", _target_="outsider.Sign"),
            "update._target_=outsider.Sign: update=int8 has a class of its own",
        ),
        (
            UpdateOptions(compress="int8", arguments={"block": 64}),
            "update.arguments.block=64: is an option of its own; type update.block=64",
        ),
    ],
)
def test_problems_of_a_codec_from_outside_are_reported_as_typed(options, text):
    with pytest.raises(ConfigError, match=text):
        codec_of(options, ["outsider"])
    assert len(CODECS.problems(options, ["outsider"])) == 1


@given(size=st.integers(0, 10**12), density=st.floats(1e-6, 1))
@example(size=124_000_000, density=1 / 64)
def test_sizes_are_known_without_an_array(size, density):
    codec = make_codec("topk", density=density)
    kept = codec.kept(size)
    assert min(size, 1) <= kept <= size
    spent = codec.payload_bytes(size) - 4 * kept
    if kept:
        assert spent <= kept * (2 + math.log2(size / kept)) / 8 + 2, "Elias-Fano's bound"
    for other in FAMILY:
        assert 0 <= other.payload_bytes(size) <= 4.3 * size + 8
