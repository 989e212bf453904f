"""Damaged files in a run's folder: an error that names the file, or a recovery with a warning."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from support.advice import advises
from support.here import run_here, tiny_run
from support.world import without_notices

import fedgpt
from fedgpt import assemble
from fedgpt.cli import dispatch
from fedgpt.core.errors import FedGPTError
from fedgpt.core.faults import Injected, injected
from fedgpt.core.score import LANGUAGE
from fedgpt.storage.records import check_records, refuse_other_records
from fedgpt.storage.run_folder import RunFolder

FILES = [
    "config.yaml",
    "metrics.jsonl",
    "events.jsonl",
    "tokenizer/tokenizer.json",
    "checkpoints/version-00000002.safetensors",
    "checkpoints/version-00000002.sha256",
    "checkpoints/best.safetensors",
    "checkpoints/starts.json",
    "wal/version-00000002.log",
]


def flipped(data: bytes, number: int) -> bytes:
    draw = random.Random(number)
    changed = bytearray(data)
    changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "cut": lambda data: data[: len(data) // 2],
    "cut at its end": lambda data: data[:-1],
    "zeros": lambda data: bytes(len(data)),
    "a list": lambda data: b"[1, 2]\n",
    "a number": lambda data: b"7\n",
    "null": lambda data: b"null\n",
    "nested": lambda data: data + b"[" * 100_000 + b"\n",
    "another encoding": lambda data: b"\xff\xfe" + data,
    **{f"flip {n}": (lambda data, n=n: flipped(data, n)) for n in range(3)},
}
NO_FILES: dict[str, Callable[[Path], object]] = {
    "a folder": lambda path: (path.mkdir(), (path / "kept").write_text("kept")),
    "a link to nothing": lambda path: path.symlink_to("nowhere"),
}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> Path:
    """A run that ended at version 2 of 3, with a journal."""
    folder = tmp_path_factory.mktemp("damaged")
    words = [*tiny_run(folder), "tokenizer=bpe", "tokenizer.vocab_size=270"]
    words += ["checkpoint.every=1", "checkpoint.journal=true"]
    with injected("aggregate:3:raise"), pytest.raises(Injected):
        run_here(*words)
    return folder / "run"


def test_a_changed_option_is_named_before_the_text_is_read_with_it(stopped, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(stopped, copy)
    config = copy / "config.yaml"
    config.write_text(config.read_text().replace("client: folder", "client: writer"))
    with pytest.raises(
        FedGPTError, match=r"cannot be continued: its config\.yaml was changed"
    ) as e:
        fedgpt.run(f"resume={copy}")
    assert "corpus.client: folder -> writer" in str(e.value)


@pytest.fixture(scope="module")
def finished(stopped, tmp_path_factory) -> Path:
    """The same run at its end, without a damage."""
    copy = tmp_path_factory.mktemp("whole") / "run"
    shutil.copytree(stopped, copy)
    fedgpt.run(f"resume={copy}")
    return copy


@pytest.fixture(scope="module")
def whole(finished) -> str:
    """The weights of the run without a damage."""
    return fedgpt.open_run(finished).summary["weights_sha256"]


def damaged(stopped: Path, folder: Path, file: str, how: str) -> Path:
    copy = folder / "run"
    shutil.copytree(stopped, copy)
    path = copy / file
    data = path.read_bytes() if path.exists() else b'{"version": 2, "starts": 1}'
    if how in NO_FILES:
        path.unlink(missing_ok=True)
        NO_FILES[how](path)
    else:
        path.write_bytes(DAMAGES[how](data))
    return copy


@pytest.mark.parametrize("how", [*DAMAGES, *NO_FILES])
@pytest.mark.parametrize("file", FILES)
def test_a_reader_of_a_damaged_folder_gets_an_error_or_what_was_there(
    stopped, tmp_path, file, how, caplog
):
    expected = fedgpt.open_run(stopped)
    copy = damaged(stopped, tmp_path, file, how)
    original = (stopped / file).read_bytes() if (stopped / file).exists() else b""
    before = {p: p.read_bytes() for p in copy.rglob("*") if p.is_file()}
    if (copy / "config.yaml").is_file():
        assert repr(fedgpt.open_run(copy)).startswith(f"<Run {copy}: ")
    try:
        opened = fedgpt.open_run(copy)
        digest, model = opened.tokenizer.digest, opened.model
    except FedGPTError as error:
        assert str(copy) in str(error)
    else:
        assert digest == expected.tokenizer.digest
        assert sum(p.numel() for p in model.parameters()) > 0
        # a digest without its line end is the same digest
        same = (copy / file).is_file() and (copy / file).read_bytes().strip() == original.strip()
        if Path(file).name.startswith("version-") and file.startswith("checkpoints") and not same:
            assert Path(file).stem in caplog.text, "a warning says that an older checkpoint is used"
    assert {p: p.read_bytes() for p in copy.rglob("*") if p.is_file()} == before


def test_a_stopped_run_without_a_checkpoint_has_a_summary_and_a_model_when_it_is_continued(
    stopped, whole, tmp_path
):
    copy = tmp_path / "run"
    shutil.copytree(stopped, copy)
    with pytest.raises(FedGPTError) as refused:
        _ = fedgpt.open_run(copy).summary
    advises(refused.value, f"finish it with: fedgpt run resume={copy}")
    for path in (copy / "checkpoints").glob("version-*"):
        path.unlink()
    with pytest.raises(FedGPTError) as refused:
        _ = fedgpt.open_run(copy).model
    advises(refused.value, f"continue it with: fedgpt run resume={copy}")
    fedgpt.run(f"resume={copy}")
    assert fedgpt.open_run(copy).summary["weights_sha256"] == whole
    assert fedgpt.open_run(copy).model


@pytest.mark.parametrize(("old", "new"), [("n_head: 2", "n_head: 4"), ("lr: 0.003", "lr: 0.002")])
def test_a_changed_config_is_refused_and_what_the_message_advises_helps(
    stopped, whole, tmp_path, old, new
):
    copy = tmp_path / "run"
    shutil.copytree(stopped, copy)
    text = (copy / "config.yaml").read_text()
    assert old in text
    (copy / "config.yaml").write_text(text.replace(old, new, 1))
    with pytest.raises(FedGPTError) as refused:
        fedgpt.run(f"resume={copy}")
    advises(refused.value, "change it back, or start again with another run_dir")
    if "head" in old:
        with pytest.raises(FedGPTError) as refused:
            _ = fedgpt.open_run(copy).model
        advises(refused.value, "restore that file")
    (copy / "config.yaml").write_text(text)
    assert fedgpt.open_run(copy).model
    assert fedgpt.run(f"resume={copy}").summary["weights_sha256"] == whole


def test_a_damaged_summary_is_an_error_and_written_again(finished, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    path, expected = copy / "summary.json", fedgpt.open_run(finished).summary
    for how, damage in DAMAGES.items():
        path.write_bytes(damage((finished / "summary.json").read_bytes()))
        if how == "cut at its end" or how.startswith("flip"):  # may be JSON
            continue
        with pytest.raises(FedGPTError, match=rf"{path} is (damaged|empty)") as refused:
            _ = fedgpt.open_run(copy).summary
        advises(refused.value, f"write it again: fedgpt run resume={copy}")
        assert repr(fedgpt.open_run(copy)).startswith(f"<Run {copy}: at version 3, ")
    assert fedgpt.run(f"resume={copy}").summary.keys() == expected.keys()


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ("checkpoints/version-*.safetensors", []),
        ("checkpoints/best.safetensors", ["--best"]),
    ],
)
@pytest.mark.parametrize("how", ["cut", "zeros", "a list", "another encoding"])
def test_generate_with_a_damaged_file_is_one_message(finished, tmp_path, capsys, files, words, how):
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    for path in copy.glob(files):
        path.write_bytes(DAMAGES[how](path.read_bytes()))
    assert dispatch("generate", [str(copy), "--tokens", "2", *words]) in (1, 2)
    out, errors = capsys.readouterr()
    *warnings, error = without_notices(errors).splitlines()
    assert not out and error.startswith("fedgpt: ") and str(copy) in error
    assert all(line.startswith("fedgpt: checkpoint version-") for line in warnings)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("n_head: 2", "n_head: 4", "n_head: 2 -> 4"),
        ("gelu: exact", "gelu: tanh", "gelu: exact -> tanh"),
        ("  n_head: 2\n", "", "n_head: 2 -> 4"),
        ("n_embd: 16", "n_embd: 32", "n_embd: 16 -> 32"),
        ("model:\n", "", "model"),
        ("seed: 0", "seed: [", "config.yaml"),
    ],
)
@pytest.mark.parametrize("words", [[], ["--best"]], ids=["newest", "best"])
def test_a_changed_model_in_the_configuration_is_refused(
    finished, tmp_path, capsys, old, new, message, words
):
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    text = (copy / "config.yaml").read_text()
    assert old in text
    (copy / "config.yaml").write_text(text.replace(old, new))
    assert dispatch("generate", [str(copy), "--tokens", "2", *words]) in (1, 2)
    out, errors = capsys.readouterr()
    assert not out and f"{copy}/config.yaml" in errors and message in errors


@pytest.mark.parametrize(
    ("file", "line", "name"), [("metrics.jsonl", 1, "bits_per_byte"), ("events.jsonl", 3, "tokens")]
)
def test_a_damaged_record_is_refused_by_name_and_without_the_line_the_run_ends(
    stopped, whole, tmp_path, file, line, name
):
    copy = tmp_path / "run"
    shutil.copytree(stopped, copy)
    path = copy / file
    records = path.read_text().splitlines(keepends=True)
    changed = records[line - 1].replace(f'"{name}"', f'"{name[:-1]}_"')
    assert changed != records[line - 1]
    path.write_text("".join([*records[: line - 1], changed, *records[line:]]))
    before = {p: p.read_bytes() for p in copy.rglob("*") if p.is_file()}
    with pytest.raises(FedGPTError) as refused:
        fedgpt.run(f"resume={copy}")
    assert f"{path}: line {line} is damaged (it has no '{name}')" in str(refused.value)
    advises(refused.value, f"delete that line, and continue with: fedgpt run resume={copy}")
    assert {p: p.read_bytes() for p in copy.rglob("*") if p.is_file()} == before
    path.write_text("".join([*records[: line - 1], *records[line:]]))
    assert fedgpt.run(f"resume={copy}").summary["weights_sha256"] == whole


WRONG: dict[str, Callable[[dict, str], dict]] = {
    "renamed": lambda record, name: {k if k != name else f"{k}_": v for k, v in record.items()},
    "a text": lambda record, name: {**record, name: "x"},
    "a list": lambda record, name: {**record, name: [1]},
    "a mapping": lambda record, name: {**record, name: {" ": "x"}},
}


@pytest.mark.parametrize("how", WRONG)
def test_a_record_that_is_not_refused_makes_no_result_fail(stopped, whole, tmp_path, how):
    """Each field of a line, and of an event of each kind, is damaged; then all that pass, at
    once.
    """
    copy = tmp_path / "run"
    shutil.copytree(stopped, copy)
    passed: set[tuple[str, str]] = set()
    with RunFolder(copy) as folder:
        lines, events = folder.metrics.read(), folder.events.read()
        newest = dict(lines[2])  # as the checkpoint has it
        kinds = [event["event"] for event in events]
        damaged = [(lines, 1), *((events, kinds.index(kind)) for kind in sorted(set(kinds)))]
        for records, at in damaged:
            for name in [name for name in records[at] if name not in ("version", "event")]:
                kind, undamaged = records[at].get("event", "line"), records[at]
                records[at] = WRONG[how](undamaged, name)
                try:
                    check_records(folder, lines, events, LANGUAGE.names)
                    refuse_other_records(folder, newest, lines, events)
                    passed.add((kind, name))
                except FedGPTError:
                    records[at] = undamaged
        folder.metrics.keep(lines)
        folder.events.keep(events)
    assert ("accept", "staleness") in passed, "no result needs it"
    assert not {("line", "tokens"), ("line", "loss"), ("accept", "seconds")} & passed
    assert fedgpt.run(f"resume={copy}").summary["weights_sha256"] == whole


def test_a_fault_of_the_program_is_not_blamed_on_a_record(finished, tmp_path, monkeypatch):
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)

    def failing(*_: object) -> None:
        raise KeyError("loss")

    monkeypatch.setattr(assemble, "write_results", failing)
    with pytest.raises(KeyError, match="loss"):
        fedgpt.run(f"resume={copy}")


@pytest.mark.parametrize("left", [slice(0, 1), slice(1, None), slice(0, 0)])
def test_lines_that_are_gone_are_reported_and_change_no_weights(
    stopped, whole, tmp_path, caplog, left
):
    copy = tmp_path / "copy"
    shutil.copytree(stopped, copy)
    lines = (copy / "metrics.jsonl").read_text().splitlines(keepends=True)[:2]
    (copy / "metrics.jsonl").write_text("".join(lines[left]))
    assert fedgpt.run(f"resume={copy}").summary["weights_sha256"] == whole
    assert f"metrics.jsonl has {len(lines[left])} of the 2 lines before version 2" in caplog.text


def test_records_that_are_a_folder_are_an_error(stopped, tmp_path):
    copy = damaged(stopped, tmp_path, "metrics.jsonl", "a folder")
    with pytest.raises(FedGPTError, match=rf"{copy}/metrics.jsonl cannot be read: Is a directory"):
        _ = fedgpt.open_run(copy).metrics


@pytest.mark.parametrize(
    "file", ["checkpoints/version-00000002.sha256", "checkpoints/best.safetensors"]
)
def test_a_folder_in_place_of_a_file_is_one_message_and_is_kept(stopped, whole, tmp_path, file):
    copy = damaged(stopped, tmp_path, file, "a folder")
    with pytest.raises(FedGPTError, match=rf"{file}'?; remove the cause") as refused:
        fedgpt.run(f"resume={copy}")
    advises(refused.value, "remove the cause")
    advises(refused.value, f"; continue with: fedgpt run resume={copy}".replace("; ", " and "))
    assert (copy / file / "kept").read_text() == "kept"
    shutil.rmtree(copy / file)
    assert fedgpt.run(f"resume={copy}").summary["weights_sha256"] == whole


@pytest.mark.long
@pytest.mark.parametrize("how", [*DAMAGES, *NO_FILES])
@pytest.mark.parametrize("file", FILES)
def test_a_resume_in_a_damaged_folder_is_an_error_or_has_the_same_bits(
    stopped, whole, tmp_path, file, how
):
    copy = damaged(stopped, tmp_path, file, how)
    try:
        weights = fedgpt.run(f"resume={copy}").summary["weights_sha256"]
    except FedGPTError as error:
        assert str(copy) in str(error)
    else:
        # a changed number in config.yaml is found by comparing it with the checkpoint
        assert weights == whole
