"""The base weights that servers have sent to a site, each of them once.

    STATE/bases/<digest>         float32 values, little-endian, in the order of the names
    STATE/bases/<digest>.part    the beginning of one that is being sent

A file has numbers alone. Their names and shapes are those of the model that the run's options
describe, so that a server can choose only values, and the size is known before anything is kept.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock

from fedgpt.client.limits import LEAST_FREE, free_bytes
from fedgpt.client.tidy import remove_unused, touch
from fedgpt.core.device import memory
from fedgpt.core.errors import FULL, DiskFull, FedGPTError, ForServer
from fedgpt.core.files import sync
from fedgpt.core.flat import BYTES, base_digest, layout_of
from fedgpt.core.messages import BaseInfo, BasePiece
from fedgpt.core.options import ModelOptions
from fedgpt.model.shape import frozen_shapes

DIGEST = re.compile(r"[0-9a-f]{64}")  # of a base; it becomes the name of a file
PART = ".part"
log = logging.getLogger(__name__)


class BaseRefused(ForServer):
    """A site does not take the base weights that a server sends."""


class SiteBases:
    """The bases of one site, for runs with one model."""

    def __init__(self, folder: Path, model: ModelOptions):
        self.folder, self._model = folder, model

    def begin(self, info: BaseInfo, vocab_size: int) -> int:
        """Bytes of a base that are here already; raises BaseRefused for one that cannot be used."""
        with self._locked():
            return self._begin(info, vocab_size)

    def _begin(self, info: BaseInfo, vocab_size: int) -> int:
        if not DIGEST.fullmatch(info.digest):
            raise BaseRefused(f"{info.digest!r:.80} is no digest of base weights")
        if not self._model.trainable:
            raise BaseRefused("the server has base weights, and the run's options freeze none")
        layout, size = layout_of(frozen_shapes(self._model, vocab_size))
        if (layout, size) != (info.layout, info.bytes):
            raise BaseRefused(
                f"the server's base weights ({info.bytes:,} bytes) are not those that the model of"
                f" the run's options freezes ({size:,} bytes): names or shapes differ"
            )
        if (most := memory()) and size > most:
            raise BaseRefused(
                f"the base weights have {size:,} bytes, and this site's machine has {most:,} bytes"
                " of memory"
            )
        whole, part = self._files(info.digest)
        if _size(whole) == size:
            touch(whole)
            return size
        whole.unlink(missing_ok=True)
        have = _size(part)
        if have >= size:  # of a client that was killed, or of another server's claims
            part.unlink()
            have = 0
        self._check_room(size - have)
        return have

    def add(self, piece: BasePiece, vocab_size: int) -> int:
        """Keep the next piece of a base; the bytes that are here then.

        A piece that is not the next one is ignored: it was sent twice, or another client of this
        site has got it. Raises BaseRefused for a base whose values are not those of its digest or
        not finite; nothing of it is kept.
        """
        with self._locked():
            have = self._begin(piece.info, vocab_size)
            end = piece.offset + piece.values.nbytes
            if end > piece.info.bytes:
                raise BaseRefused(f"the server sends more than the {piece.info.bytes:,} bytes")
            if piece.offset != have or have == piece.info.bytes:
                return have
            _, part = self._files(piece.info.digest)
            with part.open("ab") as stream:
                stream.write(piece.values.data)
            if end == piece.info.bytes:
                self._complete(piece.info.digest, vocab_size)
            return end

    def of(self, digest: str, vocab_size: int) -> Mapping[str, torch.Tensor]:
        """The base with a digest, which the reader must compare; empty if it is not here."""
        shapes = frozen_shapes(self._model, vocab_size)
        if not DIGEST.fullmatch(digest) or not shapes:
            return {}
        whole, _ = self._files(digest)
        if _size(whole) != layout_of(shapes)[1]:
            return {}
        touch(whole)
        return _Stored(whole, shapes)

    def tidy(self, used: str) -> None:
        """Remove what no run has used for a month, but not the base with the digest `used`."""
        files = self.folder.iterdir() if self.folder.is_dir() else ()
        remove_unused(
            path
            for path in files
            if DIGEST.fullmatch(path.name.removesuffix(PART)) and not path.name.startswith(used)
        )

    def remove(self, digest: str) -> None:
        """Remove a base that is damaged, so that the server sends it again."""
        if DIGEST.fullmatch(digest):
            self._files(digest)[0].unlink(missing_ok=True)

    def _complete(self, digest: str, vocab_size: int) -> None:
        """Check the values that were sent, and give their file its name."""
        whole, part = self._files(digest)
        stored = _Stored(part, frozen_shapes(self._model, vocab_size))
        problem = ""
        if base_digest(stored) != digest:
            problem = "do not have the digest that the server has named"
        elif not all(bool(values.isfinite().all()) for values in stored.values()):
            problem = "have values that are not finite (NaN or infinite)"
        if problem:
            part.unlink()
            raise BaseRefused(f"the server's base weights {problem}")
        sync(part)
        part.replace(whole)
        sync(self.folder)
        log.info("base weights of %d bytes have come; they are in %s", whole.stat().st_size, whole)

    def _check_room(self, needed: int) -> None:
        if free_bytes(self.folder) - LEAST_FREE < needed:
            raise BaseRefused(
                f"the rest of the base weights has {needed:,} bytes, and this site's disk has no"
                f" room for it and {LEAST_FREE >> 30} GiB more"
            )

    def _files(self, digest: str) -> tuple[Path, Path]:
        return self.folder / digest, self.folder / f"{digest}{PART}"

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Alone among the clients of this site, which may have several servers."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(self.folder / "lock"):
                yield
        except OSError as error:
            raise (DiskFull if error.errno in FULL else FedGPTError)(
                f"base weights cannot be written in {self.folder} ({error})"
            ) from error


class _Stored(Mapping[str, torch.Tensor]):
    """The weights in a file; each is read when it is asked for, so that memory has few of them."""

    def __init__(self, path: Path, shapes: Mapping[str, tuple[int, ...]]):
        self._path, self._shapes = path, shapes
        sizes = [BYTES * math.prod(shape) for shape in shapes.values()]
        self._offsets = dict(zip(shapes, accumulate(sizes, initial=0), strict=False))

    def __getitem__(self, name: str) -> torch.Tensor:
        shape, offset = self._shapes[name], self._offsets[name]
        values = np.fromfile(self._path, "<f4", math.prod(shape), offset=offset)
        return torch.from_numpy(values.astype(np.float32, copy=False)).view(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0
