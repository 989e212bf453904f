import copy
import math
from dataclasses import replace

import pytest
import torch
from support.advice import advises
from torch.nn import functional as F

from fedgpt.core.errors import ConfigError
from fedgpt.core.flat import flatten
from fedgpt.core.options import ModelOptions
from fedgpt.model import gpt
from fedgpt.model.gpt import GPT, KVCache, attend, cross_entropy, rotate, rotation
from fedgpt.model.kernels import attend_explicitly

SMALL = ModelOptions(n_layer=2, n_head=4, n_embd=32, block_size=16, positions="learned")
VOCAB = 23
VARIANTS = {
    "learned": {},
    "rotary": {"positions": "rotary"},
    "rmsnorm": {"norm": "rmsnorm"},
    "untied, no bias, tanh": {"tie": False, "bias": False, "gelu": "tanh"},
    "rotary, rmsnorm, no bias": {"positions": "rotary", "norm": "rmsnorm", "bias": False},
    "pythia": {
        **{"positions": "rotary", "parallel_residual": True, "partial_rotary_factor": 0.25},
        **{"tie": False, "n_inner": 40},
    },
    "llama": {
        **{"positions": "rotary", "norm": "rmsnorm", "mlp": "swiglu", "bias": False},
        **{"n_kv_head": 2, "n_inner": 40, "rope_theta": 100_000.0, "norm_eps": 1e-6},
    },
    "qwen2": {
        **{"positions": "rotary", "norm": "rmsnorm", "mlp": "swiglu", "bias": False},
        **{"n_kv_head": 1, "qkv_bias": True, "head_dim": 6},
    },
}
ROTARY = ModelOptions(n_head=1, n_embd=8)  # whose heads rotate 8 channels


def small(seed: int = 1, **change) -> GPT:
    """A small model in which every parameter has an effect: biases are not 0, norms not 1."""
    model = GPT(replace(SMALL, **change), VOCAB)
    model.init_weights(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.empty_like(p).normal_(0, 0.1, generator=generator))
    return model


def tokens(batch: int, time: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, VOCAB, (batch, time), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("change", VARIANTS.values(), ids=VARIANTS.keys())
def test_future_tokens_do_not_change_past_logits(change):
    model = small(**change).double()
    ids = tokens(3, 12)
    other = ids.clone()
    other[:, 7:] = (other[:, 7:] + 5) % VOCAB
    with torch.no_grad():
        a, b = model(ids), model(other)
    assert a.shape == (3, 12, VOCAB)
    assert torch.equal(a[:, :7], b[:, :7])
    assert not torch.allclose(a[:, 7:], b[:, 7:])


@pytest.mark.parametrize("change", VARIANTS.values(), ids=VARIANTS.keys())
def test_both_attention_paths_agree(change, monkeypatch):
    model = small(**change).double()
    ids = tokens(3, 12)
    params = list(model.parameters())
    plain = model.loss(ids, ids)
    plain_grads = torch.autograd.grad(plain, params)
    monkeypatch.setattr(gpt, "attend", attend_explicitly)
    explicit = model.loss(ids, ids)
    assert torch.allclose(plain, explicit, rtol=1e-12)
    for a, b in zip(plain_grads, torch.autograd.grad(explicit, params), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("new", "seen"), [(5, 5), (1, 7), (3, 7)])
def test_attention_against_a_loop(new, seen):
    generator = torch.Generator().manual_seed(0)
    q = torch.empty(2, 3, new, 4, dtype=torch.float64).normal_(generator=generator)
    k, v = torch.empty(2, 2, 3, seen, 4, dtype=torch.float64).normal_(generator=generator)
    expected = torch.empty_like(q)
    for t in range(new):
        visible = seen - new + t + 1
        scores = torch.einsum("bhd,bhsd->bhs", q[:, :, t], k[:, :, :visible]) / math.sqrt(4)
        expected[:, :, t] = torch.einsum("bhs,bhsd->bhd", scores.softmax(-1), v[:, :, :visible])
    torch.testing.assert_close(attend(q, k, v), expected)
    torch.testing.assert_close(attend_explicitly(q, k, v), expected)


def test_bf16_on_a_cpu_takes_the_explicit_path_for_short_contexts(monkeypatch):
    called = []
    monkeypatch.setattr(gpt, "attend_explicitly", lambda q, *_: called.append(q.size(2)) or q)
    q = torch.zeros(1, 1, 513, 4)
    for dtype, time in [(torch.float32, 8), (torch.bfloat16, 512), (torch.bfloat16, 513)]:
        part = q[:, :, :time].to(dtype)
        attend(part, part, part)
    assert called == [512]


def test_rotation_against_complex_numbers():
    x = torch.randn(2, 3, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    turned = rotate(x, rotation(torch.arange(5), ROTARY, torch.float64))
    for t in range(5):
        for i in range(4):
            angle = t * 10_000 ** (-2 * i / 8)
            z = torch.complex(x[:, :, t, i], x[:, :, t, i + 4]) * complex(
                math.cos(angle), math.sin(angle)
            )
            torch.testing.assert_close(turned[:, :, t, i], z.real, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(turned[:, :, t, i + 4], z.imag, rtol=1e-5, atol=1e-6)


def test_rotary_attention_depends_on_distance_only():
    q, k, v = torch.randn(3, 2, 2, 6, 8, generator=torch.Generator().manual_seed(0))
    near, far = (rotation(torch.arange(6) + shift, ROTARY, torch.float32) for shift in (0, 9))
    assert not torch.allclose(rotate(q, near), rotate(q, far))
    torch.testing.assert_close(
        attend(rotate(q, near), rotate(k, near), v),
        attend(rotate(q, far), rotate(k, far), v),
        rtol=1e-4,
        atol=1e-5,
    )


def test_rmsnorm_equals_its_formula():
    norm = small(norm="rmsnorm").double().transformer["ln_f"]
    x = torch.randn(2, 3, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight
    torch.testing.assert_close(norm(x), expected)


def test_rowwise_cross_entropy_equals_that_of_torch():
    generator = torch.Generator().manual_seed(0)
    logits = (
        torch.empty(3, 50, 41)
        .normal_(0, 3, generator=generator)
        .to(torch.bfloat16)
        .requires_grad_()
    )
    logits.data[0, 0] = torch.linspace(0, 200, 41)  # a share that underflows in fp32
    targets = torch.randint(0, 41, (3, 50), generator=generator)
    targets[0, 0] = 0
    targets[1, 10:20] = -100
    loss = cross_entropy(logits, targets)
    (grad,) = torch.autograd.grad(3 * loss, logits)
    wide = logits.detach().double().requires_grad_()
    reference = F.cross_entropy(wide.flatten(0, 1), targets.flatten(), ignore_index=-100)
    (expected,) = torch.autograd.grad(3 * reference, wide)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), reference, rtol=1e-6, atol=0)
    torch.testing.assert_close(grad.double(), expected, rtol=2**-7, atol=1e-12)
    assert not grad[1, 10:20].any()
    with torch.no_grad():  # evaluation uses the function of torch
        torch.testing.assert_close(cross_entropy(logits, targets), loss.detach())


@pytest.mark.parametrize("change", VARIANTS.values(), ids=VARIANTS.keys())
def test_flat_vector_and_its_bf16_twin(change):
    model = small(**change)
    ids = tokens(2, 16)
    before = model.loss(ids, ids)
    layout, vector = flatten(model)
    assert layout.size == sum(p.numel() for p in model.parameters()) == vector.numel()
    assert ("lm_head.weight" in layout.names) == (not model.options.tie)
    assert torch.equal(before, model.loss(ids, ids))

    twin = copy.deepcopy(model).to(torch.bfloat16)
    twin_layout, twin_vector = flatten(twin)
    assert twin_layout == layout
    assert twin_vector.dtype == torch.bfloat16
    start, end = twin_vector.data_ptr(), twin_vector.data_ptr() + 2 * twin_vector.numel()
    assert all(start <= p.data_ptr() < end for p in twin.parameters())
    if model.options.tie:
        assert twin.lm_head.weight is twin.transformer["wte"].weight
    params = list(model.parameters())
    grads = torch.autograd.grad(model.loss(ids, ids), params)
    twin_grads = torch.autograd.grad(twin.loss(ids, ids), list(twin.parameters()))
    flat, twin_flat = (
        torch.cat([g.flatten().float() for g in some]) for some in (grads, twin_grads)
    )
    assert (flat - twin_flat).norm() < 0.03 * flat.norm()

    vector.sub_(1e-2 * torch.randn(vector.shape, generator=torch.Generator().manual_seed(3)))
    twin_vector.copy_(vector)  # what a training step does
    moved, twin_moved = model.loss(ids, ids), twin.loss(ids, ids)
    assert not torch.equal(moved, before)
    torch.testing.assert_close(twin_moved, moved, rtol=0.02, atol=0)


def test_init_is_a_function_of_the_seed_and_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    a, b = GPT(SMALL, VOCAB), GPT(SMALL, VOCAB)
    assert torch.equal(torch.rand(1), expected)
    a.init_weights(5)
    b.init_weights(5)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    b.init_weights(6)
    assert not torch.equal(a.lm_head.weight, b.lm_head.weight)


def test_init_has_the_stated_spread():
    model = GPT(replace(SMALL, n_embd=128, n_layer=8), 512)
    block = model.blocks[3]
    assert model.lm_head.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert block.mlp.c_fc.weight.std().item() == pytest.approx(0.02, rel=0.02)
    for projection in (block.attn.c_proj, block.mlp.c_proj):
        assert projection.weight.std().item() == pytest.approx(0.02 / 4, rel=0.03)
        assert not projection.bias.any()
    assert torch.equal(block.ln_1.weight, torch.ones(128))


def test_dropout_acts_in_training_only():
    model = small(dropout=0.5)
    ids = tokens(2, 8)
    with torch.no_grad():
        assert not torch.equal(model(ids), model(ids))
        model.eval()
        assert torch.equal(model(ids), model(ids))
        plain = small()
        plain.load_state_dict(model.state_dict())
        assert torch.equal(model(ids), plain(ids))


@pytest.mark.parametrize("change", VARIANTS.values(), ids=VARIANTS.keys())
def test_cache_in_chunks_equals_one_pass(change):
    model = small(**change).double()
    ids = tokens(2, 11)
    cache = KVCache(model, batch=2, capacity=11)
    with torch.no_grad():
        parts = [model.hidden(ids[:, a:b], cache) for a, b in [(0, 4), (4, 5), (5, 9), (9, 11)]]
        torch.testing.assert_close(torch.cat(parts, 1), model.hidden(ids), rtol=1e-6, atol=1e-7)


def test_wrong_sizes_are_refused():
    with pytest.raises(ConfigError, match=r"model\.n_embd=130: must be a multiple"):
        GPT(ModelOptions(n_embd=130), VOCAB)
    with pytest.raises(ValueError, match=r"17 tokens do not fit model\.block_size=16"):
        small()(tokens(1, 17))


def test_no_buffers_and_no_bare_parameters_on_the_root():
    model = small()
    assert not list(model.buffers())
    assert not list(model.parameters(recurse=False))


def test_tokens_beyond_the_context_are_refused_and_cropped_ones_are_not():
    model = small()
    length = model.options.block_size
    ids = torch.zeros(1, length + 1, dtype=torch.long)
    with pytest.raises(ValueError) as refused:
        model(ids)
    advises(refused.value, "; crop them")
    assert model(ids[:, -length:]) is not None
