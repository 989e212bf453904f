"""Runs with one half of the model frozen: it keeps its bits, and only the other half is sent."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.advice import advises
from support.here import run_here, tiny_run
from support.world import TESTS
from support.world import summary as summary_of
from test_families import ASYNCHRONOUS, ROBUST, SYNCHRONOUS

import fedgpt
from fedgpt.config import compose
from fedgpt.core.device import Compute
from fedgpt.core.errors import ConfigError, FedGPTError
from fedgpt.core.files import sha256_of
from fedgpt.core.flat import flatten
from fedgpt.core.messages import Job, Plan
from fedgpt.core.seeds import derive_seed
from fedgpt.data.batches import Batches
from fedgpt.data.partition import partition
from fedgpt.data.prepare import prepare
from fedgpt.data.shards import load_shards
from fedgpt.data.text import shard_text
from fedgpt.flower.client_app import app
from fedgpt.flower.in_process_grid import InProcessGrid
from fedgpt.flower.messages import job_content, params_record, read_job
from fedgpt.flower.run_config import run_config_of
from fedgpt.flower.serve import serve
from fedgpt.local.private import PrivateSteps
from fedgpt.local.schedule import learning_rate
from fedgpt.local.trainer import Trainer
from fedgpt.model.gpt import GPT
from fedgpt.model.hf import export_model, import_model
from fedgpt.privacy.randomness import SecureStream
from fedgpt.storage.checkpoint import Checkpoints
from fedgpt.storage.initial_weights import base_weights
from fedgpt.tasks.base import make_task
from fedgpt.update.compress import codec_of
from fedgpt.update.wire import compress

# the second of two blocks, the last norm and the head
TRAINED = ("transformer.h.1.", "transformer.ln_f.", "lm_head.")
HALF = [
    "model.n_layer=2",
    "model.tie=false",
    f"model.trainable=[{','.join(name + '*' for name in TRAINED)}]",
]
SIZE = 12 * 16**2 + 13 * 16 + 2 * 16 + 257 * 16  # parameters of the trained half: block, norm, head
HEADER = 600  # bytes, more than the JSON of any update
SEEDED = "privacy.rng=seeded"
CODECS = sorted(path.stem for path in (TESTS.parent / "conf" / "update").glob("*.yaml"))
CODECS.remove("custom")  # it needs the name of a class
# one strategy of each kind: linear, with memory, Flower's, asynchronous, robust, with a root update
FAST = ("fedavg", "fedadam", "flower", "fedbuff", "median", "fltrust")


@dataclass(frozen=True)
class Half:
    """A folder with text, options of a small run, and the model that every run starts from."""

    folder: Path
    options: list[str]
    start: dict[str, torch.Tensor]

    def run(self, name: str, *more: str) -> dict[str, Any]:
        return run_here(*self.options, f"run_dir={self.folder / name}", *more)

    def exported(self, name: str) -> dict[str, torch.Tensor]:
        return dict(import_model(self.folder / name / "model").named_parameters())

    def check(self, name: str, start: dict[str, torch.Tensor] | None = None) -> None:
        """The exported model is complete, its frozen half as it was, the other half trained."""
        start, end = start or self.start, self.exported(name)
        assert end.keys() == start.keys()
        for parameter, value in end.items():
            if not parameter.startswith(TRAINED):
                assert torch.equal(value, start[parameter]), parameter
        assert any(
            not torch.equal(value, start[parameter])
            for parameter, value in end.items()
            if parameter.startswith(TRAINED)
        )


def mostly_slow(names: list[str], fast: tuple[str, ...]) -> list[Any]:
    """All names as parameters; only the `fast` ones are in the default suite."""
    return [n if n in fast else pytest.param(n, marks=pytest.mark.slow) for n in names]


@pytest.fixture(scope="module")
def half(tmp_path_factory) -> Half:
    folder = tmp_path_factory.mktemp("half")
    options = [o for o in tiny_run(folder) if not o.startswith(("run_dir", "rounds"))]
    options += [*HALF, "rounds=2", "evaluate=ends", "local.lr=0.01"]
    model = GPT(compose.load(options).model, 257)
    model.init_weights(derive_seed(0, "init"))
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    return Half(folder, options, start)


@pytest.mark.parametrize("strategy", mostly_slow(SYNCHRONOUS + ASYNCHRONOUS + ROBUST, FAST))
def test_every_strategy_trains_one_half(half, strategy):
    name = strategy.replace(" ", "-")
    more = [f"strategy={strategy.split()[0]}", *strategy.split()[1:]]
    if strategy in ASYNCHRONOUS:
        more += ["pace=buffer", "pace.clients=2"]
    if strategy in ROBUST:
        more += ["partition=iid", "partition.clients=5", "partition.piece=64"]
    done = half.run(name, *more)
    half.check(name)
    assert done["rejected"] == {} and done["versions"] >= 2
    updates = done["bytes_up"] // (4 * SIZE)
    assert updates >= 2 and done["bytes_up"] - updates * 4 * SIZE < updates * HEADER


@pytest.mark.parametrize("name", mostly_slow(CODECS, ("int8", "topk")))
def test_every_codec_sends_the_trained_half(half, name):
    done = half.run(f"codec-{name}", f"update={name}")
    half.check(f"codec-{name}")
    codec = codec_of(compose.load([f"update={name}"]).update)
    delta = np.random.default_rng(0).standard_normal(SIZE).astype(np.float32)
    expected = compress(delta, codec).nbytes
    assert done["bytes_up"] / 4 == pytest.approx(expected, rel=0.02, abs=HEADER)


@pytest.mark.parametrize("downlink", mostly_slow(["bf16", "int8"], ("int8",)))
def test_every_downlink_sends_the_trained_half(half, downlink):
    done = half.run(f"down-{downlink}", f"update.downlink={downlink}")
    half.check(f"down-{downlink}")
    assert done["bytes_down"] < 4 * (4 * SIZE + HEADER)


@pytest.mark.parametrize(
    "privacy",
    [
        "example privacy.noise_multiplier=1",
        "example privacy.noise_multiplier=1 privacy.engine=opacus",
        "client privacy.noise_multiplier=1",
        "local",
    ],
)
def test_one_half_is_trained_with_every_privacy_unit(half, privacy):
    name = f"private-{'-'.join(privacy.split())}"
    half.run(name, *f"privacy={privacy}".split(), SEEDED)
    half.check(name)


def test_both_engines_make_the_same_private_gradient(half):
    """With the same examples and noise they differ by rounding; frozen parameters do not count."""
    o = compose.load([*half.options, "privacy=example", "privacy.noise_multiplier=1"])
    prepared, shards = load_shards(o)
    text = shard_text(prepared, shards[0])
    base = base_weights(o, prepared.tokenizer)
    gradients = []
    for engine in ("bookkeeping", "opacus"):
        size, compute, task = (
            prepared.tokenizer.vocab_size,
            Compute("cpu", "fp32", ""),
            make_task(o),
        )
        trainer = Trainer(o.model, size, o.local, compute, engine, task, base)
        units = task.units(text, o.model.block_size)
        stream = SecureStream(bytes(32), "test")
        trainer.private.fill(trainer.grad, PrivateSteps(units, stream, 0.5, 1.0, 0.1))
        assert trainer.grad.numel() == SIZE
        gradients.append(trainer.grad)
    assert float((gradients[0] - gradients[1]).norm()) < 1e-5 * float(gradients[0].norm())


def test_with_bf16_the_frozen_half_keeps_its_full_precision(half):
    """Clients compute with a bf16 copy of the base; the exported base is the initial one."""
    half.run("bf16", "local.precision=bf16")
    half.check("bf16")


def test_one_client_ends_as_plain_training_with_frozen_parameters(half):
    """torch's own AdamW on the parameters that require a gradient, over the same batches."""
    more = ("partition=iid", "partition.clients=1", "rounds=1", "local.steps=6")
    half.run("plain", *more, "local.grad_clip=0")
    o = compose.load([*half.options, *more])
    prepared = prepare(o.corpus, o.tokenizer, o.cache_dir)
    (shard,) = partition(prepared, o.partition, o.seed, o.model.block_size + 1)
    module = GPT(replace(o.model, trainable=[]), 257)
    module.load_state_dict(half.start)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name.startswith(TRAINED))
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": o.local.weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(o.local.beta1, o.local.beta2), fused=True)
    seed = derive_seed(o.seed, "batches", shard.client, 0)
    batches = Batches(shard.read(prepared.tokens), o.model.block_size, o.local.batch_size, seed)
    per_step = o.local.batch_size * o.model.block_size
    for step in range(1, 7):
        optimizer.zero_grad()
        module.loss(*batches.next()).backward()
        tokens, total, local = step * per_step, 6 * per_step, o.local
        lr = learning_rate(tokens, total, lr=local.lr, min_lr=local.last_lr, warmup=local.warmup)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    end = half.exported("plain")
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(end[name], parameter.detach(), rtol=1e-5, atol=1e-6)
    half.check("plain")


def test_an_interrupted_run_is_resumed_to_the_same_bits(half):
    more = ("strategy=fedadam", "update=topk", "rounds=4", "checkpoint.every=1")
    uninterrupted = half.run("uninterrupted", *more)
    half.run("interrupted", *more)
    for path in (half.folder / "interrupted" / "checkpoints").glob("version-00000004*"):
        path.unlink()  # as if it had been killed before its last checkpoint
    assert half.run("interrupted", *more)["weights_sha256"] == uninterrupted["weights_sha256"]
    half.check("interrupted")


def test_an_opened_run_has_the_complete_model(half):
    half.run("opened")
    best_weights, _ = Checkpoints(half.folder / "opened" / "checkpoints", 2).load_best()
    for best in (False, True):
        model = fedgpt.open_run(half.folder / "opened", best=best).model
        trained = flatten(model)[1].numpy()
        if best:
            assert np.array_equal(trained, best_weights)
        else:
            end = half.exported("opened")
            assert all(torch.equal(p, end[name]) for name, p in model.named_parameters())
        frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
        assert frozen.keys() == {n for n in half.start if not n.startswith(TRAINED)}
        assert all(torch.equal(p, half.start[n]) for n, p in frozen.items())
    assert len(fedgpt.open_run(half.folder / "opened").generate("ann", tokens=3)) == 1


# ---- the base from a folder, and what is refused


def pretrained(half: Half, name: str, seed: int) -> dict[str, torch.Tensor]:
    """Write a Hugging Face folder, which a run may take as its base; returns its weights."""
    model = GPT(replace(compose.load(half.options).model, trainable=[]), 257)
    model.init_weights(seed)
    export_model(half.folder / name, model)
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def drop_last_checkpoint(folder: Path) -> None:
    for path in (folder / "checkpoints").glob("version-00000002*"):
        path.unlink()


def contents(folder: Path) -> dict[str, str]:
    return {str(p): sha256_of(p) for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_base_from_a_folder_is_exported_and_not_trained(half):
    start = pretrained(half, "public", seed=7)
    half.run("tuned", f"init_from={half.folder / 'public'}")
    half.check("tuned", start)
    shutil.rmtree(half.folder / "public")
    model = fedgpt.open_run(half.folder / "tuned").model  # its base is in its own export
    assert torch.equal(model.transformer["wte"].weight, start["transformer.wte.weight"])
    shutil.rmtree(half.folder / "tuned" / "model")
    with pytest.raises(FedGPTError, match="has no exported model; restore") as refused:
        _ = fedgpt.open_run(half.folder / "tuned").model
    started = compose.of_run(half.folder / "tuned", reading=True).init_from
    assert started is not None
    advises(refused.value, f"restore init_from={started}")
    pretrained(half, Path(started).name, seed=7)
    model = fedgpt.open_run(half.folder / "tuned").model
    assert torch.equal(model.transformer["wte"].weight, start["transformer.wte.weight"])


def test_a_run_whose_base_has_changed_is_refused_before_anything_is_written(half):
    pretrained(half, "changing", seed=7)
    more = (f"init_from={half.folder / 'changing'}", "checkpoint.every=1")
    half.run("changed", *more)
    drop_last_checkpoint(half.folder / "changed")
    before = contents(half.folder / "changed")
    pretrained(half, "changing", seed=8)
    with pytest.raises(FedGPTError, match="cannot be continued: its base weights diff") as refused:
        half.run("changed", *more)
    advises(refused.value, "restore that folder")
    assert contents(half.folder / "changed") == before
    pretrained(half, "changing", seed=7)
    assert half.run("changed", *more)["versions"] == 2


def test_a_client_with_another_base_refuses_its_job(half, capfd):
    for name, seed in (("ours", 7), ("theirs", 8)):
        pretrained(half, name, seed)
    run_dir = f"run_dir={half.folder / 'refused'}"
    ours, theirs = (
        compose.load([*half.options, run_dir, f"init_from={half.folder / name}"])
        for name in ("ours", "theirs")
    )
    grid = InProcessGrid(app, 2, run_config_of(theirs), str(half.folder / "clients"))
    with pytest.raises(FedGPTError, match="0 valid updates of 2 jobs"):
        serve(ours, grid)
    printed = capfd.readouterr().out
    assert "base weights differ: this client's are" in printed
    advises(printed, "use the same init_from for both")
    grid = InProcessGrid(app, 2, run_config_of(ours), str(half.folder / "clients"))
    serve(ours, grid)


def test_a_pattern_that_selects_nothing_is_refused(half):
    with pytest.raises(ConfigError, match=r"model\.trainable=\[lm_haed\.\*\]: selects no"):
        compose.load([*half.options, "model.trainable=[lm_haed.*]"])


def test_a_folder_made_before_the_option_existed_is_continued():
    options = compose.load([])
    before = compose.flat_options(options)
    assert before.pop("model.trainable") == []
    assert compose.changed_options(before, options) == ""
    options.model.trainable = ["lm_head.*"]
    assert "model.trainable: [] -> ['lm_head.*']" in compose.changed_options(before, options)


def test_messages_without_frozen_parameters_have_no_base_digest():
    job = Job("ann", 0, 0, np.zeros(3, np.float32), Plan("run", 1, 0, 1, 1))
    text = str(job_content(job, params_record(job))["job"]["json"])
    assert "base" not in text
    frozen = replace(job, plan=replace(job.plan, digests={"base": "abc"}))
    content = job_content(frozen, params_record(frozen))
    assert json.loads(str(content["job"]["json"]))["plan"]["base_digest"] == "abc"
    assert read_job(Message(content)).plan == frozen.plan


@dataclass(frozen=True)
class Message:
    content: Any


@pytest.mark.slow
def test_workers_of_the_pool_make_the_base_themselves(world, half):
    options = [*world.options, *HALF]
    world.fedgpt("run", *options, "runtime.workers=1", f"run_dir={world.root / 'half'}")
    done = summary_of(world.root / "half")
    here = run_here(*options, f"run_dir={world.root / 'half-here'}", f"cache_dir={half.folder}")
    assert done["weights_sha256"] == here["weights_sha256"]
    assert done["bytes_up"] == here["bytes_up"]
    assert len(fedgpt.open_run(world.root / "half").generate("The river", tokens=5)) == 1
