"""The text of a client's jobs.

CommonText   every process has the text of the run, and a client has one of its shards
SiteText     every client has its own text, which no other process can read
"""

from __future__ import annotations

import logging
import re
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np

from fedgpt.client.site import Site
from fedgpt.client.state import ClientStore
from fedgpt.client.tidy import remove_earlier, remove_unused, touch
from fedgpt.core.errors import FedGPTError, PartMissing, TextChanged
from fedgpt.core.files import PRIVATE, write_text
from fedgpt.core.messages import Job
from fedgpt.core.options import RunOptions
from fedgpt.data.partitions.base import Shard
from fedgpt.data.prepare import PUBLIC, Prepared, open_prepared, prepare_own
from fedgpt.data.shards import (
    classes_of_clients,
    code_digest,
    load_shards,
    partition_source,
    shards_digest,
    source_of,
    text_digest,
)
from fedgpt.data.survey import Changed
from fedgpt.data.text import Text, part_text, shard_text
from fedgpt.data.tokenizer import Tokenizer, load_tokenizer

DIGEST = re.compile(r"[0-9a-f]{16}")  # of a tokenizer
TOKENIZER = "tokenizer.json"
OF_RUN = "text"  # file in the state of a private run: its entry of the cache
log = logging.getLogger(__name__)


class Texts(Protocol):
    """Where a client's text comes from."""

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the run."""
        ...

    def of(self, job: Job, index: int) -> Text:
        """The text of a job of the client with partition number `index`; raises FedGPTError."""
        ...


class CommonText:
    """The text of a run, from a cache that all processes of this machine share."""

    def __init__(self, options: RunOptions):
        self.options = options
        self._code, self._warned = code_digest(options), False  # the files that are imported now

    @cached_property
    def _data(self) -> tuple[Prepared, list[Shard]]:
        return load_shards(self.options)

    @property
    def prepared(self) -> Prepared:
        """The tokens."""
        return self._data[0]

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the run."""
        return self.prepared.tokenizer

    @property
    def shards(self) -> list[Shard]:
        """The shard of each client; clients and server compute the same list."""
        return self._data[1]

    @cached_property
    def _shards_digest(self) -> str:
        return shards_digest(self.shards)

    def of(self, job: Job, index: int) -> Text:
        """The shard of the client with partition number `index`.

        Raises ValueError if the job is for another client, TextChanged if this process has prepared
        other text than the run's, and FedGPTError if it makes other shards of it.
        """
        self._check(job)
        shard = self.shards[index]
        if shard.client != job.client:
            raise ValueError(
                f"the job is for client {job.client!r}, partition {index} is {shard.client!r}"
            )
        expected = job.plan.digests.get("shards", "")
        if expected and self._shards_digest != expected:
            raise FedGPTError(
                f"{partition_source(self.options)} makes other clients or shards here than in the"
                " run, of the same text; use the same code for both"
            )
        self._compare_code(job.plan.digests.get("code", ""))
        return shard_text(self.prepared, shard)

    def public(self, job: Job) -> Text:
        """The public text, for a job of the server itself; raises TextChanged."""
        self._check(job)
        return part_text(self.prepared, PUBLIC)

    def _compare_code(self, expected: str) -> None:
        """Warn, once, if the user's own task or codec is in another file than the run's: as on a
        resume it may be a correction.
        """
        if expected and self._code != expected and not self._warned:
            self._warned = True
            log.warning(
                "%s: its file is not that with which the run began; this client uses it all the"
                " same, and the result of the run may differ",
                " and ".join(classes_of_clients(self.options)),
            )

    def _check(self, job: Job) -> None:
        """Raise TextChanged if this process has prepared other text than the run's."""
        expected = job.plan.digests.get("text", "")
        try:
            found = text_digest(self.prepared)
        except FedGPTError as error:
            raise self._changed(f" ({error})") from error
        if expected and found != expected:
            del self._data  # so that the next job reads the text again
            raise self._changed()

    def _changed(self, why: str = "") -> TextChanged:
        """The error for a client; its owner may have neither the run's folder nor its commands."""
        return TextChanged(
            f"{source_of(self.options)}: this client's text has changed since the run began{why};"
            " put the earlier text back, and the client's next job will read it"
        )


class SiteText:
    """The text of one site, in the tokens of a run's tokenizer.

    Documents that are added count from the next job on. In a run with privacy at the client the
    text stays that of the first job: the accounting is of these blocks.
    """

    def __init__(self, site: Site, options: RunOptions):
        self.site, self.window = site, options.model.block_size + 1
        self._fixed = options.privacy.unit in ("example", "local")
        self._folder = Path(site.state_dir) / "tokenizers"  # one folder for each digest
        self._tokenizer: Tokenizer | None = None
        self._files: dict[str, tuple[int, int]] = {}  # what `_prepared` was made of
        self._prepared: Prepared | None = None

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the run, which the last question or job has named."""
        assert self._tokenizer is not None, "a question or a job comes first"
        return self._tokenizer

    def introduce(self, definition: str) -> int:
        """Keep a run's tokenizer, the `definition` of one; returns the site's number of tokens.

        Raises FedGPTError if it is no tokenizer that fedgpt can read, and for too little text.
        """
        try:
            self._tokenizer = Tokenizer(definition)
        except (ValueError, RecursionError) as error:
            raise FedGPTError(f"the server's tokenizer cannot be read ({error})") from error
        self._prepared = None
        folder = self._folder / self._tokenizer.digest
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / TOKENIZER, self._tokenizer.definition)
        others = self._folder.glob(f"*/{TOKENIZER}")
        remove_unused(path for path in others if self._is_other(path.parent.name))
        size = int(self._newest().starts[-1])
        if size < self.window:
            raise FedGPTError(
                f"corpus.path={self.site.corpus.path}: has {size} tokens, and a client needs"
                f" {self.window} (model.block_size={self.window - 1}, and one more); add text"
            )
        return size

    def of(self, job: Job, index: int) -> Text:
        """The text of the site; raises FedGPTError if it cannot be read or is too short."""
        if job.client != self.site.name:
            raise ValueError(f"the job is for client {job.client!r}, this is {self.site.name!r}")
        self.use(job.plan.digests.get("tokenizer", ""))
        prepared = self._of_run(job) if self._fixed else self._newest()
        spans = np.array([[0, prepared.starts[-1]]], np.int64)
        return shard_text(prepared, Shard(self.site.name, spans))

    def use(self, digest: str) -> None:
        """Make the tokenizer with this digest that of the text; raises PartMissing without it."""
        if self._tokenizer is not None and self._tokenizer.digest == digest:
            return
        if not DIGEST.fullmatch(digest):  # it becomes the name of a folder
            raise FedGPTError(f"{digest!r:.60} is no digest of a tokenizer")
        try:
            found = load_tokenizer(self._folder / digest)
        except FedGPTError:  # there is none, or it is damaged
            found = None
        if found is None or found.digest != digest:
            raise PartMissing("this site has the run's tokenizer no more, or it is damaged")
        touch(self._folder / digest / TOKENIZER)
        self._tokenizer, self._prepared = found, None

    def _is_other(self, digest: str) -> bool:
        """Whether a folder has a tokenizer that is not the one in use."""
        return bool(DIGEST.fullmatch(digest)) and digest != self.tokenizer.digest

    def _newest(self) -> Prepared:
        """The text as it is now."""
        before, files = self._prepared, self.site.files()
        if before is not None and files == self._files:
            return before
        try:
            now = prepare_own(self.site.corpus, self.tokenizer, self._cache, log.warning)
        except Changed:
            if before is None:
                raise
            log.warning("the text is being changed; this job uses it as it was before")
            return before
        if before is not None and before.digest != now.digest:
            log.warning(
                "the text has changed: %d documents (%d tokens) -> %d documents (%d tokens)",
                *(len(before.part), before.starts[-1], len(now.part), now.starts[-1]),
            )
        self._prepared, self._files = now, files
        remove_earlier(self._cache, now.manifest["sha256"], self._referred())
        return now

    @property
    def _cache(self) -> Path:
        """The cache of this text, in which nothing is of another site."""
        return Path(self.site.cache_dir).expanduser() / self.site.cache_name

    def _referred(self) -> set[str]:
        """Names of the cache entries to which private runs of this site refer."""
        return {
            Path(path.read_text(encoding="utf-8")).name
            for path in Path(self.site.state_dir, "runs").rglob(OF_RUN)  # of all servers
            if path.is_file()  # a client may have this name, and so a folder
        }

    def _of_run(self, job: Job) -> Prepared:
        """The text as it was at the run's first job, from the cache."""
        path = ClientStore(self.site.runs, job.plan.run, self.site.name).folder / OF_RUN
        cache = Path(self.site.cache_dir).expanduser()
        try:
            return open_prepared(cache / path.read_text(encoding="utf-8"))
        except (OSError, ValueError, FedGPTError):  # the first job, or an entry that is damaged
            now = self._newest()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, str(now.folder.relative_to(cache)), mode=PRIVATE)
        return now
