"""A client with its own text on its own machine, and what its owner decides."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace

from fedgpt.core.options import CorpusOptions, RunOptions
from fedgpt.data.corpus import corpus_of
from fedgpt.data.folder_text import FolderCorpus


@dataclass(frozen=True)
class Site:
    """One site: its name, its text and its folders. No server can change any of it."""

    name: str
    corpus: CorpusOptions  # corpus=files, with the site's own path and fields
    state_dir: str
    cache_dir: str
    device: str = "auto"  # auto, cpu or cuda
    server: str = ""  # fingerprint of the CA of its server, where that is known

    @property
    def runs(self) -> str:
        """The folder with the client state of each run of its server.

        A server chooses the ids of its runs, and must not reach the state of another server's run
        by taking its id.
        """
        return f"{self.state_dir}/runs" + (f"/{self.of_server}" if self.server else "")

    @property
    def of_server(self) -> str:
        """What tells the files of its server from those of others; empty if it is not known."""
        return hashlib.sha256(self.server.encode()).hexdigest()[:16] if self.server else ""

    @property
    def cache_name(self) -> str:
        """Name of the folder in `cache_dir` with what is prepared of this text for this state."""
        about = [str(self.state_dir), asdict(self.corpus)]
        return f"site-{hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]}"

    def options(self, run: RunOptions) -> RunOptions:
        """The options of a run as they hold here: paths, device and code are the site's own.

        The time limit of a job is the operator's of this machine: at the limit of `run` the process
        would end.
        """
        return replace(
            run,
            corpus=self.corpus,
            cache_dir=self.cache_dir,
            run_dir="",
            init_from=None,
            trusted_packages=[],
            runtime=replace(run.runtime, device=self.device, watchdog=0.0),
        )

    def files(self) -> dict[str, tuple[int, int]]:
        """Name -> size and time of change of each file below the site's path.

        Raises ConfigError if the path cannot be read.
        """
        corpus = corpus_of(self.corpus)
        assert isinstance(corpus, FolderCorpus), "a site has its text in files"
        found = {}
        for folder in corpus.folders:
            for name, path in folder.files().items():
                about = path.stat()
                found[name] = about.st_size, about.st_mtime_ns
        return found
