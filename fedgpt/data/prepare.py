"""From text to one memory-mapped token array, split once by document, prepared once per machine.

The split depends on the text alone, never on a run's seed, so that two runs compare and no document
is ever held out in one and trained on in the other. The cache is keyed by content: a changed corpus
is a new entry.
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
from fedgpt.data.corpora import Document, corpus_source, load_corpus
from fedgpt.data.tokenizer import Tokenizer, load_tokenizer, make_tokenizer

FORMAT = 1  # raise when the files of a cache entry or the split change
PUBLIC, HELD_OUT, CLIENTS = 0, 1, 2
PARTS = {"public": PUBLIC, "held_out": HELD_OUT, "clients": CLIENTS}
LOCK_SECONDS = 1800  # how long to wait for another process that prepares the same corpus
ENCODE_AT_ONCE = 256  # documents


@dataclass(frozen=True, eq=False)
class Prepared:
    """A tokenised corpus: one token array, the documents in it, and the part each belongs to."""

    folder: Path
    # (tokens,) uint16 or uint32, memory-mapped, read-only; each document ends with the end token
    tokens: np.ndarray
    starts: np.ndarray  # (documents + 1,) int64: document d is tokens[starts[d] : starts[d + 1]]
    part: np.ndarray  # (documents,) int8: PUBLIC, HELD_OUT or CLIENTS
    clients: list[str]  # per document: who owns it
    labels: list[str]  # per document
    ids: list[str]  # per document
    bytes: np.ndarray  # (documents,) int64: UTF-8 bytes of the text
    tokenizer: Tokenizer
    manifest: dict[str, Any]
    digest: str  # of text, options and versions: equal digests mean equal tokens

    def held_out(self) -> np.ndarray:
        """Tokens of the held-out documents, concatenated in document order: central evaluation
        only.
        """
        return self._part(HELD_OUT)

    def public(self) -> np.ndarray:
        """Tokens of the public documents, concatenated in document order: everybody may see
        them.
        """
        return self._part(PUBLIC)

    def _part(self, part: int) -> np.ndarray:
        chosen = np.flatnonzero(self.part == part)
        pieces = [self.tokens[self.starts[d] : self.starts[d + 1]] for d in chosen]
        return np.concatenate(pieces) if pieces else np.empty(0, self.tokens.dtype)


def prepare(corpus: CorpusOptions, tokenizer: TokenizerOptions, cache_dir: str | Path) -> Prepared:
    """Load, split, tokenise and cache a corpus, or open it from the cache.

    Safe to call from several processes at once: one prepares, the others wait and open. Raises
    ConfigError for options or text that cannot be prepared.
    """
    if problems := [*corpus.problems(), *tokenizer.problems()]:
        raise ConfigError(problems)
    documents = load_corpus(corpus)
    source = corpus_source(corpus)
    text_digest = digest_of(documents)
    digest = _cache_key(corpus, tokenizer, source, text_digest)
    cache = Path(cache_dir).expanduser()
    folder = cache / f"{corpus.name}-{digest}"
    if (ready := _open_if_whole(folder)) is not None:
        return ready
    cache.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(cache / f"{folder.name}.lock", timeout=LOCK_SECONDS):
            if (ready := _open_if_whole(folder)) is not None:  # another process was faster
                return ready
            # damaged, or of a killed process
            for leftover in (
                folder,
                *cache.glob(f".{folder.name}.*"),
            ):
                shutil.rmtree(leftover, ignore_errors=True)
            with tempfile.TemporaryDirectory(dir=cache, prefix=f".{folder.name}.") as temporary:
                manifest = {
                    "format": FORMAT,
                    "digest": digest,
                    "source": source,
                    "sha256": text_digest,
                }
                built = _build(Path(temporary) / "new", documents, corpus, tokenizer, manifest)
                built.rename(folder)
    except Timeout as error:
        raise FedGPTError(
            f"waited {LOCK_SECONDS} s for another process that prepares this corpus in {folder}; "
            "is it still running? Another cache_dir= does not wait"
        ) from error
    return open_prepared(folder)


def open_prepared(folder: str | Path) -> Prepared:
    """Open a folder that `prepare` made, without reading the corpus again (workers, later
    commands).

    Raises OSError, ValueError or KeyError where the folder is absent or damaged.
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
        raise ValueError(f"{folder}: not a whole data folder of format {FORMAT}")
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
    """Part of each document, (documents,) int8; equal texts are always in one part.

    Distinct texts, in the order of their hashes, fill the public part until its share of the bytes
    is reached, then the held-out part; the clients get the rest.
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
    """Hexadecimal sha256 over owner, id, label and text of every document in order."""
    digest = hashlib.sha256()
    for document in documents:
        for field in (document.client, document.id, document.label, document.text):
            data = field.encode()
            # framed, so that moving text between fields shows
            digest.update(len(data).to_bytes(8, "big"))
            digest.update(data)
    return digest.hexdigest()


def _cache_key(
    corpus: CorpusOptions, tokenizer: TokenizerOptions, source: str, text_digest: str
) -> str:
    """Short hash of all that decides what is in a cache entry; seed, path and partition do not."""
    kind = asdict(tokenizer) if tokenizer.name == "bpe" else {"name": tokenizer.name}
    library = importlib.metadata.version("tokenizers") if tokenizer.name == "bpe" else ""
    shares = [corpus.public, corpus.held_out]
    parts = [FORMAT, corpus.name, corpus.client, source, text_digest, shares, kind, library]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _open_if_whole(folder: Path) -> Prepared | None:
    """The cache entry, or None where it is absent or damaged and must be made (again)."""
    try:
        return open_prepared(folder)
    except (OSError, ValueError, KeyError, FedGPTError):
        return None


def _build(
    folder: Path,
    documents: Sequence[Document],
    corpus: CorpusOptions,
    tokenizer: TokenizerOptions,
    manifest: dict[str, Any],
) -> Path:
    """Write all files of a cache entry to `folder`, the manifest last, and return it."""
    texts = [document.text for document in documents]
    part = split_documents(texts, corpus.public, corpus.held_out)
    _check_split(part, corpus, tokenizer)
    made = make_tokenizer(
        tokenizer, [text for text, where in zip(texts, part, strict=True) if where == PUBLIC]
    )
    dtype = np.uint16 if made.vocab_size <= 65536 else np.uint32
    encoded = [ids.astype(dtype) for ids in _encode(texts, made)]
    starts = np.concatenate([[0], np.cumsum([len(ids) for ids in encoded])]).astype(np.int64)
    sizes = np.array([len(text.encode()) for text in texts], dtype=np.int64)

    folder.mkdir()
    arrays = {"tokens": np.concatenate(encoded), "starts": starts, "part": part, "bytes": sizes}
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array, allow_pickle=False)
    names = {
        "clients": [document.client for document in documents],
        "labels": [document.label for document in documents],
        "ids": [document.id for document in documents],
    }
    (folder / "documents.json").write_text(json.dumps(names, ensure_ascii=False), encoding="utf-8")
    made.save(folder)
    lengths = np.diff(starts)
    manifest |= {
        "corpus": corpus.name,
        "client": corpus.client,
        "documents": len(documents),
        "tokens": int(starts[-1]),
        "bytes": int(sizes.sum()),
        "owners": len(set(names["clients"])),
        "split": {
            name: {
                "documents": int((part == number).sum()),
                "tokens": int(lengths[part == number].sum()),
                "bytes": int(sizes[part == number].sum()),
            }
            for name, number in PARTS.items()
        },
        "tokenizer": {"name": made.name, "vocab_size": made.vocab_size, "digest": made.digest},
        "versions": {"tokenizers": importlib.metadata.version("tokenizers")},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    for file in folder.iterdir():
        sync(file)
    return folder


def _encode(texts: Sequence[str], tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """Ids of every document with the end token behind them."""
    for first in range(0, len(texts), ENCODE_AT_ONCE):
        for ids in tokenizer.encode_many(texts[first : first + ENCODE_AT_ONCE]):
            yield np.append(ids, tokenizer.end)


def _check_split(part: np.ndarray, corpus: CorpusOptions, tokenizer: TokenizerOptions) -> None:
    """Raise ConfigError where a part that is needed stayed empty."""
    remedy = "add text" if corpus.name != "files" else "add text or lower corpus.document_bytes"
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
