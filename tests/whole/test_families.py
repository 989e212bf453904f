"""Many runs: a sweep, every strategy and every codec in conf/."""

from __future__ import annotations

import pytest
from support.world import PARAMETERS, TESTS, summary


@pytest.mark.slow
@pytest.mark.long
def test_a_sweep_makes_a_folder_for_each_run(world):
    done = world.fedgpt(
        "run", "-m", *[o for o in world.options if o != "seed=11"], "seed=11,12", "rounds=1"
    )
    (sweep,) = (world.root / "runs").glob("*-sweep")
    folders = sorted(path for path in sweep.iterdir() if path.is_dir())
    assert [path.name for path in folders] == ["0", "1"]
    assert len({summary(path)["weights_sha256"] for path in folders}) == 2
    for path, seed in zip(folders, (11, 12), strict=True):
        assert f"seed: {seed}\n" in (path / "config.yaml").read_text()
    assert done.stdout.count("version 1/1") == 2


SYNCHRONOUS = [
    "fedavg",
    "fedprox",
    "fedavgm",
    "fedadam",
    "fedyogi",
    "diloco",
    "auto",
    "flower",
    "flower strategy._target_=flwr.serverapp.strategy.FedTrimmedAvg",
]
ASYNCHRONOUS = ["delta_sgd", "fedbuff", "fedasync", "delayed_nesterov"]
# strategies that need several clients
ROBUST = [
    "median",
    "trimmed_mean",
    "krum",
    "geometric_median",
    "norm_clip",
    "centred_clip",
    "fltrust",
]


@pytest.mark.long
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
    results = world.python(f"""
for number, (name, more) in enumerate({needs!r}.items()):
    chosen = f"run_dir=strategy-{{number}} strategy={{name}}{{more}}"
    results[name] = run_here(*OPTIONS, *chosen.split())
""")
    digests = {name: each["weights_sha256"] for name, each in results.items()}
    assert digests["fedavg"] == finished.summary["weights_sha256"]
    initial = finished.summary["initial"]
    for name, each in results.items():
        assert each["initial"] == initial, name
        assert each["versions"] >= 2 and each["rejected"] == {}, name
        assert each["final"]["loss"] < initial["loss"], name
    assert digests["auto"] == digests["fedavg"], (
        "auto keeps rounds where three clients share one worker"
    )
    ours = [digest for name, digest in digests.items() if not name.startswith(("flower", "auto"))]
    assert len(set(ours)) == len(ours), "no two strategies give the same weights"
    assert results["flower"]["final"]["loss"] == pytest.approx(
        results["fedavg"]["final"]["loss"], rel=1e-5
    )


@pytest.mark.slow
@pytest.mark.long
def test_every_codec_trains_and_a_restart_keeps_the_residual(world, finished):
    codecs = sorted(path.stem for path in (TESTS.parent / "conf" / "update").glob("*.yaml"))
    codecs.remove("custom")  # it needs the name of a class
    results = world.python(f"""
downlinks = ["none update.downlink=bf16", "none update.downlink=int8"]
for number, codec in enumerate({codecs!r} + downlinks):
    chosen = f"rounds=4 run_dir=codec-{{number}} update={{codec}}".split()
    results[codec] = run_here(*OPTIONS, *chosen)
chosen = "rounds=4 update=topk run_dir=killed-codec".split()
run_here(*OPTIONS, *chosen)
for path in Path("killed-codec").glob("checkpoints/version-00000004*"):
    path.unlink()  # as if it had been killed before its last checkpoint
results["again"] = run_here(*OPTIONS, *chosen)
""")
    plain = results["none"]
    for codec, each in results.items():
        assert each["versions"] == 4 and each["rejected"] == {}, codec
        assert each["final"]["loss"] < each["initial"]["loss"], codec
    vectors = 12 * 4 * PARAMETERS  # 3 clients, 4 versions
    share = {
        codec: (results[codec]["bytes_up"] - plain["bytes_up"]) / vectors + 1 for codec in codecs
    }
    assert share["bf16"] == pytest.approx(0.5, abs=0.01) and share["int8"] == pytest.approx(
        0.251, abs=0.01
    )
    assert share["int4"] == pytest.approx(0.129, abs=0.01) == share["e3m0"]
    assert share["topk"] < 0.05 and share["sparse_loco"] < 0.02
    half = results["none update.downlink=bf16"]
    assert half["bytes_down"] < 0.55 * plain["bytes_down"] and half["bytes_up"] == pytest.approx(
        plain["bytes_up"], rel=1e-3
    )
    steps = results["none update.downlink=int8"]  # the first of four versions is sent in full
    assert steps["bytes_down"] - plain["bytes_down"] == pytest.approx(
        -0.75 * 0.749 * vectors, rel=0.01
    )
    assert results["again"]["weights_sha256"] == results["topk"]["weights_sha256"]
