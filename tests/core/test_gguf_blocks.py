"""Values of GGUF's blocks equal those of llama.cpp's Python package, bit for bit."""

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedgpt.core.gguf_blocks import FORMATS, TYPES, dequantise

every_format = pytest.mark.parametrize("name", FORMATS)


def theirs(raw, name):
    with np.errstate(all="ignore"):
        return gguf.dequantize(raw, gguf.GGMLQuantizationType[name])


def same_bits(one, other):
    return one.dtype == other.dtype == np.float32 and one.tobytes() == other.tobytes()


@every_format
@given(rows=st.integers(1, 40), blocks=st.integers(1, 9), seed=st.integers(0, 2**32 - 1))
def test_any_bytes_have_the_values_of_llama_cpp(name, rows, blocks, seed):
    """Random bytes have scales of every kind: negative, subnormal, infinite, NaN."""
    size = FORMATS[name].layout.itemsize
    raw = np.random.default_rng(seed).integers(0, 256, (rows, blocks * size), dtype=np.uint8)
    assert same_bits(dequantise(raw.reshape(-1), FORMATS[name]), theirs(raw, name).reshape(-1))


@every_format
@pytest.mark.parametrize("shape", [(1, 32), (3, 96), (17, 544), (7, 5, 64)])
def test_quantised_numbers_have_the_values_of_llama_cpp(name, shape):
    values = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    raw = gguf.quantize(values, gguf.GGMLQuantizationType[name]).view(np.uint8)
    found = dequantise(np.ascontiguousarray(raw).reshape(-1), FORMATS[name])
    assert same_bits(found, theirs(raw, name).reshape(-1))
    np.testing.assert_allclose(found, values.reshape(-1), atol=0.5)


def test_a_block_of_each_quantised_format_by_hand():
    """Scale 0.5; nibbles 0..15 in the low halves and 15..0 in the high ones; minimum -2."""
    scale, minimum = np.float16(0.5).tobytes(), np.float16(-2).tobytes()
    pairs = bytes(n | (15 - n) << 4 for n in range(16))
    numbers = [*range(16), *range(15, -1, -1)]
    q4_0 = dequantise(np.frombuffer(scale + pairs, np.uint8), FORMATS["Q4_0"])
    assert q4_0.tolist() == [(n - 8) / 2 for n in numbers]
    q4_1 = dequantise(np.frombuffer(scale + minimum + pairs, np.uint8), FORMATS["Q4_1"])
    assert q4_1.tolist() == [n / 2 - 2 for n in numbers]
    eight = bytes(n & 255 for n in range(-16, 16))
    q8_0 = dequantise(np.frombuffer(scale + eight, np.uint8), FORMATS["Q8_0"])
    assert q8_0.tolist() == [n / 2 for n in range(-16, 16)]


def test_types_have_the_names_and_sizes_of_llama_cpp():
    known = {kind.value: kind.name for kind in gguf.GGMLQuantizationType}
    assert {number: TYPES[number] for number in known if number < len(TYPES)} == {
        number: name for number, name in known.items() if number < len(TYPES)
    }
    for name, form in FORMATS.items():
        sizes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
        assert sizes == (form.values, form.layout.itemsize)
