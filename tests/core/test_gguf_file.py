"""The container of GGUF: what is read, and what a damaged or hostile file gives."""

import struct
import tracemalloc

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.advice import advises
from support.gguf_files import BOOL, F32, LIST, TEXT, U32, hand_written, text, texts, u32

from fedgpt.core import gguf_file
from fedgpt.core.errors import FedGPTError
from fedgpt.core.gguf_file import read_gguf_file

PAIRS = [
    ("general.architecture", TEXT, text("llama")),
    ("general.languages", LIST, texts(["en", "zh"])),
    ("llama.block_count", U32, u32(2)),
    ("llama.rope.freq_base", F32, struct.pack("<f", 0.5)),
    ("tokenizer.ggml.add_bos_token", BOOL, b"\1"),
    ("numbers", LIST, u32(5) + struct.pack("<Q3i", 3, -1, 0, 7)),
]
VALUES = np.arange(6, dtype="<f4")
ROWS = [("a", [3, 2], 0, 0), ("b", [4], 1, 32)]
DATA = VALUES.tobytes() + bytes(8) + np.ones(4, "<f2").tobytes()
GOOD = hand_written(PAIRS, ROWS, DATA)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.gguf"


def refusal(path, content):
    path.write_bytes(content)
    with pytest.raises(FedGPTError) as caught:
        read_gguf_file(path)
    assert str(caught.value).startswith(f"{path}")
    return str(caught.value).removeprefix(f"{path}").lstrip(": ")


def with_row(name="a", dimensions=(6,), kind=0, offset=0):
    return hand_written(PAIRS, [(name, dimensions, kind, offset)], DATA)


def with_pair(key, kind, content):
    return hand_written([*PAIRS, (key, kind, content)], ROWS, DATA)


@pytest.mark.parametrize("version", [2, 3])
def test_metadata_and_tensors_are_those_that_were_written(path, version):
    path.write_bytes(hand_written(PAIRS, ROWS, DATA, begin=b"GGUF" + u32(version)))
    file = read_gguf_file(path)
    entries = dict(file.metadata.entries)
    assert entries.pop("numbers").tolist() == [-1, 0, 7]
    assert entries == {
        "general.architecture": "llama",
        "general.languages": ["en", "zh"],
        "llama.block_count": 2,
        "llama.rope.freq_base": 0.5,
        "tokenizer.ggml.add_bos_token": True,
    }
    assert file.read("a").tolist() == [[0, 1, 2], [3, 4, 5]]  # 2 rows of 3: file has 3 first
    assert file.read("b").tolist() == [1, 1, 1, 1]


def test_a_file_of_llama_cpps_writer_reads_the_same_as_with_its_reader(path):
    writer = gguf.GGUFWriter(path, "llama")
    for kind in ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"):
        getattr(writer, f"add_{kind}")(kind, 100)
    writer.add_float32("float32", 1.5)
    writer.add_float64("float64", 1e300)
    writer.add_bool("bool", False)
    writer.add_array("list", [True, False])
    writer.add_string("text", "größer\n语")
    writer.add_custom_alignment(64)
    random = np.random.default_rng(0)
    for name, shape in {"x": (3, 64), "y": (5,), "z": (2, 3, 32)}.items():
        writer.add_tensor(name, random.standard_normal(shape).astype(np.float32))
    for close in ("header_to_file", "kv_data_to_file", "tensors_to_file"):
        getattr(writer, f"write_{close}")()
    writer.close()
    file, theirs = read_gguf_file(path), gguf.GGUFReader(path)
    for key, field in theirs.fields.items():
        if not key.startswith("GGUF."):
            value = file.metadata.entries[key]
            assert (value.tolist() if key == "list" else value) == field.contents()
    assert list(file.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        assert file.tensors[tensor.name].start == tensor.data_offset
        assert np.array_equal(file.read(tensor.name), tensor.data)


def test_a_value_of_another_type_is_named(path):
    path.write_bytes(GOOD)
    said = read_gguf_file(path).metadata
    assert said.value("llama.block_count", int) == 2
    assert said.value("llama.block_count", float) == 2
    assert said.value("absent", int, default=5) == 5
    for key, kind, message in [
        ("absent", int, "absent is missing"),
        ("general.architecture", int, "is 'llama'; must be a whole number"),
        ("llama.rope.freq_base", int, "is 0.5; must be a whole number"),
        ("tokenizer.ggml.add_bos_token", int, "is True; must be a whole number"),
        ("llama.block_count", bool, "is 2; must be true or false"),
        ("numbers", list, "is a list; must be a list of texts"),
        ("general.languages", np.ndarray, "is a list; must be a list of numbers"),
        ("general.languages", str, "is a list; must be text"),
    ]:
        with pytest.raises(FedGPTError, match=message):
            said.value(key, kind)


REFUSED = {
    "empty": (b"", "is empty"),
    "other file": (b"PK\x03\x04" + bytes(99), "no GGUF file: it begins with b'PK"),
    "old ggml": (b"tjgg" + bytes(99), "no GGUF file: it begins with b'tjgg'"),
    "Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
    "version 1": (hand_written(begin=b"GGUF\1\0\0\0"), "GGUF version 1; allowed are 2 and 3"),
    "version 4": (hand_written(begin=b"GGUF\4\0\0\0"), "GGUF version 4; allowed are 2 and 3"),
    "big-endian": (hand_written(begin=b"GGUF\0\0\0\3"), "is big-endian; only little-endian"),
    "tensors": (hand_written(PAIRS, counts=(10**18, 6)), "has 1,000,000,000,000,000,000 tensors"),
    "metadata": (hand_written(PAIRS, counts=(0, 2**64 - 1)), "metadata, more than 65,536"),
    "one more": (hand_written(PAIRS, counts=(0, 7)), "key 7 of the metadata goes beyond its end"),
    "key twice": (with_pair("numbers", U32, u32(1)), "the key numbers stands twice"),
    "key's length": (hand_written([("k" * 65536, U32, u32(1))]), "has 65,536 bytes, more than"),
    "key of two lines": (with_pair("a\nb", U32, u32(1)), "'a\\\\nb' is not printable ASCII"),
    "text's length": (with_pair("k", TEXT, struct.pack("<Q", 2**63)), "k has 9,223,372"),
    "text past the end": (with_pair("k", TEXT, struct.pack("<Q", 9999)), "k goes beyond its end"),
    "no UTF-8": (with_pair("k", TEXT, text(b"\xff\xfe")), "k is not UTF-8"),
    "value's type": (with_pair("k", 77, u32(1)), "k has type 77, which is unknown"),
    "list's type": (with_pair("k", LIST, u32(77) + bytes(8)), "k has type 77, which is unknown"),
    "list of lists": (with_pair("k", LIST, u32(9) + bytes(8)), "k is a list of lists"),
    "bool": (with_pair("k", BOOL, b"\2"), "k is 2; must be 0 .false. or 1 .true."),
    "numbers": (with_pair("k", LIST, u32(5) + struct.pack("<Q", 10**17)), "k goes beyond its end"),
    "texts": (with_pair("k", LIST, u32(8) + struct.pack("<Q", 10**17)), "at most 2,097,152 are"),
    "split": (with_pair("split.count", 2, b"\3\0"), "is part 1 of 3 of a split model; join the"),
    "split's type": (with_pair("split.count", TEXT, text("3")), "split.count is '3'; must be a"),
    "alignment": (with_pair("general.alignment", U32, u32(0)), "alignment=0: must be a multiple"),
    "alignment of 4": (with_pair("general.alignment", U32, u32(4)), "alignment=4: must be a mult"),
    "alignment's type": (with_pair("general.alignment", TEXT, text("32")), "alignment is '32'"),
    "a large alignment": (with_pair("general.alignment", U32, u32(2**31)), "it was cut off"),
    "tensor's name": (with_row("n" * 65), "the name of tensor 1 has 65 bytes, more than 64"),
    "name of two lines": (with_row("a\nb"), "the name 'a\\\\nb' of tensor 1 is not printable"),
    "no dimension": (with_row(dimensions=()), "a has 0 dimensions; must be 1 to 4"),
    "dimensions": (with_row(dimensions=(1,) * 5), "a has 5 dimensions; must be 1 to 4"),
    "a billion dimensions": (
        with_row().replace(text("a") + u32(1), text("a") + u32(10**9)),
        "a has 1,000,000,000 dimensions",
    ),
    "no row": (with_row(dimensions=(3, 0)), r"a has shape \(0, 3\); must be at least 1"),
    "half a block": (with_row(dimensions=(33,), kind=8), r"a multiple of 32 for Q8_0"),
    "past the end": (with_row(dimensions=(2**62, 2**62)), "a ends at byte .*it was cut off"),
    "offset": (with_row(offset=2**63), "a ends at byte .*it was cut off"),
    "misplaced": (with_row(offset=4), "begins at byte 4 of the data.*general.alignment=32"),
    "type Q6_K": (with_row(kind=14), "a is Q6_K; allowed are F32, F16, BF16, Q8_0, Q4_0 and Q4_1"),
    "type F64": (with_row(kind=28), "a is F64; allowed are"),
    "type 999": (with_row(kind=999), "a is of type 999, which is unknown; allowed are"),
    "name twice": (hand_written(PAIRS, [ROWS[0], ROWS[0]], DATA), "the tensor a stands twice"),
    "overlap": (hand_written(PAIRS, [("b", [4], 1, 0), ROWS[0]], DATA), "b and a overlap"),
}


@pytest.mark.parametrize(("content", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_a_wrong_file_is_refused_by_name_and_takes_no_memory(path, content, message):
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(FedGPTError, match=message) as caught:
            read_gguf_file(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    assert str(path) in str(caught.value)


def test_a_part_of_a_split_model_is_refused_by_its_name(tmp_path):
    message = refusal(tmp_path / "big-00002-of-00003.gguf", GOOD)
    assert message.startswith("is part 2 of 3 of a split model; join the parts to one file with")
    (tmp_path / "whole-00001-of-00001.gguf").write_bytes(GOOD)
    assert read_gguf_file(tmp_path / "whole-00001-of-00001.gguf").tensors


def test_a_file_that_is_not_there_or_no_file_is_refused(tmp_path):
    for name, message in {
        "absent.gguf": "cannot be read: No such file",
        ".": "is not a file",
    }.items():
        with pytest.raises(FedGPTError, match=message):
            read_gguf_file(tmp_path / name)


def test_a_file_that_was_cut_at_any_byte_is_refused(path):
    for kept in range(len(GOOD)):
        assert refusal(path, GOOD[:kept])


def test_what_is_behind_the_last_tensor_is_padding(path):
    path.write_bytes(GOOD + bytes(100))
    assert read_gguf_file(path).read("b").tolist() == [1, 1, 1, 1]


@settings(max_examples=300, deadline=None)
@given(
    changes=st.lists(
        st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), min_size=1, max_size=4
    )
)
def test_changed_bytes_give_a_file_or_a_message(tmp_path_factory, changes):
    damaged = bytearray(GOOD)
    for place, byte in changes:
        damaged[place] = byte
    path = tmp_path_factory.getbasetemp() / "damaged.gguf"
    path.write_bytes(damaged)
    try:
        file = read_gguf_file(path)
        for name, tensor in file.tensors.items():
            assert file.read(name).shape == tensor.shape
    except FedGPTError as error:
        assert str(path) in str(error)


def test_a_header_and_lists_that_no_model_needs_are_refused(path, monkeypatch):
    """With lower limits, because a file that reaches the real ones has 64 MB."""
    monkeypatch.setattr(gguf_file, "LONGEST_HEADER", 400)
    assert "goes beyond" in refusal(path, with_pair("k", TEXT, text("x" * 400)))
    monkeypatch.setattr(gguf_file, "MOST_STRINGS", 3)
    two_lists = hand_written([("k", LIST, texts(["a", "b"])), ("l", LIST, texts(["c", "d"]))])
    assert "l has 2 texts; at most 3 are read" in refusal(path, two_lists)


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
def test_values_that_are_not_finite_are_refused(path, kind, wrong):
    number = gguf.GGMLQuantizationType[kind]
    raw = bytearray(gguf.quantize(np.ones((1, 32), np.float32), number).tobytes())
    half = np.float32(wrong).tobytes()[2:] if kind == "BF16" else np.float16(wrong).tobytes()
    raw[: 4 if kind == "F32" else 2] = np.float32(wrong).tobytes() if kind == "F32" else half
    path.write_bytes(hand_written(PAIRS, [("w", [32], number, 0)], bytes(raw)))
    with pytest.raises(FedGPTError, match="w has values that are not finite"):
        read_gguf_file(path).read("w")


def test_a_file_that_was_cut_after_it_was_opened_is_refused(path):
    path.write_bytes(GOOD)
    file = read_gguf_file(path)
    path.write_bytes(GOOD[:-8])
    with pytest.raises(FedGPTError, match="b cannot be read"):
        file.read("b")


def test_the_advice_for_another_number_format_is_right(path):
    """The same tensor in one of the formats that the message names is read."""
    values = np.linspace(-1, 1, 256, dtype=np.float32)
    path.write_bytes(hand_written(PAIRS, [("w", [256], 14, 0)], bytes(210)))
    with pytest.raises(FedGPTError) as caught:
        read_gguf_file(path)
    advises(caught.value, "take the model's file in one of these formats")
    for name in ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1"):
        assert name in str(caught.value)
        kind = gguf.GGMLQuantizationType[name]
        raw = gguf.quantize(values[None], kind).tobytes()
        path.write_bytes(hand_written(PAIRS, [("w", [256], kind, 0)], raw))
        np.testing.assert_allclose(read_gguf_file(path).read("w"), values, atol=0.15)
