import pytest
import torch
from test_gpt import VARIANTS, VOCAB, small, tokens

from fedgpt.core.errors import FedGPTError
from fedgpt.model.generate import choose, generate, window_start

PROMPT = [3, 1, 4, 1, 5]


@pytest.fixture(scope="module")
def model():
    return small()


@pytest.mark.parametrize("new", [8, 30], ids=["inside block_size", "past block_size"])
@pytest.mark.parametrize("change", VARIANTS.values(), ids=VARIANTS.keys())
def test_cached_equals_uncached(change, new):
    model = small(**change)
    for options in (
        {"temperature": 0.0},
        {"samples": 3, "top_k": 7},
        {"samples": 2, "temperature": 1.5},
    ):
        cached = generate(model, PROMPT, new, **options)
        assert cached == generate(model, PROMPT, new, **options, cache=False)
        assert [len(row) for row in cached] == [new] * options.get("samples", 1)


@pytest.mark.parametrize("length", [16, 17, 40])
def test_prompts_around_block_size(model, length):
    prompt = tokens(1, length)[0].tolist()
    assert generate(model, prompt, 9, samples=2) == generate(
        model, prompt, 9, samples=2, cache=False
    )


def test_greedy_follows_the_largest_logit(model):
    ids = list(PROMPT)
    for _ in range(11):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    assert generate(model, PROMPT, 11, temperature=0) == [ids[5:]]
    assert generate(model, PROMPT, 11, top_k=1) == [ids[5:]]
    assert generate(model, PROMPT, 11, top_p=1e-6) == [ids[5:]]


def test_window_moves_by_quarters_and_never_exceeds_block_size():
    starts = [window_start(length, 16) for length in range(1, 60)]
    assert starts[:16] == [0] * 16
    assert starts[16:24] == [4, 4, 4, 4, 8, 8, 8, 8]
    assert all(12 < length - start <= 16 for length, start in enumerate(starts, 1) if length > 16)
    assert window_start(5, 1) == 4


def test_samples_follow_from_the_seed(model):
    first = generate(model, PROMPT, 12, samples=2, seed=1)
    assert first == generate(model, PROMPT, 12, samples=2, seed=1)
    assert first != generate(model, PROMPT, 12, samples=2, seed=2)
    assert first[0] != first[1]


def test_stop_ends_a_sample_and_is_left_out(model):
    free = generate(model, PROMPT, 12, samples=4, seed=3)
    stop = free[0][4]
    stopped = generate(model, PROMPT, 12, samples=4, seed=3, stop=stop)
    assert stopped == [row[: row.index(stop)] if stop in row else row for row in free]
    assert generate(model, PROMPT, 0, samples=2) == [[], []]


def test_generate_stops_early_when_all_samples_have_ended(model, monkeypatch):
    (greedy,) = generate(model, PROMPT, 3, temperature=0)
    calls = []
    hidden = model.hidden
    monkeypatch.setattr(model, "hidden", lambda *some: calls.append(1) or hidden(*some))
    assert generate(model, PROMPT, 1000, samples=2, temperature=0, stop=greedy[0]) == [[], []]
    assert len(calls) == 1


def test_draws_follow_the_distribution():
    shares = torch.tensor([0.5, 0.3, 0.15, 0.05])
    logits = shares.log().expand(4000, 4)
    cases = {
        (1.0, None, None): [0.5, 0.3, 0.15, 0.05],
        (1.0, 2, None): [0.625, 0.375, 0, 0],
        (1.0, None, 0.75): [0.625, 0.375, 0, 0],  # the token that crosses top_p stays
        (1.0, None, 0.81): [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0],
        (1.0, 9, 1.0): [0.5, 0.3, 0.15, 0.05],
        (0.5, None, None): (shares**2 / (shares**2).sum()).tolist(),
    }
    for knobs, expected in cases.items():
        drawn = choose(logits, torch.Generator().manual_seed(0), *knobs)
        counted = torch.bincount(drawn, minlength=4) / len(drawn)
        torch.testing.assert_close(counted, torch.tensor(expected), atol=0.03, rtol=0)
        assert not counted[torch.tensor(expected) == 0].any()


def test_generate_does_not_change_the_model_or_the_global_generator():
    model = small(dropout=0.5)
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    first = generate(model, PROMPT, 5)
    assert torch.equal(torch.rand(1), expected)
    assert model.training
    assert first == generate(model.eval(), PROMPT, 5)
    # the parameters are not left in inference mode
    model.train().loss(tokens(1, 4), tokens(1, 4)).backward()


def test_bf16_generates():
    assert len(generate(small().to(torch.bfloat16), PROMPT, 30, samples=2)[1]) == 30


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt_ids": []}, r"prompt_ids=\[\]: needs at least one token"),
        ({"prompt_ids": [1, VOCAB]}, r"prompt_ids has 23: token ids must be from 0 to 22"),
        ({"max_new_tokens": -1}, r"max_new_tokens=-1: must be at least 0"),
        ({"samples": 0}, r"samples=0: must be at least 1"),
        ({"temperature": -0.5}, r"temperature=-0\.5: must be finite and at least 0"),
        ({"temperature": float("nan")}, r"temperature=nan: must be finite"),
        ({"top_k": 0}, r"top_k=0: must be at least 1"),
        ({"samples": 10**12}, r"samples=10{12}: of up to \d+ tokens need at least .* GB, and this"),
        ({"top_p": 0.0}, r"top_p=0\.0: must be above 0 and at most 1"),
        ({"stop": 99}, r"stop=99: must be a token id from 0 to 22"),
    ],
)
def test_wrong_values_are_named(model, change, message):
    with pytest.raises(ValueError, match=message):
        generate(model, **({"prompt_ids": PROMPT, "max_new_tokens": 2} | change))


GENERATE_REMEDIES = [
    (
        {"prompt_ids": []},
        "start an empty text with the end-of-text token",
        [{"prompt_ids": [VOCAB - 1]}],
    ),
    ({"prompt_ids": [1, VOCAB]}, "use the model's tokenizer", [{"prompt_ids": [1, VOCAB - 1]}]),
    (
        {"samples": 10**9, "max_new_tokens": 10},
        "generate fewer samples, or fewer tokens",
        [{"samples": 1}, {"samples": 10, "max_new_tokens": 1}],
    ),
]


@pytest.mark.parametrize(("wrong", "remedy", "followed"), GENERATE_REMEDIES)
def test_text_is_generated_as_a_refusal_advises(model, wrong, remedy, followed):
    given = {"prompt_ids": PROMPT, "max_new_tokens": 2} | wrong
    with pytest.raises(ValueError) as refused:
        generate(model, **given)
    assert remedy in str(refused.value)
    for change in followed:
        assert generate(model, **given | change)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"top_k": 5}, {"top_p": 0.5}], ids=str)
def test_a_model_whose_logits_are_not_finite_generates_no_text(value, options):
    broken = small()
    with torch.no_grad():
        broken.transformer["ln_f"].bias.fill_(value)
        broken.lm_head.weight.fill_(1.0)  # with 3e38: finite weights, infinite logits
    with pytest.raises(FedGPTError, match="logits are not finite"):
        generate(broken, PROMPT, 5, **options)
