import hashlib
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import third_party  # noqa: F401  # makes the module `outsider`
from support.advice import advises
from support.disk import largest_file

import fedgpt
from fedgpt.core.errors import ConfigError, FedGPTError
from fedgpt.core.options import CorpusOptions, TokenizerOptions
from fedgpt.data import prepare as module
from fedgpt.data.corpus import corpus_of, read_documents
from fedgpt.data.prepare import CLIENTS, HELD_OUT, PUBLIC, open_prepared, prepare, split_documents
from fedgpt.data.survey import BY_HASH, key_of
from fedgpt.data.tokenizer import make_tokenizer

BPE = TokenizerOptions(name="bpe", vocab_size=300)
BYTES = TokenizerOptions(name="bytes")


@pytest.fixture
def corpus(tmp_path) -> CorpusOptions:
    """Thirty notes by three people, one note copied by all of them."""
    folder = tmp_path / "text"
    for owner in ("an", "bo", "季"):
        (folder / owner).mkdir(parents=True)
        for number in range(10):
            text = (
                f"笔记第{number}号,写的人是{owner}。\n" * 5
                + f"note {number} of {owner}, kept for later\n" * 5
            )
            text = "the same words in three folders\n" if number == 0 else text
            (folder / owner / f"{number}.txt").write_text(text, encoding="utf-8")
    return CorpusOptions(name="files", client="folder", path=str(folder), public=0.2, held_out=0.2)


def text_of(prepared, document: int) -> str:
    return prepared.tokenizer.decode(
        prepared.tokens[prepared.starts[document] : prepared.starts[document + 1]]
    )


@pytest.mark.parametrize("tokenizer", [BPE, BYTES], ids=["bpe", "bytes"])
def test_tokens_are_the_documents_each_with_its_end(corpus, tokenizer, tmp_path):
    documents = list(read_documents(corpus_of(corpus)))
    prepared = prepare(corpus, tokenizer, tmp_path / "cache")
    assert prepared.tokens.dtype == np.uint16 and isinstance(prepared.tokens, np.memmap)
    assert not prepared.tokens.flags.writeable
    assert len(prepared.starts) == len(documents) + 1 and prepared.starts[-1] == len(
        prepared.tokens
    )
    assert (prepared.tokens[prepared.starts[1:] - 1] == prepared.tokenizer.end).all()
    assert (prepared.tokens == prepared.tokenizer.end).sum() == len(documents)
    for number, document in enumerate(documents):
        assert text_of(prepared, number) == document.text
        assert prepared.bytes[number] == len(document.text.encode())
    assert list(prepared.clients) == [document.client for document in documents]
    assert list(prepared.labels) == [document.label for document in documents]


def test_the_split_keeps_texts_apart_and_covers_all(corpus, tmp_path):
    prepared = prepare(corpus, BPE, tmp_path / "cache")
    texts = [text_of(prepared, number) for number in range(len(prepared.part))]
    parts = {
        text: {int(p) for t, p in zip(texts, prepared.part, strict=True) if t == text}
        for text in texts
    }
    assert all(len(where) == 1 for where in parts.values())
    assert texts.count("the same words in three folders\n") == 3
    assert {int(part) for part in prepared.part} == {PUBLIC, HELD_OUT, CLIENTS}
    split = prepared.manifest["split"]
    assert len(prepared.public()) == split["public"]["tokens"]
    assert len(prepared.held_out()) == split["held_out"]["tokens"]
    assert sum(part["tokens"] for part in split.values()) == len(prepared.tokens)
    assert (
        sum(part["bytes"] for part in split.values())
        == prepared.bytes.sum()
        == prepared.manifest["bytes"]
    )
    held_out = "".join(
        text for text, part in zip(texts, prepared.part, strict=True) if part == HELD_OUT
    )
    assert prepared.tokenizer.decode(prepared.held_out()) == held_out


def test_the_tokenizer_sees_the_public_part_only(corpus, tmp_path, monkeypatch):
    seen = []

    def recording(options, texts):
        seen.extend(texts)
        return make_tokenizer(options, seen)

    monkeypatch.setattr(module, "make_tokenizer", recording)
    prepared = prepare(corpus, BPE, tmp_path / "cache")
    assert seen == [
        text_of(prepared, int(number)) for number in np.flatnonzero(prepared.part == PUBLIC)
    ]


def test_a_corpus_is_prepared_once_and_then_read_from_the_cache(corpus, tmp_path, monkeypatch):
    first = prepare(corpus, BPE, tmp_path / "cache")
    monkeypatch.setattr(module, "_make", lambda *_: pytest.fail("prepared again"))
    second = prepare(corpus, BPE, tmp_path / "cache")
    assert (second.folder, second.digest, second.manifest) == (
        first.folder,
        first.digest,
        first.manifest,
    )
    assert (second.tokens == first.tokens).all()
    assert open_prepared(first.folder).digest == first.digest


def test_the_digest_changes_with_the_content_only(corpus, tmp_path):
    cache = tmp_path / "cache"
    digests = [prepare(corpus, BPE, cache).digest, prepare(corpus, BYTES, cache).digest]
    assert (
        prepare(corpus, TokenizerOptions(name="bytes", vocab_size=999), cache).digest == digests[-1]
    )
    corpus.held_out = 0.3
    digests.append(prepare(corpus, BYTES, cache).digest)
    corpus.client = "file"
    digests.append(prepare(corpus, BYTES, cache).digest)
    note = Path(str(corpus.path)) / "an" / "1.txt"
    note.write_text(note.read_text(encoding="utf-8") + "one line more\n", encoding="utf-8")
    digests.append(prepare(corpus, BYTES, cache).digest)
    assert len(set(digests)) == len(digests)


def test_an_older_cache_entry_of_a_built_in_corpus_stays_valid(tmp_path):
    """An earlier version gave the entry this name, and runs made with that version must find it."""
    for number in range(8):
        (tmp_path / f"{number}.txt").write_text(f"note {number}\n" * 20, encoding="utf-8")
    options = CorpusOptions(
        name="files", client="file", path=str(tmp_path), public=0.2, held_out=0.2
    )
    prepared = prepare(options, BYTES, tmp_path / "cache")
    assert prepared.folder.name == "files-9a1b0ba02ea8309e"
    assert "arguments" not in prepared.manifest
    assert (prepared.manifest["corpus"], prepared.manifest["client"]) == ("files", "file")


def test_a_corpus_from_outside_is_cached_by_its_class_arguments_and_text(tmp_path):
    def entry(**arguments: int):
        options = CorpusOptions(name="custom", _target_="outsider.Poems", arguments=arguments)
        return prepare(options, BYTES, tmp_path, ["outsider"])

    first = entry(stanzas=1)
    assert entry(stanzas=1).folder == first.folder
    assert first.folder.name.startswith("custom-")
    others = {entry(stanzas=2).digest, entry().digest}
    assert len(others | {first.digest}) == 3
    manifest = first.manifest
    assert (manifest["corpus"], manifest["arguments"]) == ("outsider.Poems", {"stanzas": 1})
    assert (manifest["source"], manifest["client"]) == ("outsider.Poems", "author")


def test_a_cache_made_twice_is_the_same_to_the_byte(corpus, tmp_path):
    folders = [prepare(corpus, BPE, tmp_path / name).folder for name in ("one", "two")]
    names = sorted(file.name for file in folders[0].iterdir())
    assert "manifest.json" in names and not any(
        name.endswith((".pkl", ".pickle", ".pt")) for name in names
    )
    for name in names:
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes(), name


CACHED = [f"{name}.npy" for name in ("tokens", "starts", "part", "bytes", "clients", "labels")]
CACHED += ["names.json", "manifest.json", "tokenizer.json", "tokenizer_config.json"]
DAMAGES = {
    "empty": lambda data: b"",
    "a bit": lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:],
    "another type": lambda data: b"[1, 2]",
}


@pytest.mark.parametrize("name", [*CACHED, "SHA256SUMS"])
def test_a_damaged_cache_entry_is_made_again(corpus, tmp_path, name):
    folder = prepare(corpus, BYTES, tmp_path / "cache").folder
    good = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert good.keys() == {*CACHED, "SHA256SUMS"}
    for how, damage in DAMAGES.items():
        (folder / name).write_bytes(damage(good[name]))
        prepare(corpus, BYTES, tmp_path / "cache")
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == good, how
    (folder / name).unlink()
    prepare(corpus, BYTES, tmp_path / "cache")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == good


@pytest.mark.parametrize("size", [0, 100, 1000, 8000])  # the largest file has 15,130 bytes
def test_a_cache_that_cannot_be_written_is_one_error_and_leaves_nothing(corpus, tmp_path, size):
    cache = tmp_path / "cache"
    error = f"cache_dir={cache}: the prepared text cannot be written there.*too large"
    with largest_file(size), pytest.raises(FedGPTError, match=error) as refused:
        prepare(corpus, BYTES, cache)
    advises(refused.value, "make room, or name another folder")
    assert [path for path in cache.iterdir() if path.suffix != ".lock"] == []
    assert prepare(corpus, BYTES, cache).folder.parent == cache


def test_a_cache_below_a_file_is_refused_by_name(corpus, tmp_path):
    cache = tmp_path / "text" / "an" / "1.txt" / "cache"
    with pytest.raises(FedGPTError, match=f"cache_dir={cache}.*Not a directory") as refused:
        prepare(corpus, BYTES, cache)
    advises(refused.value, "cannot be written (Not a directory); name another folder")
    prepare(corpus, BYTES, tmp_path / "another")


def test_temporary_files_of_a_killed_process_are_removed(corpus, tmp_path):
    folder = prepare(corpus, BYTES, tmp_path / "first").folder
    left = tmp_path / "cache" / f".{folder.name}.abc"
    (left / "new").mkdir(parents=True)
    prepare(corpus, BYTES, tmp_path / "cache")
    assert not left.exists()


def test_concurrent_threads_prepare_a_corpus_once(corpus, tmp_path, monkeypatch):
    build, builds, results = module._make, [], []

    def counting(*arguments):
        builds.append(1)
        return build(*arguments)

    monkeypatch.setattr(module, "_make", counting)

    def run():
        results.append(prepare(corpus, BPE, tmp_path / "cache").digest)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(builds) == 1 and len(results) == 4 and len(set(results)) == 1


def test_of_three_concurrent_processes_one_makes_the_cache_entry(corpus, tmp_path):
    script = (
        "import sys\n"
        "from fedgpt.core.options import CorpusOptions, TokenizerOptions\n"
        "from fedgpt.data import prepare as module\n"
        "make = module._make\n"
        "module._make = lambda *arguments: (print('made'), make(*arguments))[1]\n"
        "sys.stdin.readline()\n"  # all are imported before any starts
        f"corpus = CorpusOptions(name='files', client='folder', path={corpus.path!r}, public=0.2,"
        " held_out=0.2)\n"
        "prepared = module.prepare(corpus, TokenizerOptions(vocab_size=300),"
        f" {str(tmp_path / 'cache')!r})\n"
        "print(prepared.folder, prepared.tokens.sum())\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(fedgpt.__file__).parents[1])}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [
        subprocess.Popen([sys.executable, "-c", script], env=environment, **pipes) for _ in range(3)
    ]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    answers = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert sorted(answer.startswith("made\n") for answer in answers) == [False, False, True]
    assert len({answer.removeprefix("made\n") for answer in answers}) == 1
    (entry,) = [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    alone = prepare(corpus, TokenizerOptions(vocab_size=300), tmp_path / "alone").folder
    for path in alone.iterdir():
        assert (entry / path.name).read_bytes() == path.read_bytes(), path.name


def test_waiting_for_the_lock_has_a_time_limit(corpus, tmp_path, monkeypatch):
    from filelock import FileLock

    folder = prepare(corpus, BYTES, tmp_path / "cache").folder
    (folder / "manifest.json").unlink()
    monkeypatch.setattr(module, "LOCK_SECONDS", 0.05)
    with (
        FileLock(f"{folder}.lock"),
        pytest.raises(FedGPTError, match="another process that prepares this corpus"),
    ):
        prepare(corpus, BYTES, tmp_path / "cache")


def test_the_error_for_too_little_text_names_the_empty_part(tmp_path):
    (tmp_path / "one.txt").write_text("one document\n")
    options = CorpusOptions(name="files", client="file", path=str(tmp_path))
    with pytest.raises(
        ConfigError,
        match=r"1 documents are too few, the held-out part is empty.*corpus\.document_bytes",
    ):
        prepare(options, BYTES, tmp_path / "cache")
    options.public = 0.0
    with pytest.raises(ConfigError, match=r"corpus\.public=0\.0.*tokenizer=bytes"):
        prepare(options, BPE, tmp_path / "cache")
    with pytest.raises(
        ConfigError, match=r"2 problems[\s\S]*corpus\.client=x[\s\S]*tokenizer\.vocab_size=3"
    ):
        prepare(CorpusOptions(client="x"), TokenizerOptions(vocab_size=3), tmp_path / "cache")


def test_the_standard_library_is_prepared(tmp_path):
    prepared = prepare(CorpusOptions(name="stdlib", client="package"), BYTES, tmp_path)
    split = {
        name: part["bytes"] / prepared.manifest["bytes"]
        for name, part in prepared.manifest["split"].items()
    }
    assert 0.08 <= split["public"] < 0.2 and 0.05 <= split["held_out"] < 0.2
    assert prepared.manifest["source"].startswith("Python 3.")
    json.dumps(prepared.manifest)


def split(texts: list[str], public: float, held_out: float) -> np.ndarray:
    keys = [key_of(hashlib.sha256(text.encode()).digest()) for text in texts]
    sizes = np.array([len(text.encode()) for text in texts])
    shares = {PUBLIC: public, HELD_OUT: held_out}
    named = np.full(len(texts), BY_HASH, np.int8)
    return split_documents(np.array(keys, np.uint64), sizes, shares, named)


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.text(min_size=1, max_size=20), min_size=1, max_size=40),
    st.floats(0, 0.5),
    st.floats(0.01, 0.45),
    st.randoms(use_true_random=False),
)
def test_the_split_depends_on_texts_alone(texts, public, held_out, random):
    part = split(texts, public, held_out)
    where = dict(zip(texts, part, strict=True))
    shuffled = random.sample(texts, len(texts))
    assert [where[text] for text in shuffled] == list(split(shuffled, public, held_out))
    sizes = np.array([len(text.encode()) for text in texts])
    last = {hashlib.sha256(text.encode()).digest(): int(where[text]) for text in texts}
    # parts are ranges in the order of hashes
    assert [last[key] for key in sorted(last)] == sorted(last.values())
    if public > 0:
        assert sizes[part == PUBLIC].sum() >= public * sizes.sum()


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.sampled_from([f"{word} " * length for word in "abc" for length in range(9)])),
    st.floats(0, 0.6),
    st.floats(0, 0.6),
)
def test_each_part_is_filled_up_to_its_share(texts, public, held_out):
    """A slow reference: texts are assigned one by one, in the order of their hashes."""
    total = sum(len(text) for text in texts)
    filled = [0, 0, 0]
    expected = {}
    for text in sorted(set(texts), key=lambda text: hashlib.sha256(text.encode()).digest()):
        public_is_full = filled[PUBLIC] >= public * total
        held_out_is_full = filled[HELD_OUT] >= held_out * total
        part = (CLIENTS if held_out_is_full else HELD_OUT) if public_is_full else PUBLIC
        expected[text] = part
        filled[part] += texts.count(text) * len(text)
    assert split(texts, public, held_out).tolist() == [expected[text] for text in texts]
