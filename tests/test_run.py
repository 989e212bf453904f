"""Whole runs on the pool, in processes of their own: what they leave behind, and what a stopped one becomes."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fedgpt.core.files import sha256_of
from fedgpt.engine.checkpoint import Checkpoints
from fedgpt.engine.run_folder import read_lines

LONG = 180.0  # seconds; bounds every wait, none is expected to come near
WRITERS = ("ann", "bob", "eve")
PARAMETERS = 7_424  # of a model that is trained in no time
ROUNDS = 6  # of the run that is stopped in different ways


@dataclass(frozen=True)
class World:
    """A folder with text, and an environment by which all of our processes are known."""

    root: Path
    env: dict[str, str]
    options: list[str]

    def fedgpt(self, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "fedgpt", *arguments]
        done = subprocess.run(
            command, capture_output=True, text=True, env=self.env, cwd=self.root, timeout=LONG, check=False
        )
        assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr, done.stderr
        return done

    def python(self, script: str) -> dict[str, Any]:
        """Run a script that fills the dictionary `told`; returns it."""
        answer = self.root / f"{uuid.uuid4().hex}.json"
        here = f"import sys\nsys.path.append({str(Path(__file__).parent)!r})\nfrom flower.here import run_here\n"
        whole = (
            f"import json, fedgpt\nfrom pathlib import Path\n{here}OPTIONS = {self.options!r}\ntold = {{}}\n{script}\n"
        )
        whole += f"open({str(answer)!r}, 'w').write(json.dumps(told))\n"
        subprocess.run(
            [sys.executable, "-c", whole], env=self.env, cwd=self.root, timeout=LONG, check=True, stdout=subprocess.PIPE
        )
        return json.loads(answer.read_text())

    def processes(self) -> list[int]:
        """Ids of all living processes that we started, however indirectly."""
        mark = f"FEDGPT_TEST_MARK={self.env['FEDGPT_TEST_MARK']}".encode()
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                if mark in path.read_bytes().split(b"\0"):
                    found.append(int(path.parent.name))
            except OSError:  # gone, or not ours
                pass
        return found


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    root = tmp_path_factory.mktemp("world")
    for writer in WRITERS:
        (root / "text" / writer).mkdir(parents=True)
        for page in range(6):
            lines = (f"{writer} wrote on page {page}, line {n}: the river rose and fell again." for n in range(12))
            (root / "text" / writer / f"{page}.txt").write_text("\n".join(lines))
    env = os.environ | {
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_HOME": str(root / "flwr"),
        "FEDGPT_CACHE": str(root / "cache"),
        "FEDGPT_TEST_MARK": uuid.uuid4().hex,
        "OMP_NUM_THREADS": "1",
    }
    options = [
        "corpus=files", "corpus.client=folder", f"corpus.path={root / 'text'}", "corpus.public=0.2",
        "corpus.held_out=0.2", "tokenizer=bytes", "model.n_layer=1", "model.n_embd=16", "model.n_head=2",
        "model.block_size=16", "local.steps=2", "local.batch_size=2", "rounds=2", "seed=11", "runtime.threads=1",
        "local.precision=fp32", "evaluate.sample_tokens=8", "evaluate.prompt=The river",
    ]  # fmt: skip
    return World(root, env, options)


def wait_until(condition: Callable[[], bool], seconds: float = LONG) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


def shared_memory() -> set[str]:
    return {path.name for path in Path("/dev/shm").iterdir()} if Path("/dev/shm").is_dir() else set()


@pytest.fixture(autouse=True)
def nothing_is_left(world):
    """Neither a process nor a name in /dev/shm, whatever a test did to its run."""
    before = shared_memory()
    yield
    wait_until(lambda: not world.processes(), 30)
    wait_until(lambda: shared_memory() <= before, 30)


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


def untimed(folder: Path) -> list[dict[str, Any]]:
    timed = {"wall_seconds", "idle_share"}
    return [{k: v for k, v in r.items() if k not in timed} for r in read_lines(folder / "metrics.jsonl")]


# ---- one run to its end


@dataclass(frozen=True)
class Finished:
    """A run as it was at its end, whatever was done to its folder later."""

    folder: Path
    out: str
    summary: dict[str, Any]
    records: list[dict[str, Any]]
    files: dict[str, str]  # name -> sha256


@pytest.fixture(scope="module")
def finished(world) -> Finished:
    folder = world.root / "finished"
    done = world.fedgpt("run", *world.options, f"run_dir={folder}", "runtime.workers=2")
    assert done.stderr == ""
    content = {name: sha256_of(folder / name) for name in files(folder)}
    return Finished(folder, done.stdout, summary(folder), untimed(folder), content)


@pytest.fixture(scope="module")
def told(world, finished) -> dict[str, Any]:
    """What the Python API does in one process: several runs, one after the other."""
    return world.python(f"""
from fedgpt.core.errors import FedGPTError
alone = fedgpt.run(*OPTIONS, "run_dir=alone", "runtime.workers=1")
told["alone"], told["folder"] = alone.summary, str(alone.folder)
told["reset"] = fedgpt.run(*OPTIONS, "run_dir=reset", "runtime.workers=1", "local.moments=reset").summary
told["repeated"] = fedgpt.run(*OPTIONS, "run_dir=finished", "runtime.workers=1").summary
told["whole"] = fedgpt.run(*OPTIONS, *{STOPPED!r}, "run_dir=whole").summary
try:
    fedgpt.run(*OPTIONS, "run_dir=finished", "runtime.workers=1", "seed=12", "local.lr=0.001")
except FedGPTError as error:
    told["refused"] = str(error)
opened = fedgpt.open_run("finished")
told["opened"], told["metrics"] = opened.summary, opened.metrics
told["texts"] = opened.generate("The river", tokens=12, samples=2, seed=3)
told["again"] = opened.generate("The river", tokens=12, samples=2, seed=3)
told["other"] = opened.generate("The river", tokens=12, samples=2, seed=4)
told["empty"] = opened.generate("", tokens=3)
try:
    fedgpt.open_run("text")
except FedGPTError as error:
    told["no run"] = str(error)
""")


STOPPED = [  # long enough rounds for a signal to meet one, and a strategy and clients that remember
    f"rounds={ROUNDS}", "local.steps=30", "strategy=fedadam", "local.moments=keep", "checkpoint.every=2",
    "runtime.workers=1",
]  # fmt: skip


def test_a_run_leaves_exactly_the_documented_files(finished):
    folder = finished.folder
    (run,) = (folder / "clients").iterdir()
    assert finished.files.keys() == {
        ".lock", "config.yaml", "command.txt", "environment.json", "metrics.jsonl",
        "events.jsonl", "summary.json", "samples.md",
        "figures/loss.png", "figures/timeline.png", "figures/updates.png",
        "model/config.json", "model/model.safetensors", "model/tokenizer.json",
        "model/tokenizer_config.json", "model/README.md", "checkpoints/best.safetensors",
        *(f"checkpoints/version-0000000{v}.{end}" for v in (1, 2) for end in ("safetensors", "sha256")),
        *(f"clients/{run.name}/{writer}/task-{task}.safetensors" for writer in WRITERS for task in (0, 1)),
    }  # fmt: skip


def test_every_version_is_a_line_of_metrics(finished):
    records = list(read_lines(finished.folder / "metrics.jsonl"))
    assert [r["version"] for r in records] == [0, 1, 2]
    tokens = len(WRITERS) * 2 * 2 * 16
    for r in records:
        assert {
            "version", "tokens", "wall_seconds", "bytes_up", "bytes_down", "accepted", "rejected", "staleness",
            "train_loss", "lr", "update_norm", "step_norm", "loss", "perplexity", "bits_per_byte",
        } <= r.keys()  # fmt: skip
        assert r["tokens"] == tokens * r["version"]
        assert r["perplexity"] == pytest.approx(math.exp(r["loss"]))
        assert r["rejected"] == {} and r["state_lost"] == 0
    for r in records[1:]:
        assert r["accepted"] == 3 and r["staleness"] == {"0": 3} and 0 < r["step_norm"] <= r["update_norm"]
        vector = 4 * PARAMETERS
        assert 3 * vector < r["bytes_up"] / r["version"] < 3 * vector + 3000
        assert 3 * vector < r["bytes_down"] / r["version"] < 3 * vector + 3000
    assert records[2]["loss"] < records[0]["loss"] - 0.01, "it learned"


def test_the_summary_has_its_keys_and_agrees_with_metrics_and_checkpoint(finished):
    folder = finished.folder
    told, records = summary(folder), list(read_lines(folder / "metrics.jsonl"))
    assert told.keys() == {
        "versions", "tokens", "wall_seconds", "virtual_seconds", "bytes_up", "bytes_down", "initial", "final", "best",
        "weights_sha256", "rejected", "epsilon", "delta", "private",
    }  # fmt: skip
    assert told["versions"] == 2 and told["tokens"] == records[-1]["tokens"] and told["wall_seconds"] > 0
    for name, record in (
        ("initial", records[0]),
        ("final", records[2]),
        ("best", min(records, key=lambda r: r["loss"])),
    ):
        assert told[name] == {key: record[key] for key in ("version", "loss", "perplexity", "bits_per_byte")}
    assert (told["virtual_seconds"], told["epsilon"], told["delta"], told["rejected"]) == (None, None, None, {})
    snapshot = Checkpoints(folder / "checkpoints", 2).load()
    assert snapshot.state.version == 2
    assert hashlib.sha256(snapshot.state.params.tobytes()).hexdigest() == told["weights_sha256"]
    assert snapshot.state.params.size == PARAMETERS


def test_what_bit_identity_depends_on_is_recorded(finished):
    environment = Checkpoints(finished.folder / "checkpoints", 2).load().ledgers.environment
    assert environment.keys() == {"fedgpt", "torch", "flwr", "numpy", "python", "device", "dtype", "threads", "cpu"}
    assert (environment["threads"], environment["dtype"], environment["device"]) == (1, "fp32", "cpu")
    assert json.loads((finished.folder / "environment.json").read_text()) == environment
    assert "threads: 1" in (finished.folder / "config.yaml").read_text()


def test_the_command_is_kept_as_a_shell_takes_it(finished, world):
    words = shlex.split((finished.folder / "command.txt").read_text())
    assert words[:2] == ["fedgpt", "run"] and set(world.options) < set(words)


def test_events_tell_who_was_asked_and_who_answered(finished):
    events = list(read_lines(finished.folder / "events.jsonl"))
    for kind in ("dispatch", "accept"):
        named = {(e["client"], e["task"], e["version"]) for e in events if e["event"] == kind}
        assert named == {(writer, version, version) for writer in WRITERS for version in (0, 1)}
    assert [e["version"] for e in events if e["event"] == "version"] == [1, 2]
    seconds = [e["seconds"] for e in events]
    assert seconds == sorted(seconds)


def test_samples_and_figure_are_of_this_run(finished):
    folder, out = finished.folder, finished.out
    page = (folder / "samples.md").read_text(encoding="utf-8")
    assert [line.split(":")[0] for line in page.splitlines() if line.startswith("## ")] == [
        "## Version 0", "## Version 1", "## Version 2",
    ]  # fmt: skip
    assert page.count("```text\nThe river") == 3
    import matplotlib.image

    assert matplotlib.image.imread(folder / "figures" / "loss.png").std() > 0
    assert "version 0/2" in out and "version 2/2" in out and "2 workers x 1 thread" in out
    assert f"sha256 {summary(folder)['weights_sha256'][:16]}" in out and f"fedgpt generate {folder}" in out


def test_transformers_loads_the_model_and_computes_the_same(finished):
    transformers = pytest.importorskip("transformers")
    import torch

    from fedgpt.api import open_run

    ours = open_run(finished.folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        finished.folder / "model", local_files_only=True, dtype=torch.float32
    ).eval()
    ids = torch.tensor([ours.tokenizer.encode("The river rose").tolist()])
    with torch.no_grad():
        torch.testing.assert_close(ours.model(ids), theirs(ids).logits, rtol=1e-5, atol=1e-5)
    tokenizer = transformers.AutoTokenizer.from_pretrained(finished.folder / "model", local_files_only=True)
    assert tokenizer("The river rose")["input_ids"] == ids[0].tolist()


# ---- the same through Python


def test_the_number_of_workers_changes_no_bit(finished, told, world):
    assert told["alone"] | {"wall_seconds": 0} == finished.summary | {"wall_seconds": 0}
    assert untimed(Path(told["folder"])) == finished.records
    assert told["folder"] == str(world.root / "alone")


def test_a_finished_run_started_again_is_the_same_run(finished, told):
    assert told["repeated"] | {"wall_seconds": 0} == finished.summary | {"wall_seconds": 0}
    assert untimed(finished.folder) == finished.records
    now = {name: sha256_of(finished.folder / name) for name in files(finished.folder) if name != "failure.json"}
    assert now.keys() == finished.files.keys()
    assert {name for name, digest in now.items() if finished.files[name] != digest} <= {
        "summary.json", "metrics.jsonl", "figures/loss.png",
    }, "beside clocks, every byte is as it was"  # fmt: skip


def test_moments_that_stay_at_the_client_matter(told):
    assert told["reset"]["weights_sha256"] != told["alone"]["weights_sha256"]
    assert told["reset"]["initial"] == told["alone"]["initial"]
    assert math.isfinite(told["reset"]["final"]["loss"])


def test_another_configuration_in_the_folder_is_refused_by_name(finished, told):
    assert f"run_dir={finished.folder}: holds another run, which differs in local.lr, seed" in told["refused"]
    assert f"fedgpt run resume={finished.folder}" in told["refused"]
    assert told["opened"] == told["repeated"], "nothing in the folder changed"


def test_a_refusal_leaves_no_file_in_the_other_runs_folder(finished, told):
    assert not (finished.folder / "failure.json").exists()


def test_a_run_is_opened_and_writes_text(told, finished):
    assert told["opened"]["final"].items() <= told["metrics"][-1].items()
    assert [r["version"] for r in told["metrics"]] == [0, 1, 2]
    assert told["texts"] == told["again"] != told["other"]
    assert len(told["texts"]) == 2 and all(0 < len(text) <= 12 for text in told["texts"])
    assert len(told["empty"]) == 1
    assert "is not a run's folder" in told["no run"]


def test_generate_prints_the_prompt_and_is_seeded(world, finished, told):
    arguments = ["--prompt", "The river", "--tokens", "12", "--samples", "2", "--seed", "3"]
    done = world.fedgpt("generate", str(finished.folder), *arguments)
    first, second = (f"The river{text}" for text in told["texts"])
    assert done.stdout == f"{first}\n{'-' * 40}\n{second}\n"


def test_the_best_weights_can_be_opened_and_written_with(world, finished):
    """This run only got better, so its best weights are its newest."""
    arguments = ["--prompt", "The river", "--tokens", "8", "--seed", "3"]
    newest = world.fedgpt("generate", str(finished.folder), *arguments)
    assert world.fedgpt("generate", str(finished.folder), *arguments, "--best").stdout == newest.stdout
    bare = world.root / "bare"
    shutil.copytree(finished.folder, bare)
    (bare / "checkpoints" / "best.safetensors").unlink()
    assert "has no best weights" in world.fedgpt("generate", str(bare), *arguments, "--best", code=1).stderr


# ---- runs that are stopped


def stop(world: World, arguments: list[str], folder: Path, version: int, how: Callable[[int], None]) -> tuple[int, str]:
    """Start a run, call `how` with its process id once the jobs of `version` are out; (exit code, stderr)."""
    with (world.root / "stderr").open("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "fedgpt", "run", *arguments],
            env=world.env, cwd=world.root, stdout=subprocess.DEVNULL, stderr=errors, start_new_session=True,
        )  # fmt: skip
        try:

            def dispatched() -> bool:
                assert process.poll() is None, "the run ended before it could be stopped"
                events = read_lines(folder / "events.jsonl")
                return any(e["event"] == "dispatch" and e["version"] == version for e in events)

            wait_until(dispatched)
            how(process.pid)
            process.wait(60)
        finally:
            process.kill()
            process.wait(60)
        errors.seek(0)
        return process.returncode, errors.read()


def assert_like_the_whole(world: World, folder: Path, told: dict[str, Any]) -> None:
    """Every number of the stopped run is that of the run that was never stopped."""
    whole, resumed = told["whole"], summary(folder)
    assert resumed["weights_sha256"] == whole["weights_sha256"]
    assert {**resumed, "wall_seconds": 0} == {**whole, "wall_seconds": 0}
    assert untimed(folder) == untimed(world.root / "whole")
    assert [r["state_lost"] for r in untimed(folder)] == [0] * (ROUNDS + 1)


def test_killed_resumed_terminated_and_resumed_is_the_same_run(world, told):
    """kill -9 loses a version and a half (a checkpoint every second version), SIGTERM loses a round."""
    folder = world.root / "killed"
    start = [*world.options, *STOPPED, f"run_dir={folder}"]
    code, _ = stop(world, start, folder, 3, lambda pid: os.kill(pid, signal.SIGKILL))
    assert code == -signal.SIGKILL
    wait_until(lambda: not world.processes(), 30)
    assert not (folder / "summary.json").exists()
    assert Checkpoints(folder / "checkpoints", 2).load().state.version in (0, 2)

    code, errors = stop(world, [f"resume={folder}"], folder, 4, lambda pid: os.kill(pid, signal.SIGTERM))
    assert code == 130 and "Traceback" not in errors
    assert errors == f"fedgpt: interrupted; continue with: fedgpt run resume={folder}\n"
    assert Checkpoints(folder / "checkpoints", 2).load().state.version == 4
    assert not (folder / "summary.json").exists()

    words = shlex.split(errors.rpartition("fedgpt run ")[2])
    done = world.fedgpt("run", *words)
    assert f"from version 4 of {ROUNDS}" in done.stdout and done.stderr == ""
    assert_like_the_whole(world, folder, told)


@pytest.mark.slow
@pytest.mark.parametrize(
    "number, version",
    [(signal.SIGINT, 1), (signal.SIGTERM, 0), (signal.SIGKILL, 0), (signal.SIGKILL, ROUNDS - 1)],
    ids=["SIGINT", "SIGTERM in the first", "SIGKILL in the first", "SIGKILL in the last"],
)
def test_stopped_once_and_resumed_is_the_same_run(world, told, number, version):
    """SIGINT comes as from a terminal: to all processes of the run at once."""
    folder = world.root / f"{number.name}-{version}"
    send = os.killpg if number == signal.SIGINT else os.kill
    code, errors = stop(
        world, [*world.options, *STOPPED, f"run_dir={folder}"], folder, version, lambda pid: send(pid, number)
    )
    if number == signal.SIGKILL:
        assert code == -signal.SIGKILL
    else:
        assert code == 130 and f"fedgpt run resume={folder}" in errors and "Traceback" not in errors
    wait_until(lambda: not world.processes(), 30)
    world.fedgpt("run", f"resume={folder}")
    assert_like_the_whole(world, folder, told)


def test_too_few_updates_end_the_run_with_3_and_the_reason(world):
    folder = world.root / "hurried"
    done = world.fedgpt(
        "run", *world.options, f"run_dir={folder}", "pace.deadline=0.01", "pace.minimum=2", "runtime.workers=1", code=3
    )
    assert "version 1 got 0 valid updates of 3 jobs, pace.minimum=2: no_reply x3" in done.stderr
    assert done.stdout.count("rejected: no_reply (the version closed first)") == 3
    assert not (folder / "summary.json").exists()
    snapshot = Checkpoints(folder / "checkpoints", 2).load()
    assert snapshot.state.version == 0 and snapshot.ledgers.accepted == {}


def test_a_wrong_option_ends_with_2_before_any_work(world):
    done = world.fedgpt("run", *world.options, "run_dir=never", "local.stpes=3", "model.n_head=3", code=2)
    assert "local.stpes=3: no option 'local.stpes'; did you mean 'local.steps'" in done.stderr
    assert "model.n_embd=16: must be a multiple of model.n_head=3" in done.stderr
    assert not (world.root / "never").exists()


# ---- many runs


@pytest.mark.slow
def test_a_sweep_makes_a_folder_for_each_run(world):
    done = world.fedgpt("run", "-m", *[o for o in world.options if o != "seed=11"], "seed=11,12", "rounds=1")
    (sweep,) = (world.root / "runs").glob("*-sweep")
    folders = sorted(path for path in sweep.iterdir() if path.is_dir())
    assert [path.name for path in folders] == ["0", "1"]
    assert len({summary(path)["weights_sha256"] for path in folders}) == 2
    assert [f"seed: {seed}" in (path / "config.yaml").read_text() for path, seed in zip(folders, (11, 12), strict=True)]
    assert done.stdout.count("version 1/1") == 2


SYNCHRONOUS = [
    "fedavg", "fedprox", "fedavgm", "fedadam", "fedyogi", "diloco", "auto",
    "flower", "flower strategy._target_=flwr.serverapp.strategy.FedTrimmedAvg",
]  # fmt: skip
ASYNCHRONOUS = ["delta_sgd", "fedbuff", "fedasync", "delayed_nesterov"]
ROBUST = ["median", "trimmed_mean", "krum", "geometric_median", "norm_clip", "centred_clip", "fltrust"]  # want a crowd


@pytest.mark.slow
def test_every_strategy_of_conf_trains(world, finished):
    conf = {path.stem for path in (Path(__file__).parent.parent / "conf" / "strategy").glob("*.yaml")}
    assert conf == {name.split()[0] for name in SYNCHRONOUS + ASYNCHRONOUS + ROBUST}
    buffer = " pace=buffer pace.clients=2 rounds=4"
    crowd = " partition=iid partition.clients=5 pace.clients=5"
    needs = dict.fromkeys(SYNCHRONOUS, "") | dict.fromkeys(ASYNCHRONOUS, buffer) | dict.fromkeys(ROBUST, crowd)
    told = world.python(f"""
for number, (name, more) in enumerate({needs!r}.items()):
    chosen = f"run_dir=strategy-{{number}} runtime.workers=1 strategy={{name}}{{more}}"
    told[name] = run_here(*OPTIONS, *chosen.split())
""")
    digests = {name: each["weights_sha256"] for name, each in told.items()}
    assert digests["fedavg"] == finished.summary["weights_sha256"]
    initial = finished.summary["initial"]
    for name, each in told.items():
        assert each["initial"] == initial, name
        assert each["versions"] >= 2 and each["rejected"] == {}, name
        assert each["final"]["loss"] < initial["loss"], name
    ours = [digest for name, digest in digests.items() if not name.startswith("flower")]
    assert len(set(ours)) == len(ours), "each is a rule of its own"
    assert told["flower"]["final"]["loss"] == pytest.approx(told["fedavg"]["final"]["loss"], rel=1e-5)


@pytest.mark.slow
def test_every_way_of_an_update_trains_and_a_restart_keeps_what_was_left_out(world, finished):
    ways = sorted(path.stem for path in (Path(__file__).parent.parent / "conf" / "update").glob("*.yaml"))
    told = world.python(f"""
for number, way in enumerate({ways!r} + ["none update.downlink=bf16", "none update.downlink=int8"]):
    chosen = f"runtime.workers=1 rounds=4 run_dir=way-{{number}} update={{way}}".split()
    told[way] = run_here(*OPTIONS, *chosen)
chosen = "runtime.workers=1 rounds=4 update=topk run_dir=cut-way".split()
run_here(*OPTIONS, *chosen)
for path in Path("cut-way").glob("checkpoints/version-00000004*"):
    path.unlink()  # as if it had been killed before its last checkpoint
told["again"] = run_here(*OPTIONS, *chosen)
""")
    plain = told["none"]
    for way, each in told.items():
        assert each["versions"] == 4 and each["rejected"] == {}, way
        assert each["final"]["loss"] < each["initial"]["loss"], way
    vectors = 12 * 4 * PARAMETERS  # 3 clients, 4 versions
    share = {way: (told[way]["bytes_up"] - plain["bytes_up"]) / vectors + 1 for way in ways}
    assert share["bf16"] == pytest.approx(0.5, abs=0.01) and share["int8"] == pytest.approx(0.251, abs=0.01)
    assert share["int4"] == pytest.approx(0.129, abs=0.01) == share["e3m0"]
    assert share["topk"] < 0.05 and share["sparse_loco"] < 0.02
    half = told["none update.downlink=bf16"]
    assert half["bytes_down"] < 0.55 * plain["bytes_down"] and half["bytes_up"] == pytest.approx(
        plain["bytes_up"], rel=1e-3
    )
    steps = told["none update.downlink=int8"]  # the first of four versions is whole
    assert steps["bytes_down"] - plain["bytes_down"] == pytest.approx(-0.75 * 0.749 * vectors, rel=0.01)
    assert told["again"]["weights_sha256"] == told["topk"]["weights_sha256"]


def test_a_configuration_that_was_changed_is_refused_by_name(world, finished):
    """config.yaml is the user's to read; what a checkpoint was made with is in the checkpoint."""
    folder = world.root / "edited"
    shutil.copytree(finished.folder, folder)
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace("rounds: 2", "rounds: 3").replace("  lr: 0.003", "  lr: 0.004"))
    (folder / "summary.json").unlink()
    done = world.fedgpt("run", f"resume={folder}", code=1)
    assert "local.lr: 0.003 -> 0.004, rounds: 2 -> 3" in done.stderr and "Traceback" not in done.stderr
