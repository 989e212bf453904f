"""Local training against a plain loop with torch's own optimiser and schedule."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fedgpt.core.device import Compute
from fedgpt.core.flat import FlatParams, flatten
from fedgpt.core.messages import Plan
from fedgpt.core.options import LocalOptions, ModelOptions
from fedgpt.data.batches import Batches
from fedgpt.local.schedule import learning_rate
from fedgpt.local.trainer import Trainer
from fedgpt.model.gpt import GPT

MODEL = ModelOptions(n_layer=2, n_head=2, n_embd=32, block_size=16, positions="learned")
VOCAB = 64
FP32 = Compute("cpu", "fp32", "test")
TOKENS = np.random.default_rng(0).integers(0, VOCAB, 4000)


def local(**changes) -> LocalOptions:
    return LocalOptions(
        **{"batch_size": 4, "steps": 6, "lr": 1e-2, "min_lr": 1e-3, "grad_clip": 0.0, **changes}
    )


def plan(steps=6, done=0, per_step=64, total=64 * 12, **more) -> Plan:
    return Plan("run", steps, done, per_step, total, **more)


def start(seed=1, **model) -> np.ndarray:
    module = GPT(ModelOptions(**{**vars(MODEL), **model}), VOCAB)
    module.init_weights(seed)
    return flatten(module)[1].numpy()


def torch_clip(module: GPT, limit: float) -> None:
    torch.nn.utils.clip_grad_norm_(module.parameters(), limit)


def flat_clip(module: GPT, limit: float) -> None:
    """Clipping as in the trainer: by one norm over all gradients in a row.

    torch adds up tensor by tensor, which rounds differently.
    """
    grads = dict(module.named_parameters())
    flat = torch.cat([grads[name].grad.reshape(-1) for name in FlatParams.of(module).names])
    for parameter in grads.values():
        parameter.grad.mul_((limit / (torch.linalg.vector_norm(flat) + 1e-6)).clamp(max=1.0))


def plain_loop(
    o: LocalOptions,
    p: Plan,
    batches: Batches,
    dropout_seed: int | None = None,
    clip=torch_clip,
    average=False,
    **model,
):
    """As in nanoGPT: separate tensors, two parameter groups, torch's AdamW and clipping.

    `average`: micro-batches are added up and then divided, not divided one by one.
    """
    module = GPT(ModelOptions(**{**vars(MODEL), **model}), VOCAB)
    module.init_weights(1)
    params = list(module.parameters())
    groups = [
        {"params": [q for q in params if q.dim() >= 2], "weight_decay": o.weight_decay},
        {"params": [q for q in params if q.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(o.beta1, o.beta2), eps=1e-8, fused=True)
    if dropout_seed is not None:
        torch.manual_seed(dropout_seed)
    for step in range(p.local_steps):
        optimizer.zero_grad()
        for _ in range(o.accumulate):
            x, y = batches.next()
            loss = module.loss(x, y)
            (loss if o.accumulate == 1 or average else loss / o.accumulate).backward()
        if average and o.accumulate > 1:
            for parameter in params:
                parameter.grad.div_(o.accumulate)
        if o.grad_clip:
            clip(module, o.grad_clip)
        tokens = p.tokens_done + (step + 1) * p.tokens_per_step
        lr = learning_rate(tokens, p.tokens_total, lr=o.lr, min_lr=o.last_lr, warmup=o.warmup)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    layout = FlatParams.of(module)
    named = dict(module.named_parameters())
    return torch.cat([named[name].detach().reshape(-1) for name in layout.names]).numpy()


def batches(o: LocalOptions) -> Batches:
    return Batches(TOKENS, MODEL.block_size, o.batch_size, seed=5)


def test_a_client_with_all_text_ends_with_the_bits_of_plain_training():
    o = local()
    trainer = Trainer(MODEL, VOCAB, o, FP32)
    trained = trainer.train(start(), batches(o), plan(), None)
    expected = plain_loop(o, plan(), batches(o))
    np.testing.assert_array_equal(trainer.params.numpy(), expected)
    # the delta is rounded
    np.testing.assert_allclose(start() - trained.delta, expected, rtol=1e-6, atol=1e-7)
    assert trained.tokens == 6 * 4 * 16


@pytest.mark.parametrize(
    "changes", [{}, {"accumulate": 3, "grad_clip": 0.3}], ids=["defaults", "accumulate"]
)
def test_default_clipping_and_accumulation_give_the_bits_of_plain_training(changes):
    """Bit for bit, if the plain loop adds up in the same order; the next test has torch's order."""
    o = LocalOptions(steps=30, batch_size=4, **changes)
    per_step = 64 * o.accumulate
    job_plan = plan(steps=30, per_step=per_step, total=30 * per_step)
    clipped = []

    def clip(module: GPT, limit: float) -> None:
        before = next(module.parameters()).grad.clone()
        flat_clip(module, limit)
        clipped.append(not torch.equal(before, next(module.parameters()).grad))

    trainer = Trainer(MODEL, VOCAB, o, FP32)
    trainer.train(start(), batches(o), job_plan, None)
    expected = plain_loop(o, job_plan, batches(o), clip=clip, average=True)
    np.testing.assert_array_equal(trainer.params.numpy(), expected)
    assert any(clipped)


@pytest.mark.parametrize(
    "changes", [{"grad_clip": 0.5}, {"accumulate": 3}, {"accumulate": 2, "grad_clip": 0.3}]
)
def test_clipping_and_accumulation_agree_with_those_of_torch(changes):
    """Compares norms of deltas, because sums in another order are rounded differently.

    Adam turns a tiny gradient with a rounding error into a full step.
    """
    o = local(**changes)
    trainer = Trainer(MODEL, VOCAB, o, FP32)
    delta = trainer.train(start(), batches(o), plan(), None).delta
    expected = start() - plain_loop(o, plan(), batches(o))
    assert np.linalg.norm(delta - expected) < 1e-3 * np.linalg.norm(expected)


def test_dropout_is_on_and_seeded():
    o = local()
    options = ModelOptions(**{**vars(MODEL), "dropout": 0.3})
    trainer = Trainer(options, VOCAB, o, FP32)
    trainer.train(start(), batches(o), plan(), None, dropout_seed=9)
    np.testing.assert_allclose(
        trainer.params.numpy(),
        plain_loop(o, plan(), batches(o), dropout_seed=9, dropout=0.3),
        rtol=1e-6,
    )


def test_two_jobs_with_kept_moments_equal_one_longer_job():
    """Moments, schedule and position in the data are all that two jobs must share."""
    o = local()
    source = batches(o)
    trainer = Trainer(MODEL, VOCAB, o, FP32)
    trainer.train(start(), source, plan(steps=6), None)
    half, moments = trainer.params.numpy().copy(), trainer.optimizer.moments()
    moments = type(moments)(moments.first.clone(), moments.second.clone(), moments.steps)
    other = Trainer(MODEL, VOCAB, o, FP32)
    other.train(half, source, plan(steps=6, done=6 * 64), moments)
    trainer.train(start(), batches(o), plan(steps=12), None)
    np.testing.assert_array_equal(other.params.numpy(), trainer.params.numpy())
    assert other.optimizer.moments().steps == 12


def test_a_reused_trainer_gives_the_bits_of_a_new_one():
    o = local()
    reused, fresh = Trainer(MODEL, VOCAB, o, FP32), Trainer(MODEL, VOCAB, o, FP32)
    reused.train(start(seed=7), Batches(TOKENS[::-1].copy(), 16, 4, 3), plan(), None)
    again = reused.train(start(), batches(o), plan(), None).delta
    np.testing.assert_array_equal(again, fresh.train(start(), batches(o), plan(), None).delta)


def test_the_proximal_term_keeps_a_client_near_its_start():
    """A large mu shortens the delta, and mu=0 has no effect."""
    o = local(weight_decay=0.0)
    near = Trainer(MODEL, VOCAB, o, FP32).train(
        start(), batches(o), plan(numbers={"proximal_mu": 1e3}), None
    )
    far = Trainer(MODEL, VOCAB, o, FP32).train(start(), batches(o), plan(), None)
    assert np.linalg.norm(near.delta) < 0.7 * np.linalg.norm(far.delta)
    none = Trainer(MODEL, VOCAB, o, FP32).train(
        start(), batches(o), plan(numbers={"proximal_mu": 0.0}), None
    )
    np.testing.assert_array_equal(none.delta, far.delta)


def test_the_proximal_gradient_is_that_of_the_squared_norm():
    o = local(weight_decay=0.0, lr=1e-3, min_lr=1e-3, warmup=0.0)
    trainer = Trainer(MODEL, VOCAB, o, FP32)
    trainer.train(start(), batches(o), plan(steps=1), None)
    after_one = trainer.params.clone()
    plain = Trainer(MODEL, VOCAB, o, FP32)
    plain.train(start(), batches(o), plan(steps=2), None)
    trainer.train(start(), batches(o), plan(steps=2, numbers={"proximal_mu": 0.5}), None)
    expected = plain.grad + 0.5 * (after_one - torch.from_numpy(start()))
    torch.testing.assert_close(trainer.grad, expected, rtol=1e-4, atol=1e-5)


def test_an_unknown_number_in_a_plan_is_refused():
    with pytest.raises(ValueError, match="momentum"):
        Trainer(MODEL, VOCAB, local(), FP32).train(
            start(), batches(local()), plan(numbers={"momentum": 1.0}), None
        )


def test_a_vector_of_another_model_is_refused():
    with pytest.raises(ValueError, match="this model has"):
        Trainer(MODEL, VOCAB, local(), FP32).train(start()[:-1], batches(local()), plan(), None)


def test_training_in_bf16_is_close_to_fp32():
    o = local(steps=20, grad_clip=1.0)
    long = plan(steps=20, total=64 * 20)
    text = np.tile(np.arange(VOCAB), 60)  # a text that can be learnt
    source = lambda: Batches(text, 16, 4, 2)  # noqa: E731
    fp32 = Trainer(MODEL, VOCAB, o, FP32).train(start(), source(), long, None)
    trainer = Trainer(MODEL, VOCAB, o, Compute("cpu", "bf16", "test"))
    bf16 = trainer.train(start(), source(), long, None)
    assert fp32.metrics["train_loss"] < math.log(VOCAB) - 0.5
    assert bf16.metrics["train_loss"] == pytest.approx(fp32.metrics["train_loss"], rel=0.03)
    assert trainer.working.dtype == torch.bfloat16
    torch.testing.assert_close(trainer.working, trainer.params.bfloat16(), rtol=0, atol=0)
    storage = trainer.working.untyped_storage().data_ptr()
    for name, view in trainer.layout.views(trainer.working).items():
        assert view.untyped_storage().data_ptr() == storage, name


def test_a_job_of_a_tied_model_trains_the_tied_weight_once():
    trainer = Trainer(MODEL, VOCAB, local(), FP32)
    assert trainer.layout.size == sum(p.numel() for p in trainer.model.parameters())
    assert not any("lm_head" in name for name in trainer.layout.names)
