"""Many runs: a sweep, every strategy and every way of an update in conf/."""

from __future__ import annotations

import pytest
from support.world import PARAMETERS, TESTS, summary


@pytest.mark.slow
def test_a_sweep_makes_a_folder_for_each_run(world):
    done = world.fedgpt(
        "run", "-m", *[o for o in world.options if o != "seed=11"], "seed=11,12", "rounds=1"
    )
    (sweep,) = (world.root / "runs").glob("*-sweep")
    folders = sorted(path for path in sweep.iterdir() if path.is_dir())
    assert [path.name for path in folders] == ["0", "1"]
    assert len({summary(path)["weights_sha256"] for path in folders}) == 2
    assert [
        f"seed: {seed}" in (path / "config.yaml").read_text()
        for path, seed in zip(folders, (11, 12), strict=True)
    ]
    assert done.stdout.count("version 1/1") == 2


SYNCHRONOUS = [
    "fedavg", "fedprox", "fedavgm", "fedadam", "fedyogi", "diloco", "auto",
    "flower", "flower strategy._target_=flwr.serverapp.strategy.FedTrimmedAvg",
]  # fmt: skip
ASYNCHRONOUS = ["delta_sgd", "fedbuff", "fedasync", "delayed_nesterov"]
# want a crowd
ROBUST = [
    "median",
    "trimmed_mean",
    "krum",
    "geometric_median",
    "norm_clip",
    "centred_clip",
    "fltrust",
]


@pytest.mark.slow
def test_every_strategy_of_conf_trains(world, finished):
    conf = {path.stem for path in (TESTS.parent / "conf" / "strategy").glob("*.yaml")}
    conf.remove("custom")  # it needs a class from outside
    assert conf == {name.split()[0] for name in SYNCHRONOUS + ASYNCHRONOUS + ROBUST}
    buffer = " pace=buffer pace.clients=2 rounds=4"
    crowd = " partition=iid partition.clients=5 pace.clients=5"
    needs = (
        dict.fromkeys(SYNCHRONOUS, "")
        | dict.fromkeys(ASYNCHRONOUS, buffer)
        | dict.fromkeys(ROBUST, crowd)
    )
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
    assert digests["auto"] == digests["fedavg"], (
        "three clients share a worker: rounds, and of equal work"
    )
    ours = [digest for name, digest in digests.items() if not name.startswith(("flower", "auto"))]
    assert len(set(ours)) == len(ours), "each is a rule of its own"
    assert told["flower"]["final"]["loss"] == pytest.approx(
        told["fedavg"]["final"]["loss"], rel=1e-5
    )


@pytest.mark.slow
def test_every_way_of_an_update_trains_and_a_restart_keeps_what_was_left_out(world, finished):
    ways = sorted(path.stem for path in (TESTS.parent / "conf" / "update").glob("*.yaml"))
    ways.remove("custom")  # it needs a class from outside
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
    assert share["bf16"] == pytest.approx(0.5, abs=0.01) and share["int8"] == pytest.approx(
        0.251, abs=0.01
    )
    assert share["int4"] == pytest.approx(0.129, abs=0.01) == share["e3m0"]
    assert share["topk"] < 0.05 and share["sparse_loco"] < 0.02
    half = told["none update.downlink=bf16"]
    assert half["bytes_down"] < 0.55 * plain["bytes_down"] and half["bytes_up"] == pytest.approx(
        plain["bytes_up"], rel=1e-3
    )
    steps = told["none update.downlink=int8"]  # the first of four versions is whole
    assert steps["bytes_down"] - plain["bytes_down"] == pytest.approx(
        -0.75 * 0.749 * vectors, rel=0.01
    )
    assert told["again"]["weights_sha256"] == told["topk"]["weights_sha256"]
