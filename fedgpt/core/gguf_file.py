"""The container of a GGUF file: metadata and the table of tensors, each checked before it is used.

    "GGUF" | version | number of tensors | number of metadata | metadata | tensors | padding | data

A file may be damaged or hostile, so no number in it is believed: every length is compared with what
is left of the header, every tensor's place with the size of the file, before memory is allocated.

Source: docs/gguf.md of ggml (https://github.com/ggml-org/ggml), versions 2 and 3, which differ in
nothing that a little-endian file shows.
"""

from __future__ import annotations

import math
import mmap
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from fedgpt.core.errors import FedGPTError, amount
from fedgpt.core.files import check_file, is_there
from fedgpt.core.gguf_blocks import FORMATS, TYPES, BlockFormat, dequantise

MAGIC, VERSIONS = b"GGUF", (2, 3)
ALIGNMENT = 32  # of the data, in bytes, unless general.alignment says otherwise
LONGEST_HEADER = 64 << 20  # bytes; that of SmolLM2, with 49,152 tokens, has 1.8 MB
MOST_ENTRIES = 1 << 16  # of metadata, and of tensors
MOST_STRINGS = 1 << 21  # in all lists together: tokens and merges
LONGEST_KEY, LONGEST_NAME, MOST_DIMENSIONS = 65535, 64, 4  # as the specification says
NUMBERS = {  # type of a metadata value -> its layout
    **{0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4"},
    **{10: "<u8", 11: "<i8", 12: "<f8"},
}
BOOL, STRING, ARRAY = 7, 8, 9
WORDS = {
    **{str: "text", int: "a whole number", float: "a number", bool: "true or false"},
    **{list: "a list of texts", np.ndarray: "a list of numbers"},
}
PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")  # end of the name of a part of a split model
# Hugging Face's names of special tokens -> GGUF's
NAMED = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
EMBEDDING = "token_embd.weight"  # the tensor whose rows are those of the tokens


@dataclass(frozen=True)
class Tensor:
    """A tensor of a file: its name there, its shape (rows first), and where its blocks are."""

    name: str
    shape: tuple[int, ...]
    form: BlockFormat
    start: int  # of its first block, in bytes from the beginning of the file

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) // self.form.values * self.form.layout.itemsize

    @property
    def end(self) -> int:
        """The byte behind its last block."""
        return self.start + self.size


@dataclass(frozen=True)
class Metadata:
    """What a file says of its model, by key.

    A value is a str, int, float, bool, a list of str or an array of numbers.
    """

    path: Path
    entries: Mapping[str, Any]

    def value(self, key: str, kind: type, default: Any = None) -> Any:
        """The value of `key`, of type `kind`; raises FedGPTError if it has another type, or is not
        there and has no default.
        """
        value = self.entries.get(key, default)
        if value is None:
            raise FedGPTError(f"{self.path}: {key} is missing")
        if type(value) is not kind and (kind, type(value)) != (float, int):
            found = "a list" if isinstance(value, list | np.ndarray) else f"{value!r:.60}"
            raise FedGPTError(f"{self.path}: {key} is {found}; must be {WORDS[kind]}")
        return value

    def special_ids(self, vocab: int) -> dict[str, int]:
        """The ids of the special tokens that a file names, by Hugging Face's names (bos, eos, ...).

        Raises FedGPTError for one that is not among `vocab` tokens.
        """
        found = {}
        for name, theirs in NAMED.items():
            key = f"tokenizer.ggml.{theirs}_token_id"
            if key in self.entries:
                found[name] = number = self.value(key, int)
                if not 0 <= number < vocab:
                    raise FedGPTError(
                        f"{self.path}: {key}={number}: must be one of {vocab:,} tokens"
                    )
        return found


@dataclass(frozen=True)
class GGUFFile:
    """The metadata and the tensors of a GGUF file, by their names in it."""

    path: Path
    metadata: Metadata
    tensors: Mapping[str, Tensor]

    def read(self, name: str) -> np.ndarray:
        """The values of the tensor `name` as float32, in its shape.

        Raises FedGPTError if they cannot be read or are not finite.
        """
        tensor = self.tensors[name]
        try:
            raw = np.memmap(self.path, np.uint8, "r", tensor.start, (tensor.size,))
        except (OSError, ValueError) as error:  # the file was changed
            raise FedGPTError(f"{self.path}: {name} cannot be read: {error}") from None
        values = dequantise(raw, tensor.form)
        if not np.isfinite(values).all():
            raise FedGPTError(
                f"{self.path}: {name} has values that are not finite (NaN or infinite); the model"
                " is damaged, or its training diverged"
            )
        return values.reshape(tensor.shape)


def is_gguf(path: Path) -> bool:
    """Whether a path is that of a GGUF file, by its name."""
    return path.suffix == ".gguf" and is_there(path) and not path.is_dir()


def read_gguf_file(path: str | Path) -> GGUFFile:
    """Read metadata and table of tensors, and check that every tensor is inside the file.

    Raises FedGPTError, naming file and reason, for what is damaged or unsupported.
    """
    path = Path(path)
    check_file(path)
    _refuse_part(path)
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        _check_version(path, data[:8])
        header = _Header(path, data)
        tensor_count = header.count(MOST_ENTRIES, "tensors")
        metadata = Metadata(path, _entries(header, header.count(MOST_ENTRIES, "metadata")))
        _refuse_split(metadata)
        return GGUFFile(path, metadata, _tensors(header, tensor_count, metadata))


class _Header:
    """Reads the header from its beginning to its end; raises FedGPTError where it is damaged."""

    def __init__(self, path: Path, data: mmap.mmap):
        self.path, self.data, self.position = path, data, 8
        self.end = min(len(data), LONGEST_HEADER)
        self.strings = 0  # read in lists

    def damaged(self, reason: str) -> FedGPTError:
        return FedGPTError(f"{self.path} is damaged: {reason}")

    def take(self, size: int, what: str) -> bytes:
        if size > self.end - self.position:
            where = "its end" if self.end == len(self.data) else f"{LONGEST_HEADER >> 20} MiB"
            raise self.damaged(f"{what} goes beyond {where} ({amount(size, 'byte')})")
        self.position += size
        return self.data[self.position - size : self.position]

    def whole(self, what: str, size: int = 8) -> int:
        return int.from_bytes(self.take(size, what), "little")

    def count(self, most: int, noun: str) -> int:
        count = self.whole(f"the number of {noun}")
        if count > most:
            raise self.damaged(f"it has {count:,} {noun}, more than {most:,}")
        return count

    def text(self, what: str, longest: int = LONGEST_HEADER) -> str:
        size = self.whole(f"the length of {what}")
        if size > longest:
            raise self.damaged(f"{what} has {size:,} bytes, more than {longest:,}")
        try:
            return self.take(size, what).decode("utf-8")
        except UnicodeDecodeError:
            raise self.damaged(f"{what} is not UTF-8") from None

    def value(self, key: str) -> Any:
        kind = self.whole(f"the type of {key}", 4)
        if kind == ARRAY:
            return self.list(key)
        if kind == STRING:
            return self.text(key)
        return self.numbers(kind, 1, key)[0].item()

    def list(self, key: str) -> Any:
        kind, count = self.whole(f"the type of {key}", 4), self.whole(f"the length of {key}")
        if kind != STRING:
            return self.numbers(kind, count, key)
        self.strings += count
        if self.strings > MOST_STRINGS:
            raise self.damaged(f"{key} has {count:,} texts; at most {MOST_STRINGS:,} are read")
        return [self.text(key) for _ in range(count)]

    def numbers(self, kind: int, count: int, key: str) -> np.ndarray:
        if kind == ARRAY:
            raise FedGPTError(f"{self.path}: {key} is a list of lists, which is not supported")
        if kind != BOOL and kind not in NUMBERS:
            raise self.damaged(f"{key} has type {kind}, which is unknown")
        layout = np.dtype(NUMBERS.get(kind, "u1"))
        found = np.frombuffer(self.take(count * layout.itemsize, key), layout)
        if kind == BOOL:
            if (found > 1).any():
                raise self.damaged(f"{key} is {found.max()}; must be 0 (false) or 1 (true)")
            return found.astype(bool)
        return found


def _check_version(path: Path, begin: bytes) -> None:
    if begin[:4] != MAGIC:
        raise FedGPTError(f"{path} is no GGUF file: it begins with {begin[:4]!r}, not {MAGIC!r}")
    if len(begin) < 8:
        raise FedGPTError(f"{path} is damaged: it ends inside the version")
    version = int.from_bytes(begin[4:], "little")
    if 0 < int.from_bytes(begin[4:], "big") < 1 << 16:
        raise FedGPTError(f"{path} is big-endian; only little-endian GGUF files are read")
    if version not in VERSIONS:
        raise FedGPTError(f"{path} has GGUF version {version}; allowed are 2 and 3")


def _refuse_part(path: Path) -> None:
    if (part := PART.search(path.name)) and int(part[2]) > 1:
        raise _is_part(path, int(part[1]), int(part[2]))


def _refuse_split(metadata: Metadata) -> None:
    count = metadata.value("split.count", int, default=1)
    if count > 1:
        raise _is_part(metadata.path, metadata.value("split.no", int, default=0) + 1, count)


def _is_part(path: Path, number: int, count: int) -> FedGPTError:
    return FedGPTError(
        f"{path} is part {number} of {count} of a split model; join the parts to one file with"
        " llama.cpp's tool: llama-gguf-split --merge FIRST_PART NEW_FILE"
    )


def _entries(header: _Header, count: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for number in range(count):
        key = header.text(f"key {number + 1} of the metadata", LONGEST_KEY)
        if not key.isascii() or not key.isprintable():
            raise header.damaged(f"the key {key!r:.60} is not printable ASCII")
        if key in found:
            raise header.damaged(f"the key {key:.60} stands twice in it")
        found[key] = header.value(key[:60])
    return found


def _tensors(header: _Header, count: int, metadata: Metadata) -> dict[str, Tensor]:
    table = [_row(header, number + 1) for number in range(count)]
    alignment = metadata.value("general.alignment", int, default=ALIGNMENT)
    if alignment < 8 or alignment % 8:
        raise header.damaged(f"general.alignment={alignment}: must be a multiple of 8")
    # the data begins at the next multiple of the alignment
    data_start = -(-header.position // alignment) * alignment
    found: dict[str, Tensor] = {}
    for name, shape, form, offset in table:
        if name in found:
            raise header.damaged(f"the tensor {name} stands twice in it")
        if offset % alignment:
            raise header.damaged(
                f"{name} begins at byte {offset:,} of the data, which is no multiple of"
                f" general.alignment={alignment:,}"
            )
        found[name] = tensor = Tensor(name, shape, form, data_start + offset)
        if tensor.end > len(header.data):
            raise header.damaged(
                f"{name} ends at byte {tensor.end:,} and the file at {len(header.data):,}; it was"
                " cut off"
            )
    for one, other in pairwise(sorted(found.values(), key=lambda tensor: tensor.start)):
        if one.end > other.start:
            raise header.damaged(f"{one.name} and {other.name} overlap")
    return found


def _row(header: _Header, number: int) -> tuple[str, tuple[int, ...], BlockFormat, int]:
    """One line of the table: name, shape (rows first), format, and offset in the data."""
    name = header.text(f"the name of tensor {number}", LONGEST_NAME)
    if not name.isprintable():
        raise header.damaged(f"the name {name!r} of tensor {number} is not printable")
    dimensions = header.whole(f"the shape of {name}", 4)
    if not 1 <= dimensions <= MOST_DIMENSIONS:
        raise header.damaged(f"{name} has {dimensions:,} dimensions; must be 1 to 4")
    # the file has the innermost dimension first
    shape = tuple(header.whole(f"the shape of {name}") for _ in range(dimensions))[::-1]
    kind, offset = header.whole(f"the type of {name}", 4), header.whole(f"the offset of {name}")
    form = _format(header.path, name, kind)
    if 0 in shape or shape[-1] % form.values:
        raise header.damaged(
            f"{name} has shape {shape}; must be at least 1, and the last a multiple of"
            f" {form.values} for {form.name}"
        )
    return name, shape, form, offset


def _format(path: Path, tensor: str, kind: int) -> BlockFormat:
    known = TYPES[kind] if kind < len(TYPES) else f"of type {kind}, which is unknown"
    if known not in FORMATS:
        *others, last = FORMATS
        raise FedGPTError(
            f"{path}: {tensor} is {known}; allowed are {', '.join(others)} and {last}: take the"
            " model's file in one of these formats"
        )
    return FORMATS[known]
