"""Text that changes: between two starts of a run, while it starts, and while its clients train.

So do the clients' shards of the same text, where a partition of the user's own is changed.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from support import third_party
from support.advice import advises
from support.here import run_here, tiny_run
from support.world import LONG, files, wait_until

import fedgpt
from fedgpt.cli import dispatch
from fedgpt.client.texts import CommonText
from fedgpt.client.work import ClientWork
from fedgpt.config import compose
from fedgpt.core.errors import FedGPTError, TextChanged
from fedgpt.core.faults import Injected, injected
from fedgpt.core.files import sha256_of
from fedgpt.core.messages import Job, Plan, plan_as_json, plan_of_json
from fedgpt.core.options import RunOptions, TokenizerOptions
from fedgpt.core.resources import resources_for
from fedgpt.data.partitions.base import Shard
from fedgpt.data.shards import shards_digest, text_digest
from fedgpt.data.tokenizer import make_tokenizer
from fedgpt.flower import client_app
from fedgpt.flower.grid_transport import GridTransport
from fedgpt.flower.launch import client_environment
from fedgpt.flower.local_superlink import local_superlink
from fedgpt.storage.checkpoint import Checkpoints
from fedgpt.storage.content import content_of
from fedgpt.storage.initial_weights import initial_weights
from fedgpt.storage.run_folder import read_lines

BPE = ["tokenizer=bpe", "tokenizer.vocab_size=270"]


def content(folder: Path) -> dict[str, str]:
    """Every file of a run's folder but its lock, with its digest."""
    return {name: sha256_of(folder / name) for name in files(folder) if name != ".lock"}


def write_other_text(folder: Path) -> None:
    """Other words under the same file names, so that clients and options stay as they are."""
    for path in folder.rglob("*.txt"):
        path.write_text("\n".join(f"{path.stem} quick zebras jump {n} fences" for n in range(40)))


def stop_after(version: int, *options: str) -> None:
    """Run until a server step fails, as the newest checkpoint has `version`."""
    with injected(f"aggregate:{version + 1}:raise"), pytest.raises(Injected):
        run_here(*options, "checkpoint.every=1")


@pytest.fixture
def stopped(tmp_path) -> Path:
    """The folder of a run with a BPE tokenizer that ended at version 2 of 3."""
    stop_after(2, *tiny_run(tmp_path), *BPE)
    return tmp_path / "run"


def test_a_resume_over_other_text_is_refused_before_any_file_is_changed(
    stopped, tmp_path, monkeypatch
):
    before, digest = content(stopped), fedgpt.open_run(stopped).tokenizer.digest
    write_other_text(tmp_path / "text")

    def read(*_):
        raise AssertionError("weights are read before the text is compared")

    monkeypatch.setattr("fedgpt.assemble.initial_weights", read)
    monkeypatch.setattr("fedgpt.assemble.base_weights", read)
    with pytest.raises(FedGPTError, match=r"corpus.path=.*text has changed since the run began"):
        fedgpt.run(f"resume={stopped}")
    assert content(stopped) == before
    assert fedgpt.open_run(stopped).tokenizer.digest == digest


def test_a_run_needs_no_text_to_generate_before_its_end(stopped, tmp_path):
    texts = fedgpt.open_run(stopped).generate("The river", tokens=8)
    shutil.rmtree(tmp_path / "text")
    shutil.rmtree(tmp_path / "cache")
    assert fedgpt.open_run(stopped).generate("The river", tokens=8) == texts


def test_a_run_whose_tokenizer_was_replaced_generates_with_that_file_or_the_text_restored(
    stopped, tmp_path
):
    kept, texts = stopped / "tokenizer", fedgpt.open_run(stopped).generate("The river", tokens=8)
    shutil.copytree(kept, tmp_path / "kept")
    shutil.copytree(tmp_path / "text", tmp_path / "kept text")
    write_other_text(tmp_path / "text")
    make_tokenizer(TokenizerOptions("bpe", 260), ["the river rose"]).save(kept)
    with pytest.raises(FedGPTError) as refused:
        fedgpt.open_run(stopped).generate("The river", tokens=8)
    advises(refused.value, "restore that file, or the text")
    shutil.rmtree(kept)
    shutil.copytree(tmp_path / "kept", kept)
    assert fedgpt.open_run(stopped).generate("The river", tokens=8) == texts
    shutil.rmtree(kept)  # as in a run of an earlier version
    with pytest.raises(FedGPTError, match="is not the one that the run began with"):
        fedgpt.open_run(stopped).generate("The river", tokens=8)
    shutil.rmtree(tmp_path / "text")
    (tmp_path / "kept text").rename(tmp_path / "text")
    assert fedgpt.open_run(stopped).generate("The river", tokens=8) == texts


def test_with_the_earlier_text_back_the_run_ends_with_the_same_bits(stopped, tmp_path):
    shutil.copytree(tmp_path / "text", tmp_path / "kept")
    write_other_text(tmp_path / "text")
    with pytest.raises(FedGPTError, match="cannot be continued") as refused:
        fedgpt.run(f"resume={stopped}")
    advises(refused.value, "put the earlier text back")
    shutil.rmtree(tmp_path / "text")
    (tmp_path / "kept").rename(tmp_path / "text")
    resumed = fedgpt.run(f"resume={stopped}").summary["weights_sha256"]
    options = [o for o in tiny_run_again(tmp_path) if not o.startswith("run_dir")]
    assert resumed == run_here(*options, *BPE, f"run_dir={tmp_path / 'b'}")["weights_sha256"]


def tiny_run_again(folder: Path) -> list[str]:
    shutil.rmtree(folder / "text")
    return tiny_run(folder)


def edit_identity(run: Path, **environment: str | None) -> None:
    """Change the environment in the newest checkpoint; None removes a name."""
    checkpoints = Checkpoints(run / "checkpoints", 9)
    snapshot = checkpoints.load()
    assert snapshot is not None
    changed = {**snapshot.identity.environment, **environment}
    kept = {name: value for name, value in changed.items() if value is not None}
    checkpoints.save(replace(snapshot, identity=replace(snapshot.identity, environment=kept)))
    checkpoints.close()


def test_a_resume_with_another_tokenizer_of_the_same_text_is_refused(stopped):
    digest = fedgpt.open_run(stopped).tokenizer.digest
    edit_identity(stopped, tokenizer="0123456789abcdef")
    with pytest.raises(FedGPTError, match=r"=bpe makes another tokenizer of corpus.path=") as e:
        fedgpt.run(f"resume={stopped}")
    advises(e.value, "install the version of the package tokenizers that the run began with")
    with pytest.raises(FedGPTError, match="is not the one that the run began with"):
        _ = fedgpt.open_run(stopped).tokenizer
    edit_identity(stopped, tokenizer=digest)  # which that version makes
    fedgpt.run(f"resume={stopped}")


def test_other_versions_are_a_warning_that_names_them(stopped, caplog):
    edit_identity(stopped, torch="0.1", numpy=None)
    with caplog.at_level(logging.WARNING):
        fedgpt.run(f"resume={stopped}")
    assert "under other conditions than it began with: torch 0.1 -> " in caplog.text
    assert "numpy" not in caplog.text, "an earlier version did not store it"


def test_the_run_of_an_earlier_version_resumes_and_its_next_checkpoint_has_the_digests(stopped):
    edit_identity(stopped, text=None, tokenizer=None, shards=None)
    shutil.rmtree(stopped / "tokenizer")
    fedgpt.run(f"resume={stopped}")
    identity = Checkpoints(stopped / "checkpoints", 9).identity()
    assert identity is not None and {"text", "tokenizer", "shards"} <= identity.environment.keys()
    assert (stopped / "tokenizer" / "tokenizer.json").exists()


def test_the_digests_of_the_clients_text_are_in_no_file_that_is_published(stopped):
    identity = Checkpoints(stopped / "checkpoints", 9).identity()
    assert identity is not None
    digests = [identity.environment[name].encode() for name in ("text", "shards")]
    for name in files(stopped):
        if not name.startswith(("checkpoints/", "clients/")):
            held = (stopped / name).read_bytes()
            assert not [digest for digest in digests if digest in held], name


def test_a_damaged_tokenizer_in_the_folder_is_reported_and_made_again(stopped, caplog):
    digest = fedgpt.open_run(stopped).tokenizer.digest
    (stopped / "tokenizer" / "tokenizer.json").write_text("{}")
    with caplog.at_level(logging.WARNING):
        assert fedgpt.open_run(stopped).tokenizer.digest == digest
    assert "tokenizer.json" in caplog.text
    fedgpt.run(f"resume={stopped}")
    assert json.loads((stopped / "tokenizer" / "tokenizer.json").read_text()) != {}


def job_of(options: RunOptions, work: ClientWork) -> Job:
    """The first job of ann, with the digests of text and shards."""
    digests = {"text": text_digest(work.texts.prepared), "shards": shards_digest(work.texts.shards)}
    plan = Plan("r", 1, 0, 10, 100, digests=digests)
    return Job("ann", 0, 0, initial_weights(options, work.texts.prepared.tokenizer), plan)


def test_a_client_that_prepares_other_text_refuses_its_job(tmp_path):
    options = compose.load(tiny_run(tmp_path))
    work = ClientWork(options, str(tmp_path / "state"))
    job = job_of(options, work)
    before = work.train(job, 0)[1].copy()
    write_other_text(tmp_path / "text")
    anew = ClientWork(options, str(tmp_path / "state"))
    refusals = []
    for refused in (partial(anew.train, job, 0), partial(anew.train_root, job)):
        with pytest.raises(TextChanged, match=r"corpus.path=.*this client's text has changed") as e:
            refused()
        refusals.append(str(e.value))
    shutil.rmtree(tmp_path / "text")
    with pytest.raises(TextChanged, match=r"corpus.path=.*\(.*text") as e:
        ClientWork(options, str(tmp_path / "state")).train(job, 0)
    # of a SuperNode's owner: without the commands and the folder of the server, and no digest
    for refusal in (*refusals, str(e.value)):
        assert "resume" not in refusal and str(tmp_path / "run") not in refusal
        advises(refusal, "put the earlier text back, and the client's next job will read it")
        assert not re.search("[0-9a-f]{16}", refusal.replace(str(tmp_path), ""))
    tiny_run(tmp_path)
    assert (anew.train(job, 0)[1] == before).all(), "the same process, with the text put back"


def test_a_process_that_starts_over_a_damaged_cache_trains_the_same_bits(tmp_path):
    options = compose.load(tiny_run(tmp_path))
    work = ClientWork(options, str(tmp_path / "state"))
    job, folder = job_of(options, work), work.texts.prepared.folder
    before = work.train(job, 0)[1].copy()
    tokens = (folder / "tokens.npy").read_bytes()
    (folder / "tokens.npy").unlink()  # not written over, as this process has mapped the file
    (folder / "tokens.npy").write_bytes(tokens[:200] + tokens[:199:-1])
    assert (ClientWork(options, str(tmp_path / "state")).train(job, 0)[1] == before).all()
    make_tokenizer(TokenizerOptions("bpe", 260), ["the river rose"]).save(folder)
    assert (ClientWork(options, str(tmp_path / "state")).train(job, 0)[1] == before).all()


OWN = """
from dataclasses import dataclass
import numpy as np
from fedgpt.data.partitions.base import Partition, shards_of

@dataclass(frozen=True)
class Mine(Partition):
    def deal(self, documents, seed):
        owners = np.arange(len(documents.spans)) % 2
        return shards_of(["ann", "bob"], documents.spans, owners)
"""
# two clients of the same names, with each other's documents, with one more, and of other names
CHANGES = {
    "swapped": ("np.arange(len(documents.spans)) % 2", "1 - np.arange(len(documents.spans)) % 2"),
    "one document moved": ("% 2\n", "% 2 | (np.arange(len(documents.spans)) == 2)\n"),
    "renamed": ('["ann", "bob"]', '["ann", "eve"]'),
}
MINE = ["partition=custom", "partition._target_=mine_own.Mine", "trusted_packages=[mine_own]"]


def write_partition(folder: Path, old: str = "", new: str = "") -> None:
    """Write the user's module, and let this process import it again as a new process would."""
    (folder / "mine_own.py").write_text(OWN.replace(old, new))
    sys.modules.pop("mine_own", None)
    importlib.invalidate_caches()


@pytest.fixture
def own(tmp_path, monkeypatch) -> Iterator[list[str]]:
    """Options of a run with a partition of the user's own."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # its times are whole seconds
    write_partition(tmp_path)
    yield [*tiny_run(tmp_path), *MINE]
    sys.modules.pop("mine_own", None)


def test_a_resume_with_other_shards_of_the_same_text_is_refused(own, tmp_path, caplog):
    run = tmp_path / "run"
    stop_after(2, *own)
    before = content(run)
    reason = r"partition\._target_=mine_own\.Mine makes other clients or shards than at the start"
    for change in CHANGES.values():
        write_partition(tmp_path, *change)
        with pytest.raises(FedGPTError, match=reason) as refused:
            fedgpt.run(f"resume={run}")
        advises(refused.value, "restore the code of mine_own.Mine")
        assert content(run) == before
    write_partition(tmp_path, "class Mine", "# a comment changes no shard\nclass Mine")
    with caplog.at_level(logging.WARNING):
        resumed = fedgpt.run(f"resume={run}").summary["weights_sha256"]
    assert re.search(r"conditions than it began with: code of mine_own\.Mine \w+ ->", caplog.text)
    alone = [word for word in own if not word.startswith("run_dir")]
    assert resumed == run_here(*alone, f"run_dir={tmp_path / 'b'}")["weights_sha256"]


def test_a_resume_with_other_shards_of_a_partition_of_fedgpt_is_refused(stopped):
    identity = Checkpoints(stopped / "checkpoints", 9).identity()
    assert identity is not None
    edit_identity(stopped, shards="0123456789abcdef")
    with pytest.raises(FedGPTError, match=r"partition=natural makes other clients") as refused:
        fedgpt.run(f"resume={stopped}")
    advises(refused.value, "install the versions of fedgpt and numpy that the run began with")
    edit_identity(stopped, shards=identity.environment["shards"])  # which those versions make
    fedgpt.run(f"resume={stopped}")


def test_the_file_of_a_class_of_any_kind_that_changed_is_a_warning_that_names_it(tmp_path, caplog):
    """Whether a task, a codec or a metric computes other values with it is not known."""
    own = ["task=custom", "task._target_=support.labels_task.DocumentLabel"]
    own += ["metrics=[{_target_:support.labels_task.TopTokens,k:1}]"]
    own += [
        "update=custom",
        f"update._target_={third_party.MODULE}.Sign",
        "update.arguments={step: 0.002}",
    ]
    stop_after(2, *tiny_run(tmp_path), *own, f"trusted_packages=[support,{third_party.MODULE}]")
    for kind in ("support.labels_task.DocumentLabel", "support.labels_task.TopTokens"):
        edit_identity(tmp_path / "run", **{f"code of {kind}": "0123"})
    edit_identity(tmp_path / "run", **{"code of outsider.Sign": "0123"})
    with caplog.at_level(logging.WARNING):
        fedgpt.run(f"resume={tmp_path / 'run'}")
    for kind in ("labels_task.DocumentLabel", "labels_task.TopTokens", "outsider.Sign"):
        assert re.search(rf"code of \S*{kind} 0123 -> \w{{16}}", caplog.text), caplog.text


def test_a_client_whose_codec_is_in_another_file_than_the_runs_says_so_once(
    tmp_path, monkeypatch, caplog
):
    """As on a resume, it may be a correction: only its comment may have changed."""
    monkeypatch.syspath_prepend(tmp_path)
    module = tmp_path / "own_codec.py"
    third_party.write(tmp_path).rename(module)
    own = ["update=custom", "update._target_=own_codec.Sign", "update.arguments={step: 0.002}"]
    options = compose.load([*tiny_run(tmp_path), *own, "trusted_packages=[own_codec]"])
    try:
        work = ClientWork(options, str(tmp_path / "state"))
        job = job_of(options, work)
        digests = job.plan.digests | {
            "code": content_of(options, work.texts.prepared, work.texts.shards)["code"]
        }
        job = replace(job, plan=replace(job.plan, digests=digests))
        assert plan_of_json(plan_as_json(job.plan)) == job.plan
        before = work.train(job, 0)[1].copy()
        assert not caplog.text
        module.write_text(module.read_text() + "# a comment\n")
        anew = ClientWork(options, str(tmp_path / "state"))
        for _ in range(2):
            assert (anew.train(job, 0)[1] == before).all()
        [told] = caplog.messages
        assert told.startswith("own_codec.Sign: its file is not that with which the run began")
    finally:
        sys.modules.pop("own_codec", None)


@pytest.mark.parametrize("change", ["swapped", "one document moved"])
def test_a_client_with_other_shards_of_the_same_text_refuses_its_job(own, tmp_path, change):
    options = compose.load(own)
    work = ClientWork(options, str(tmp_path / "state"))
    job = job_of(options, work)
    before = work.train(job, 0)[1].copy()
    write_partition(tmp_path, *CHANGES[change])
    with pytest.raises(FedGPTError, match=r"mine_own\.Mine makes other clients or s") as refused:
        ClientWork(options, str(tmp_path / "state")).train(job, 0)
    advises(refused.value, "of the same text; use the same code for both")
    write_partition(tmp_path)
    assert (ClientWork(options, str(tmp_path / "state")).train(job, 0)[1] == before).all()


def test_the_digest_of_shards_is_of_every_name_and_every_span():
    def digest(*shards: tuple[str, list[list[int]]]) -> str:
        return shards_digest([Shard(name, np.array(spans)) for name, spans in shards])

    first = [("ann", [[0, 10], [20, 30]]), ("bob", [[30, 40]])]
    others = [
        [("ann", [[0, 10]]), ("bob", [[20, 30], [30, 40]])],
        [("ann", [[0, 10], [20, 31]]), ("bob", [[31, 40]])],
        [("ann", [[0, 10], [20, 30]]), ("eve", [[30, 40]])],
        [("ann", [[30, 40]]), ("bob", [[0, 10], [20, 30]])],
        [("ann", [[0, 10], [20, 30]])],
    ]
    assert len({digest(*shards) for shards in [first, *others]}) == 6
    narrow = [Shard(name, np.array(spans, np.int32)) for name, spans in first]
    assert shards_digest(narrow) == digest(*first), "whatever integers a partition returns"


def start(options: list[str], env: dict[str, str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "fedgpt", "run", *options]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env={**os.environ, **env}, text=True, **streams)


def children(process: subprocess.Popen[str]) -> list[int]:
    listing = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    return [int(pid) for pid in listing.split()]


@pytest.mark.slow
@pytest.mark.parametrize("change", ["other words", "gone"])
def test_a_worker_killed_after_the_text_changed_ends_the_run_with_one_message(tmp_path, change):
    options = [o for o in tiny_run(tmp_path) if not o.startswith(("rounds", "local.steps"))]
    run = tmp_path / "run"
    process = start([*options, "rounds=5000", "runtime.workers=1", "local.steps=20"], {})
    try:
        metrics = run / "metrics.jsonl"
        wait_until(lambda: metrics.exists() and len(metrics.read_text().splitlines()) > 2)
        shutil.copytree(tmp_path / "text", tmp_path / "kept")
        if change == "gone":
            shutil.rmtree(tmp_path / "text")
        else:
            write_other_text(tmp_path / "text")
        (worker,) = children(process)
        os.kill(worker, signal.SIGKILL)
        _, errors = process.communicate(timeout=LONG)
    finally:
        process.kill()
    assert process.returncode == 1, errors
    assert re.search(rf"fedgpt: corpus.path={tmp_path}/text: the text has changed", errors), errors
    assert "Traceback" not in errors and f"fedgpt run resume={run}" in errors


@pytest.mark.long
def test_a_supernode_whose_text_changed_refuses_its_jobs(tmp_path, monkeypatch):
    """Each node has a text of its own; the run ends when the text of the server changes too."""
    words = [o for o in tiny_run(tmp_path) if not o.startswith("rounds")]
    options = compose.load([*words, "rounds=100", "runtime=superlink"])
    text = {name: tmp_path / name / "text" for name in ("server", "ann", "bob")}
    for folder in text.values():
        shutil.copytree(tmp_path / "text", folder)
    options.corpus.path = "/proc/self/cwd/text"  # in the folder where a process was started
    environment = client_environment(options, resources_for(options, 2))

    def events(kind: str, client: str) -> list[dict]:
        lines = read_lines(tmp_path / "run" / "events.jsonl")
        return [e for e in lines if e["event"] == kind and e["client"] == client]

    with ThreadPoolExecutor(1) as threads, ExitStack() as stack:
        monkeypatch.chdir(text["server"].parent)
        link = stack.enter_context(local_superlink(options.run_dir, environment))
        for number, name in enumerate(("ann", "bob")):
            monkeypatch.chdir(text[name].parent)
            link.start_node(number, 2, None)
        monkeypatch.chdir(text["server"].parent)
        run = threads.submit(link.submit, options)
        wait_until(lambda: bool(events("accept", "bob")) or run.done())
        with (text["bob"] / "bob" / "0.txt").open("a") as stream:
            stream.write("one line more\n")
        wait_until(lambda: bool(events("reject", "bob")) or run.done())
        assert not run.done(), "only this client's job fails"
        shutil.rmtree(text["server"])
        with pytest.raises(FedGPTError, match=rf"{text['server']}: the text has changed since"):
            run.result(timeout=LONG)
    assert events("accept", "ann")
    for refusal in events("reject", "bob"):
        assert refusal["code"] == "client_error"
        assert f"corpus.path={text['bob']}: this client's text has changed" in refusal["detail"]


@pytest.mark.parametrize("privacy", [[], ["privacy=client", "pace.rate=0.9", "pace.clients=0"]])
def test_text_that_changes_within_a_run_leaves_no_digest_of_it(
    tmp_path, monkeypatch, capfd, privacy
):
    """Neither in what the run prints nor in its records: a digest confirms a guess of the text."""
    options, digests = [*tiny_run(tmp_path), *privacy, "rounds=50"], []
    send = GridTransport.send

    def later(self, jobs):
        if jobs and jobs[0].version == 2:
            write_other_text(tmp_path / "text")
            client_app._works.clear()  # as in a worker that is started again
            digests.extend((jobs[0].plan.digests["text"], CommonText(o).prepared.digest))
        send(self, jobs)

    o = compose.load(options)
    monkeypatch.setattr(GridTransport, "send", later)
    assert dispatch("run", ["runtime=inprocess", *options]) == 1
    out, err = capfd.readouterr()
    assert f"{tmp_path}/text: the text has changed since the run began; put the earlier" in err
    written = {name: (tmp_path / "run" / name).read_bytes() for name in files(tmp_path / "run")}
    assert {"events.jsonl", "metrics.jsonl", "config.yaml"} <= written.keys()
    told = [out.encode(), err.encode()]
    told += [content for name, content in written.items() if not name.startswith("checkpoints/")]
    assert len(digests) == 2
    for digest in digests:
        assert not any(digest[:8].encode() in content for content in told)


def test_a_client_that_alone_has_other_text_fails_and_the_run_goes_on(tmp_path, monkeypatch):
    """The server prepares its own text again, which is that of the start."""
    check, refused, shards = CommonText._check, [], []

    def other_text_once(texts, job):
        shards.append(job.plan.digests["shards"])
        if not refused:
            refused.append(job.plan.digests["text"])
            raise texts._changed()
        check(texts, job)

    monkeypatch.setattr(CommonText, "_check", other_text_once)
    options = tiny_run(tmp_path)
    summary = run_here(*options)
    assert summary["versions"] == 3 and summary["rejected"] == {"client_error": 1}
    texts = CommonText(compose.load(options))
    assert refused == [text_digest(texts.prepared)]
    assert set(shards) == {shards_digest(texts.shards)}


def test_text_that_goes_while_the_run_starts_is_one_message(tmp_path, monkeypatch, capsys):
    options = tiny_run(tmp_path)
    from fedgpt.flower.runtimes.inprocess import InProcess

    begin = InProcess.start

    def later(self, *arguments):
        """The server and the clients prepare the text after the launcher has."""
        shutil.rmtree(tmp_path / "text" / "ann")
        begin(self, *arguments)

    monkeypatch.setattr(InProcess, "start", later)
    assert dispatch("run", ["runtime=inprocess", *options]) in (1, 2)
    errors = capsys.readouterr().err
    assert "corpus.path=" in errors and "Traceback" not in errors
