"""From documents to one memory-mapped token array, prepared once per machine and cached.

    documents   d0       d1          d2    d3            the rows that a corpus yields
    part        clients  held_out    ..    public        split once, by the hash of the text
    tokens      t t t E  t t t t t E t t E t t t t E     E: the end of a document
    starts      0        4           10    13        18  d is tokens[starts[d]:starts[d+1]]

The split depends only on the text, not on a run's seed. So runs can be compared, and no document is
held out in one run and used for training in another. The cache key is a hash of the content: a
changed corpus makes a new entry.

No text is held in memory. The corpus is read once to find the cache entry (survey.py). To make the
entry it is read again, for the tokens and for a tokenizer that is trained, and must be the same.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import json
import shutil
import tempfile
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from fedgpt.core.errors import ConfigError, FedGPTError
from fedgpt.core.files import SUMS, sums_of, sync
from fedgpt.core.options import CorpusOptions, TokenizerOptions
from fedgpt.core.targets import CUSTOM
from fedgpt.data.corpora.base import CLIENTS, HELD_OUT, PARTS, PUBLIC, Corpus
from fedgpt.data.corpus import CORPORA, corpus_of, notes_of
from fedgpt.data.names import Names
from fedgpt.data.survey import BY_HASH, KEYS, Survey, survey_of
from fedgpt.data.tokenizer import Tokenizer, load_tokenizer, make_tokenizer

FORMAT = 1  # version of the files of a cache entry and of the split: raise it when these change
LOCK_SECONDS = 1800  # seconds to wait for another process that prepares the same corpus
ENCODE_AT_ONCE = 1 << 21  # characters in one call of the tokenizer, if a document is no longer


@dataclass(frozen=True, eq=False)
class Prepared:
    """A tokenised corpus: one token array, the documents in it, and the part each belongs to."""

    folder: Path
    tokens: np.ndarray  # (tokens,) uint16 or uint32, memory-mapped, read-only
    starts: np.ndarray  # (documents + 1,) int64: document d is tokens[starts[d] : starts[d + 1]]
    part: np.ndarray  # (documents,) int8: PUBLIC, HELD_OUT or CLIENTS
    clients: Names  # owner of each document
    labels: Names  # label of each document
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
    tell: Callable[[str], Any] = lambda note: None,
) -> Prepared:
    """Load, split, tokenise and cache a corpus, or open it from the cache.

    `trusted` are the packages that `corpus._target_` may name. `tell` gets a line about each kind
    of text that was left out. Safe to call from several processes at once: one process prepares the
    corpus, the others wait and open it. Raises ConfigError for options or text that cannot be
    prepared, and FedGPTError if the cache cannot be written.
    """
    problems = [*corpus.problems(), *CORPORA.problems(corpus, trusted), *tokenizer.problems()]
    if problems:
        raise ConfigError(problems)
    reader = corpus_of(corpus, trusted)
    given = make_tokenizer(tokenizer, ()) if tokenizer.name == "hf" else None

    def split(survey: Survey) -> np.ndarray:
        shares = {PUBLIC: corpus.public, HELD_OUT: corpus.held_out}
        part = split_documents(survey.keys, survey.sizes, shares, survey.parts)
        _check_split(part, corpus, tokenizer, reader.too_few)
        return part

    recipe = _Recipe(
        reader,
        corpus.name,
        partial(_cache_key, corpus, _kind(tokenizer, given), reader.source),
        {
            **_identity(corpus, reader),
            "source": reader.source,
            "trained_tokenizer": tokenizer.name == "bpe",
        },
        split,
        partial(make_tokenizer, tokenizer) if given is None else lambda texts: given,
    )
    prepared = _prepared(recipe, cache_dir, tell)
    # settings of a tokenizer, such as its chat template, are no part of the entry's key
    return prepared if given is None else replace(prepared, tokenizer=given)


def prepare_own(
    corpus: CorpusOptions,
    tokenizer: Tokenizer,
    cache_dir: str | Path,
    tell: Callable[[str], Any] = lambda note: None,
) -> Prepared:
    """Tokenise and cache the text of one client, all of which is its own, with a given tokenizer.

    For the other arguments and for errors see `prepare`.
    """
    if problems := [*corpus.problems(), *CORPORA.problems(corpus)]:
        raise ConfigError(problems)
    reader = corpus_of(corpus)

    def key(text_digest: str) -> str:
        return _digest([FORMAT, "own", reader.source, text_digest, tokenizer.digest])

    recipe = _Recipe(
        reader,
        "own",
        key,
        {**_identity(corpus, reader), "source": reader.source},
        lambda survey: np.full(len(survey.sizes), CLIENTS, np.int8),
        lambda texts: tokenizer,
    )
    return _prepared(recipe, cache_dir, tell)


@dataclass(frozen=True)
class _Recipe:
    """How an entry of the cache is made from the text of a corpus."""

    reader: Corpus
    name: str  # the beginning of the entry's name
    key: Callable[[str], str]  # digest of the text -> digest of the entry
    about: Mapping[str, Any]  # the description of the corpus in the manifest
    split: Callable[[Survey], np.ndarray]  # (documents,) int8: the part of each document
    tokenizer: Callable[[Iterable[str]], Tokenizer]  # from the texts of the public part


def _prepared(recipe: _Recipe, cache_dir: str | Path, tell: Callable[[str], Any]) -> Prepared:
    """The cache entry of a recipe, which is made unless it is there."""
    cache = Path(cache_dir).expanduser()
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        why = f"cannot be written ({error.strerror}); name another folder"
        raise ConfigError(f"cache_dir={cache}: {why}") from error
    survey = survey_of(recipe.reader)
    for note in notes_of(recipe.reader):
        tell(note)
    digest = recipe.key(survey.digest)
    folder = cache / f"{recipe.name}-{digest}"
    if (ready := _open_if_valid(folder)) is not None:
        return ready
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f"{folder.name}.lock", timeout=LOCK_SECONDS):
            if (ready := _open_if_valid(folder)) is not None:  # another process has prepared it
                return ready
            # a damaged entry, or files of a killed process
            for leftover in (folder, *cache.glob(f".{folder.name}.*")):
                shutil.rmtree(leftover, ignore_errors=True)
            part = recipe.split(survey)
            manifest = {"format": FORMAT, "digest": digest, **recipe.about}
            manifest |= {"sha256": survey.digest}
            with tempfile.TemporaryDirectory(dir=cache, prefix=f".{folder.name}.") as temporary:
                made = _make(Path(temporary) / "new", survey, part, recipe.tokenizer, manifest)
                made.rename(folder)
    except Timeout as error:
        raise FedGPTError(
            f"waited {LOCK_SECONDS} s for another process that prepares this corpus in {folder}; "
            "is it still running? With another cache_dir= there is nothing to wait for"
        ) from error
    except OSError as error:  # not from the text, whose errors name it
        raise FedGPTError(
            f"cache_dir={cache_dir}: the prepared text cannot be written there"
            f" ({error.strerror or error}); make room, or name another folder"
        ) from error
    del survey  # the entry has all of it
    return open_prepared(folder)


def open_prepared(folder: str | Path) -> Prepared:
    """Open a folder that `prepare` made, without reading the corpus again.

    Raises OSError or ValueError if a file is missing, or is not as it was written.
    """
    folder = Path(folder)
    if (folder / SUMS).read_text(encoding="utf-8") != sums_of(folder):
        raise ValueError(f"{folder}: its files are not those in {SUMS}")
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    names = json.loads((folder / "names.json").read_text(encoding="utf-8"))
    return Prepared(
        folder=folder,
        tokens=np.load(folder / "tokens.npy", mmap_mode="r", allow_pickle=False),
        starts=np.load(folder / "starts.npy", allow_pickle=False),
        part=np.load(folder / "part.npy", allow_pickle=False),
        clients=Names(names["clients"], np.load(folder / "clients.npy", allow_pickle=False)),
        labels=Names(names["labels"], np.load(folder / "labels.npy", allow_pickle=False)),
        bytes=np.load(folder / "bytes.npy", allow_pickle=False),
        tokenizer=load_tokenizer(folder),
        manifest=manifest,
        digest=manifest["digest"],
    )


def split_documents(
    keys: np.ndarray, sizes: np.ndarray, shares: Mapping[int, float], named: np.ndarray
) -> np.ndarray:
    """Return the part of each document, (documents,) int8; equal texts are always in one part.

    `keys` (documents,) are numbers below KEYS from hashes of the texts, and `sizes` (documents,)
    their bytes; `named` (documents,) is the part that the corpus gives a document, or BY_HASH.
    Texts without a part go in the order of their keys to the public part until it has its share of
    their bytes, then to the held-out part until it has its own. The clients get the rest. A part
    that the corpus gives to some documents has these alone.
    """
    part, free = named.copy(), named == BY_HASH
    shares = {one: 0.0 if (named == one).any() else share for one, share in shares.items()}
    if not free.all():
        keys, sizes = keys[free], sizes[free]
    total = int(sizes.sum())
    private = _key_after(shares[PUBLIC] * total, keys, sizes, 0)
    trained = _key_after(shares[HELD_OUT] * total, keys, sizes, private)
    of_free = np.full(len(keys), CLIENTS, np.int8)
    of_free[keys < trained] = HELD_OUT
    of_free[keys < private] = PUBLIC
    part[free] = of_free
    return part


def _key_after(share: float, keys: np.ndarray, sizes: np.ndarray, first: int) -> int:
    """Return the least key so that the texts from the key `first` up to it have `share` bytes.

    It is found by bisection, which needs no memory for a sorted copy of the keys.
    """

    def size(key: int) -> int:
        return int(sizes.sum(where=(first <= keys) & (keys < key)))

    return bisect_left(range(KEYS), share, lo=first, key=size)


def _kind(options: TokenizerOptions, given: Tokenizer | None) -> dict[str, Any]:
    """Return what a tokenizer depends on besides the public text, but for the path of its folder:
    the options, or the digest of the one that is given.
    """
    if given is not None:
        return {"name": options.name, "digest": given.digest}
    used = {"name": options.name, "vocab_size": options.vocab_size}
    return used if options.name == "bpe" else {"name": options.name}


def _cache_key(
    corpus: CorpusOptions, kind: Mapping[str, Any], source: str, text_digest: str
) -> str:
    """Return a short hash of everything that determines the content of a cache entry.

    It does not include the seed, the partition, and the path of corpus=files.
    """
    library = importlib.metadata.version("tokenizers") if kind["name"] == "bpe" else ""
    shares = [corpus.public, corpus.held_out]
    parts = [FORMAT, corpus.name, corpus.client, source, text_digest, shares, kind, library]
    if corpus._target_ or corpus.arguments:  # absent otherwise, so that older entries stay valid
        parts.append([corpus._target_, corpus.arguments])
    return _digest(parts)


def _digest(parts: list[Any]) -> str:
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
    except (OSError, ValueError, FedGPTError):  # the last: a tokenizer of another library version
        return None


def _make(
    folder: Path,
    survey: Survey,
    part: np.ndarray,
    tokenizer_of: Callable[[Iterable[str]], Tokenizer],
    manifest: dict[str, Any],
) -> Path:
    """Write all files of a cache entry to `folder`, their digests last, and return it."""
    # only bpe is trained, and reads the corpus once more
    texts = (text for text, number in zip(survey.texts(), part, strict=True) if number == PUBLIC)
    tokenizer = tokenizer_of(texts)
    folder.mkdir()
    starts = _write_tokens(folder / "tokens.npy", _encode(survey.texts(), tokenizer), tokenizer)
    lengths = np.diff(starts)
    arrays = {"starts": starts, "part": part, "bytes": survey.sizes}
    arrays |= {"clients": survey.clients.numbers, "labels": survey.labels.numbers}
    for name, values in arrays.items():
        np.save(folder / f"{name}.npy", values, allow_pickle=False)
    names = {
        "clients": survey.clients.distinct,
        "labels": survey.labels.distinct,
    }
    (folder / "names.json").write_text(json.dumps(names, ensure_ascii=False), encoding="utf-8")
    split = {
        name: {
            "documents": int((part == number).sum()),
            "tokens": int(lengths.sum(where=part == number)),
            "bytes": int(survey.sizes.sum(where=part == number)),
        }
        for name, number in PARTS.items()
    }
    manifest = manifest | {
        "documents": len(part),
        "tokens": int(starts[-1]),
        "bytes": int(survey.sizes.sum()),
        "owners": len(survey.clients.distinct),
        "split": split,
        "tokenizer": {
            "name": tokenizer.name,
            "vocab_size": tokenizer.vocab_size,
            "digest": tokenizer.digest,
        },
        "versions": {"tokenizers": importlib.metadata.version("tokenizers")},
    }
    tokenizer.save(folder)
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    (folder / SUMS).write_text(sums_of(folder), encoding="utf-8")
    for file in folder.iterdir():
        sync(file)
    return folder


def _write_tokens(path: Path, encoded: Iterable[np.ndarray], tokenizer: Tokenizer) -> np.ndarray:
    """Write the ids of all documents as one array; return where each starts, and the end."""
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 65536 else np.uint32)
    ends = array("q", [0])
    with path.open("wb") as stream:
        header = _array_header(dtype, 0)
        stream.write(header)
        for ids in encoded:
            stream.write(ids.astype(dtype).tobytes())
            ends.append(ends[-1] + len(ids))
        # numpy leaves room for a longer shape, so the size of the header does not change
        final = _array_header(dtype, ends[-1])
        assert len(final) == len(header), "the header of an array grows with the array"
        stream.seek(0)
        stream.write(final)
    return np.frombuffer(ends, np.int64)


def _array_header(dtype: np.dtype, length: int) -> bytes:
    """Return the first bytes of a .npy file, as np.save writes them."""
    stream = io.BytesIO()
    about = {"descr": dtype.str, "fortran_order": False, "shape": (length,)}
    np.lib.format.write_array_header_1_0(stream, about)
    return stream.getvalue()


def _encode(texts: Iterable[str], tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """Yield the ids of every document, followed by the end token."""
    held: list[str] = []
    size = 0
    for text in texts:
        held.append(text)
        size += len(text)
        if size >= ENCODE_AT_ONCE:
            yield from (np.append(ids, tokenizer.end) for ids in tokenizer.encode_many(held))
            held, size = [], 0
    yield from (np.append(ids, tokenizer.end) for ids in tokenizer.encode_many(held))


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
    needed = {"held-out": HELD_OUT, "clients'": CLIENTS}
    if corpus.at_sites:
        del needed["clients'"]
    for name, number in needed.items():
        if not (part == number).any():
            problems.append(
                f"corpus.public={corpus.public}, corpus.held_out={corpus.held_out}: {len(part)}"
                f" documents are too few, the {name} part is empty; {remedy}, or lower the shares"
            )
    if problems:
        raise ConfigError(problems)
