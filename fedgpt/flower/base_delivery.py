"""The base weights of a run on their way to a site, once, in pieces.

server   question with digest, layout and size     ->  site: "I have so many bytes of it"
         the next piece, until the site has all    ->  site: STATE/bases/, checked when complete

One piece at a time is in memory at either end, and a site that was away goes on where it was. A
run without `init_from` needs none of this: each client makes the frozen weights from the seed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict

from fedgpt.core.flat import base_info, base_values
from fedgpt.core.messages import BasePiece
from fedgpt.flower.messages import base_record, read_base, vector_record

if TYPE_CHECKING:
    from torch import Tensor

ACTION = "base"  # of the query that brings a piece
PIECE = 16 << 20  # bytes


class BaseDelivery:
    """The base weights of a run as the server sends them."""

    def __init__(self, base: Mapping[str, Tensor], tokenizer: str):
        """`tokenizer`: digest of the run's."""
        self.info = base_info(base)
        self._base, self._tokenizer = base, tokenizer

    def next(self, offset: int) -> int:
        """The byte after the piece that begins at a byte."""
        return min(offset + PIECE, self.info.bytes)

    def piece(self, offset: int) -> RecordDict:
        """The message content with the values from a byte on."""
        values = base_values(self._base, offset, self.next(offset))
        about = base_record(self.info, offset=offset, tokenizer=self._tokenizer)
        return RecordDict({"base": about, "values": vector_record(values)})


def read_piece(message: Message) -> BasePiece:
    """The piece in a message; raises any exception for other content."""
    content = message.content
    about, values = content["base"], content["values"]
    if not isinstance(about, ConfigRecord) or not isinstance(values, ArrayRecord):
        raise TypeError("other records than those of base weights")
    (array,) = (one.numpy() for one in values.values())
    if array.dtype != "uint8" or array.ndim != 1:
        raise TypeError(f"base weights in an array of {array.dtype} and {array.ndim} dimensions")
    offset, tokenizer = int(str(about["offset"])), str(about["tokenizer"])
    return BasePiece(read_base(content), tokenizer, offset, array)


def kept_content(have: int) -> RecordDict:
    """A site's answer to a piece: bytes that it has now."""
    return RecordDict({"kept": ConfigRecord({"bytes": have})})


def read_kept(message: Message) -> int:
    """The bytes in a site's answer; raises any exception for other content."""
    return int(str(message.content.config_records["kept"]["bytes"]))
