"""From documents to one memory-mapped token array, prepared once per machine and cached.

    documents   d0       d1          d2    d3            the rows that a corpus yields
    part        clients  held_out    ..    public        split once, by the hash of the text
    tokens      t t t E  t t t t t E t t E t t t t E     E: the end of a document
    starts      0        4           10    13        18  d is tokens[starts[d]:starts[d+1]]

The split depends only on the text, not on a run's seed. So runs can be compared, and no document is
held out in one run and used for training in another. The cache key is a hash of the content: a
changed corpus makes a new entry.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from fedgpt.core.errors import ConfigError, FedGPTError
from fedgpt.core.files import sync
from fedgpt.core.options import CorpusOptions, TokenizerOptions
from fedgpt.core.targets import CUSTOM
from fedgpt.data.corpora.base import Corpus, Document
from fedgpt.data.corpus import CORPORA, corpus_of, load_documents
from fedgpt.data.tokenizer import Tokenizer, load_tokenizer, make_tokenizer

FORMAT = 1  # version of the files of a cache entry and of the split: raise it when these change
PUBLIC, HELD_OUT, CLIENTS = 0, 1, 2
PARTS = {"public": PUBLIC, "held_out": HELD_OUT, "clients": CLIENTS}
LOCK_SECONDS = 1800  # seconds to wait for another process that prepares the same corpus
ENCODE_AT_ONCE = 256  # number of documents in one call of the tokenizer


@dataclass(frozen=True, eq=False)
class Prepared:
    """A tokenised corpus: one token array, the documents in it, and the part each belongs to."""

    folder: Path
    tokens: np.ndarray  # (tokens,) uint16 or uint32, memory-mapped, read-only
    starts: np.ndarray  # (documents + 1,) int64: document d is tokens[starts[d] : starts[d + 1]]
    part: np.ndarray  # (documents,) int8: PUBLIC, HELD_OUT or CLIENTS
    clients: list[str]  # owner of each document
    labels: list[str]  # label of each document
    ids: list[str]  # id of each document
    bytes: np.ndarray  # (documents,) int64: UTF-8 bytes of each text
    tokenizer: Tokenizer
    manifest: dict[str, Any]
    digest: str  # hash of text, options and versions: equal digests mean equal tokens

    def held_out(self) -> np.ndarray:
        """Return the tokens of the held-out documents in order; only the evaluation uses them."""
        return self._part(HELD_OUT)

    def public(self) -> np.ndarray:
        """Return the tokens of the public documents in order; they are not private."""
        return self._part(PUBLIC)

    def _part(self, part: int) -> np.ndarray:
        chosen = np.flatnonzero(self.part == part)
        pieces = [self.tokens[self.starts[d] : self.starts[d + 1]] for d in chosen]
        return np.concatenate(pieces) if pieces else np.empty(0, self.tokens.dtype)


def prepare(
    corpus: CorpusOptions,
    tokenizer: TokenizerOptions,
    cache_dir: str | Path,
    trusted: Sequence[str] = (),
) -> Prepared:
    """Load, split, tokenise and cache a corpus, or open it from the cache.

    `trusted` are the packages that `corpus._target_` may name. Safe to call from several processes
    at once: one process prepares the corpus, the others wait and open it. Raises ConfigError for
    options or text that cannot be prepared.
    """
    problems = [*corpus.problems(), *CORPORA.problems(corpus, trusted), *tokenizer.problems()]
    if problems:
        raise ConfigError(problems)
    reader = corpus_of(corpus, trusted)
    documents = load_documents(reader)
    text_digest = digest_of(documents)
    digest = _cache_key(corpus, tokenizer, reader.source, text_digest)
    cache = Path(cache_dir).expanduser()
    folder = cache / f"{corpus.name}-{digest}"
    if (ready := _open_if_valid(folder)) is not None:
        return ready
    cache.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(cache / f"{folder.name}.lock", timeout=LOCK_SECONDS):
            if (ready := _open_if_valid(folder)) is not None:  # another process has prepared it
                return ready
            # a damaged entry, or files of a killed process
            for leftover in (folder, *cache.glob(f".{folder.name}.*")):
                shutil.rmtree(leftover, ignore_errors=True)
            manifest = {"format": FORMAT, "digest": digest, **_identity(corpus, reader)}
            manifest |= {"source": reader.source, "sha256": text_digest}
            with tempfile.TemporaryDirectory(dir=cache, prefix=f".{folder.name}.") as temporary:
                made = _split_and_tokenise(documents, corpus, tokenizer, reader.too_few)
                _write(Path(temporary) / "new", documents, *made, manifest).rename(folder)
    except Timeout as error:
        raise FedGPTError(
            f"waited {LOCK_SECONDS} s for another process that prepares this corpus in {folder}; "
            "is it still running? With another cache_dir= there is nothing to wait for"
        ) from error
    return open_prepared(folder)


def open_prepared(folder: str | Path) -> Prepared:
    """Open a folder that `prepare` made, without reading the corpus again.

    Raises OSError, ValueError or KeyError if the folder is missing or damaged.
    """
    folder = Path(folder)
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    names = json.loads((folder / "documents.json").read_text(encoding="utf-8"))
    tokens = np.load(folder / "tokens.npy", mmap_mode="r", allow_pickle=False)
    starts = np.load(folder / "starts.npy", allow_pickle=False)
    if (
        manifest["format"] != FORMAT
        or len(tokens) != manifest["tokens"]
        or starts[-1] != len(tokens)
    ):
        raise ValueError(f"{folder}: not a complete data folder of format {FORMAT}")
    return Prepared(
        folder=folder,
        tokens=tokens,
        starts=starts,
        part=np.load(folder / "part.npy", allow_pickle=False),
        clients=names["clients"],
        labels=names["labels"],
        ids=names["ids"],
        bytes=np.load(folder / "bytes.npy", allow_pickle=False),
        tokenizer=load_tokenizer(folder),
        manifest=manifest,
        digest=manifest["digest"],
    )


def split_documents(texts: Sequence[str], public: float, held_out: float) -> np.ndarray:
    """Return the part of each document, (documents,) int8; equal texts are always in one part.

    Distinct texts, in the order of their hashes, go to the public part until it has its share of
    the bytes, then to the held-out part until it has its own. The clients get the rest.
    """
    keys = [hashlib.sha256(text.encode()).digest() for text in texts]
    sizes: dict[bytes, int] = {}
    for key, text in zip(keys, texts, strict=True):
        sizes[key] = sizes.get(key, 0) + len(text.encode())
    total = sum(sizes.values())
    part_of: dict[bytes, int] = {}
    filled = {PUBLIC: 0, HELD_OUT: 0}
    for key in sorted(sizes):
        part = CLIENTS
        if filled[PUBLIC] < public * total:
            part = PUBLIC
        elif filled[HELD_OUT] < held_out * total:
            part = HELD_OUT
        part_of[key] = part
        if part in filled:
            filled[part] += sizes[key]
    return np.array([part_of[key] for key in keys], dtype=np.int8)


def digest_of(documents: Sequence[Document]) -> str:
    """Return the hexadecimal sha256 of owner, id, label and text of every document in order."""
    digest = hashlib.sha256()
    for document in documents:
        for field in (document.client, document.id, document.label, document.text):
            data = field.encode()
            # the length first, so that text moved from one field to the next changes the digest
            digest.update(len(data).to_bytes(8, "big"))
            digest.update(data)
    return digest.hexdigest()


def _cache_key(
    corpus: CorpusOptions, tokenizer: TokenizerOptions, source: str, text_digest: str
) -> str:
    """Return a short hash of everything that determines the content of a cache entry.

    It does not include the seed, the partition, and the path of corpus=files.
    """
    kind = asdict(tokenizer) if tokenizer.name == "bpe" else {"name": tokenizer.name}
    library = importlib.metadata.version("tokenizers") if tokenizer.name == "bpe" else ""
    shares = [corpus.public, corpus.held_out]
    parts = [FORMAT, corpus.name, corpus.client, source, text_digest, shares, kind, library]
    if corpus._target_ or corpus.arguments:  # absent otherwise, so that older entries stay valid
        parts.append([corpus._target_, corpus.arguments])
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=repr).encode()).hexdigest()[:16]


def _identity(options: CorpusOptions, corpus: Corpus) -> dict[str, Any]:
    """Return the description of the corpus in the manifest: its name or class, and its kind of
    owner.
    """
    name = options._target_ if options.name == CUSTOM else options.name
    identity = {"corpus": name, "client": corpus.owner}
    return identity | ({"arguments": options.arguments} if options.arguments else {})


def _open_if_valid(folder: Path) -> Prepared | None:
    """Return the cache entry, or None if it is missing or damaged and must be made."""
    try:
        return open_prepared(folder)
    except (OSError, ValueError, KeyError, FedGPTError):
        return None


def _split_and_tokenise(
    documents: Sequence[Document],
    corpus: CorpusOptions,
    options: TokenizerOptions,
    remedy: str,
) -> tuple[np.ndarray, Tokenizer, list[np.ndarray]]:
    """Return the part of each document, the tokenizer, and the ids of each document.

    `remedy` says what to do if there are too few documents.
    """
    texts = [document.text for document in documents]
    part = split_documents(texts, corpus.public, corpus.held_out)
    _check_split(part, corpus, options, remedy)
    public = [text for text, number in zip(texts, part, strict=True) if number == PUBLIC]
    tokenizer = make_tokenizer(options, public)
    dtype = np.uint16 if tokenizer.vocab_size <= 65536 else np.uint32
    return part, tokenizer, [ids.astype(dtype) for ids in _encode(texts, tokenizer)]


def _encode(texts: Sequence[str], tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """Yield the ids of every document, followed by the end token."""
    for first in range(0, len(texts), ENCODE_AT_ONCE):
        for ids in tokenizer.encode_many(texts[first : first + ENCODE_AT_ONCE]):
            yield np.append(ids, tokenizer.end)


def _write(
    folder: Path,
    documents: Sequence[Document],
    part: np.ndarray,
    tokenizer: Tokenizer,
    encoded: Sequence[np.ndarray],
    manifest: dict[str, Any],
) -> Path:
    """Write all files of a cache entry to `folder`, the manifest last, and return it."""
    lengths = np.array([len(ids) for ids in encoded], dtype=np.int64)
    sizes = np.array([len(document.text.encode()) for document in documents], dtype=np.int64)
    arrays = {
        "tokens": np.concatenate(encoded),
        "starts": np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        "part": part,
        "bytes": sizes,
    }
    names = {
        "clients": [document.client for document in documents],
        "labels": [document.label for document in documents],
        "ids": [document.id for document in documents],
    }
    split = {
        name: {
            "documents": int((part == number).sum()),
            "tokens": int(lengths[part == number].sum()),
            "bytes": int(sizes[part == number].sum()),
        }
        for name, number in PARTS.items()
    }
    manifest = manifest | {
        "documents": len(documents),
        "tokens": int(lengths.sum()),
        "bytes": int(sizes.sum()),
        "owners": len(set(names["clients"])),
        "split": split,
        "tokenizer": {
            "name": tokenizer.name,
            "vocab_size": tokenizer.vocab_size,
            "digest": tokenizer.digest,
        },
        "versions": {"tokenizers": importlib.metadata.version("tokenizers")},
    }
    folder.mkdir()
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array, allow_pickle=False)
    (folder / "documents.json").write_text(json.dumps(names, ensure_ascii=False), encoding="utf-8")
    tokenizer.save(folder)
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    for file in folder.iterdir():
        sync(file)
    return folder


def _check_split(
    part: np.ndarray, corpus: CorpusOptions, tokenizer: TokenizerOptions, remedy: str
) -> None:
    """Raise ConfigError if a required part has no document."""
    problems = []
    if tokenizer.name == "bpe" and not (part == PUBLIC).any():
        problems.append(
            f"corpus.public={corpus.public}: tokenizer=bpe trains on the public part, which is"
            " empty; raise it or use tokenizer=bytes"
        )
    for name, number in (("held-out", HELD_OUT), ("clients'", CLIENTS)):
        if not (part == number).any():
            problems.append(
                f"corpus.public={corpus.public}, corpus.held_out={corpus.held_out}: {len(part)}"
                f" documents are too few, the {name} part is empty; {remedy}, or lower the shares"
            )
    if problems:
        raise ConfigError(problems)
