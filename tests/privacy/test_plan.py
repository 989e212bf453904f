"""Refused combinations of options with their reasons, and the planned cost of a run."""

from __future__ import annotations

import pytest
from support.advice import advises
from support.correlated import running_noise

from fedgpt.config import compose
from fedgpt.core.errors import ConfigError
from fedgpt.core.options import RunOptions
from fedgpt.privacy.accounting import Event, epsilon_of, gaussian_epsilon
from fedgpt.privacy.plan import make_plan
from fedgpt.privacy.statement import rows, statement

CLIENT = ["privacy=client", "pace.clients=10"]
COINS = ["privacy=client", "pace.rate=0.1", "pace.clients=0"]
BUFFER = [
    "privacy=client",
    "pace=buffer",
    "strategy=fedbuff",
    "pace.goal=4",
    "privacy.participations=5",
]


def refused(*overrides: str) -> str:
    with pytest.raises(ConfigError) as error:
        compose.load(overrides)
    return str(error.value)


@pytest.mark.parametrize(
    "chosen", [CLIENT, COINS, BUFFER, ["privacy=example"], ["privacy=local"]], ids=str
)
def test_correct_combinations_are_accepted(chosen):
    assert compose.load(chosen).privacy.unit in chosen[0]


@pytest.mark.parametrize(
    ("chosen", "option", "why"),
    [
        (
            [*BUFFER, "privacy.participations=null"],
            "privacy.participations",
            "each client's updates must be counted",
        ),
        ([*BUFFER, "pace.goal=1"], "pace.goal=1", "one client's update alone"),
        ([*COINS, "pace.goal=3"], "pace.goal=3", "would push another out of the cohort"),
        ([*CLIENT, "strategy=median"], "strategy=median", "needs a plain sum of clipped updates"),
        ([*CLIENT, "strategy=krum"], "strategy=krum", "needs a plain sum"),
        ([*CLIENT, "strategy=norm_clip"], "strategy=norm_clip", "needs a plain sum"),
        (
            ["privacy=client", "pace=buffer", "strategy=fedasync"],
            "strategy=fedasync",
            "needs a plain sum",
        ),
        (["privacy=client", "strategy=auto"], "strategy=auto", "it may change the pacing"),
        (["privacy=client", "strategy=flower"], "strategy=", "needs a plain sum"),
        ([*CLIENT, "validate.clip=2"], "validate.clip=2", "must not reveal"),
        ([*CLIENT, "privacy.bands=4"], "privacy.bands=4", "raise privacy.separation=1 to 4"),
        (
            [*COINS, "privacy.bands=4", "privacy.separation=4"],
            "privacy.bands=4",
            "no common accounting",
        ),
        (
            [*CLIENT, "privacy.bands=4", "privacy.separation=4", "privacy.adaptive=true"],
            "privacy.adaptive",
            "series",
        ),
        (
            [*COINS, "privacy.separation=3"],
            "privacy.separation=3",
            "coins cannot separate a client's participations",
        ),
        ([*CLIENT, "tokens=100000"], "tokens=100000", "set rounds instead"),
        ([*CLIENT, "privacy.target_epsilon=null"], "privacy=client", "set privacy.target_epsilon"),
        (
            [*CLIENT, "privacy.engine=opacus"],
            "privacy.engine=opacus",
            "an option of privacy=example",
        ),
        (
            ["privacy=example", "privacy.adaptive=true"],
            "privacy.adaptive=True",
            "an option of privacy=client",
        ),
        ([*CLIENT, "pace.dylu=true"], "pace.dylu=true", "one client's speed would change"),
        (
            [*COINS, "privacy.participations=3"],
            "privacy.participations=3",
            "any client may be in every release",
        ),
        (
            ["privacy=example", "model.dropout=0.1"],
            "model.dropout=0.1",
            "the gradient of one block would depend",
        ),
        (["privacy.target_epsilon=4"], "privacy.target_epsilon=4", "privacy=none protects nothing"),
        (["privacy=example", "local.precision=bf16"], "local.precision=bf16", "computed in fp32"),
        (
            ["privacy=local", "update=topk"],
            "update.error_feedback=true",
            "it would add data without noise",
        ),
        (["privacy=example", "privacy.target_epsilon=0"], "privacy.target_epsilon=0", "from 1e-06"),
        (
            ["privacy=example", "privacy.noise_multiplier=0"],
            "privacy.noise_multiplier=0",
            "from 1e-06",
        ),
        (["privacy=example", "privacy.delta=1"], "privacy.delta=1", "below 1"),
        (["privacy=example", "privacy.clip=0"], "privacy.clip=0", "from 1e-06"),
        (
            ["privacy=example", "privacy.engine=ghost_fsdp"],
            "privacy.engine=ghost_fsdp",
            "bookkeeping or opacus",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_combinations_without_correct_accounting_are_refused(chosen, option, why):
    message = refused(*chosen)
    assert option in message and why in message, message


QUICK = ["privacy.noise_multiplier=5", "privacy.target_epsilon=null"]  # nothing to calibrate
COHORT_OF_4 = "pace.rate=null pace.clients=4"
BANDS = ["privacy.bands=4", "privacy.separation=4"]
TEXT = ["privacy=example", "local.steps=1", "privacy.noise_multiplier=2"]
# what is refused -> the advice at the end of the message -> the options of each thing it names
REMEDIES: dict[tuple[str, ...], dict[str, list[str]]] = {
    (*CLIENT, "privacy.target_epsilon=null"): {
        "set privacy.target_epsilon, from which the noise follows, or privacy.noise_multiplier": [
            "privacy.target_epsilon=4",
            "privacy.noise_multiplier=2",
        ]
    },
    (*CLIENT, "tokens=100000"): {"set rounds instead": ["tokens=0 rounds=5"]},
    ("privacy=example", *QUICK, "local.precision=bf16"): {
        "take local.precision=fp32": ["local.precision=fp32"]
    },
    ("privacy=example", *QUICK, "model.dropout=0.1"): {"take model.dropout=0": ["model.dropout=0"]},
    ("privacy=local", "update=topk"): {
        "take update=int8, or set update.error_feedback=false": [
            "update=int8",
            "update.error_feedback=false",
        ]
    },
    (*CLIENT, "strategy=median"): {
        "take fedavg, fedavgm, diloco or delta_sgd": [
            "strategy=fedavg",
            "strategy=fedavgm",
            "strategy=diloco",
            "strategy=delta_sgd",
        ]
    },
    (*BUFFER, "strategy=fedasync"): {
        "take fedbuff or delta_sgd": ["strategy=fedbuff", "strategy=delta_sgd"]
    },
    (*CLIENT, "strategy=auto"): {
        "take a strategy with a fixed pacing, such as delta_sgd": ["strategy=delta_sgd"]
    },
    (*CLIENT, "pace.clients=100", "validate.clip=2"): {
        "leave it out, and for a clip that follows them privately set privacy.adaptive=true": [
            "validate.clip=0",
            "validate.clip=0 privacy.adaptive=true",
        ]
    },
    (*CLIENT, "pace.dylu=true"): {"leave it out": ["pace.dylu=false"]},
    (*COINS, *QUICK, "privacy.participations=3"): {"leave it out": ["privacy.participations=null"]},
    (*COINS, *QUICK, "pace.goal=3"): {
        "leave it out, or choose pace.clients instead of pace.rate": [
            "pace.goal=null",
            COHORT_OF_4,
        ]
    },
    (*COINS, *BANDS): {"set pace.clients instead of pace.rate": [COHORT_OF_4]},
    (*COINS, "privacy.separation=3"): {"set pace.clients, not pace.rate": [COHORT_OF_4]},
    (*CLIENT, "privacy.bands=4"): {
        "raise privacy.separation=1 to 4, or lower privacy.bands": [
            "privacy.separation=4",
            "privacy.bands=1",
        ]
    },
    (*CLIENT, "pace.clients=50", *BANDS, "privacy.adaptive=true"): {
        "leave it out, or set privacy.bands=1": ["privacy.adaptive=false", "privacy.bands=1"]
    },
    (*BUFFER, "privacy.participations=null"): {
        "set the largest number of updates of one client": ["privacy.participations=5"]
    },
    (*BUFFER, "pace.goal=1"): {
        "raise pace.goal, or set privacy.single=true to accept that": [
            "pace.goal=2",
            "privacy.single=true",
        ]
    },
    # these depend on the clients
    (*COINS, *QUICK, "privacy.delta=0.01"): {"leave it out for 0.0029": ["privacy.delta=null"]},
    (*CLIENT, "privacy.separation=30"): {
        "lower it to 20 at most, or lower pace.clients": [
            "privacy.separation=20",
            "pace.clients=6",
        ]
    },
    (*COINS, "privacy.adaptive=true", "privacy.noise_multiplier=3"): {
        "raise pace.rate, or leave it out": ["pace.rate=0.9", "privacy.adaptive=false"]
    },
    (*CLIENT, "privacy.adaptive=true", "privacy.noise_multiplier=3"): {
        "raise pace.clients, or leave it out": ["pace.clients=100", "privacy.adaptive=false"]
    },
    (*BUFFER, "privacy.adaptive=true", "privacy.noise_multiplier=3"): {
        "raise pace.goal, or leave it out": ["pace.goal=100", "privacy.adaptive=false"]
    },
    (*TEXT, "pace.clients=0", "rounds=1000"): {
        "leave the noise out, so that it follows from the target, or lower rounds": [
            "privacy.noise_multiplier=null",
            "rounds=1",
        ]
    },
    (*TEXT, "privacy.participations=1000"): {
        "leave the noise out, so that it follows from the target, or lower"
        " privacy.participations": ["privacy.participations=1"]
    },
    ("privacy=example", *QUICK, "model.block_size=2048"): {
        "no client has enough tokens for a block; lower it": ["model.block_size=64"]
    },
}


@pytest.mark.parametrize("chosen", REMEDIES, ids=" ".join)
def test_every_remedy_of_a_private_run_helps(chosen):
    with pytest.raises(ConfigError) as error:
        plan(MANY, *chosen)
    for remedy, changes in REMEDIES[chosen].items():
        assert any(problem.endswith(remedy) for problem in error.value.problems)
        for change in changes:
            plan(MANY, *chosen, *change.split())


def test_steps_of_a_single_update_can_be_allowed():
    assert compose.load([*BUFFER, "pace.goal=1", "privacy.single=true"]).privacy.single


def plan(shards: list[int], *overrides: str):
    return make_plan(compose.load(overrides), shards)


MANY = [2000] * 200


@pytest.mark.parametrize(
    ("chosen", "shards", "why"),
    [
        ([*COINS, "privacy.delta=0.01"], MANY, "privacy.delta=0.01: must be below 1/200"),
        (
            ["privacy=example", "privacy.delta=0.05"],
            MANY,
            "must be below 1/30, one over the number of blocks",
        ),
        (
            [*CLIENT, "privacy.separation=30"],
            MANY,
            "200 clients cannot fill 10 places in each of 30 versions",
        ),
        (
            [*COINS, "privacy.adaptive=true", "privacy.noise_multiplier=3"],
            MANY,
            "privacy.adaptive=true: with noise of 3",
        ),
        (["privacy=example"], [20, 30], "no client has enough tokens for a block"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_problems_that_depend_on_the_clients_are_refused_before_the_run(chosen, shards, why):
    with pytest.raises(ConfigError) as error:
        plan(shards, *chosen)
    assert why in str(error.value)


def test_sampling_by_coins_is_accounted_with_amplification():
    found = plan(MANY, *COINS, "rounds=50")
    assert found.sampling == "poisson" and found.cohort == 20 and found.planned.count == 50
    assert 7.9 < found.epsilon <= 8.0
    assert found.epsilon == epsilon_of([Event(found.noise_multiplier, 0.1, 50)], 200**-1.1)


def test_fixed_cohorts_and_buffers_are_accounted_by_participation():
    fixed = plan(MANY, *CLIENT, "rounds=50")
    assert fixed.sampling == "bounded" and fixed.participations == 50 and fixed.cohort == 10
    assert fixed.epsilon == pytest.approx(8.0, abs=0.02)
    apart = plan(MANY, *CLIENT, "rounds=50", "privacy.separation=20")
    assert apart.participations == 3, "in versions 0, 20 and 40"
    assert plan(MANY, *CLIENT, *QUICK, "pace.goal=6").cohort == 6, "a step needs 6 of the 10"
    buffered = plan(MANY, *BUFFER, "rounds=500")
    assert buffered.participations == 5 and buffered.cohort == 4
    mu = 5**0.5 / buffered.noise_multiplier
    assert (
        buffered.epsilon == pytest.approx(gaussian_epsilon(mu, 200**-1.1))
        and buffered.epsilon <= 8.0
    )
    assert fixed.noise_multiplier > 3 * buffered.noise_multiplier


def test_a_series_of_correlated_noise_is_one_event():
    chosen = ["privacy.bands=10", "privacy.separation=20", "rounds=200"]
    found = plan(MANY, *CLIENT, *chosen)
    assert (
        found.sampling == "correlated" and found.planned.count == 1 and found.participations == 10
    )
    assert found.epsilon == pytest.approx(8.0, abs=0.02)
    alone = plan(MANY, *CLIENT, "rounds=200", "privacy.separation=20")
    correlated = found.noise_multiplier * found.scale * running_noise(10, 200)
    assert 2.2 < alone.noise_multiplier * running_noise(1, 200) / correlated < 2.7, (
        "19.0 / 7.7, see test_toeplitz.py"
    )


def test_the_smallest_shard_costs_most():
    found = plan(
        [1000, 65 * 400], "privacy=example", "rounds=10", "pace.clients=0", "local.steps=5"
    )
    assert found.planned.count == 50 and found.planned.sampling_probability == 8 / 15
    assert found.delta == 400**-1.1 and found.protected == 400
    batches = ["local.batch_size=2", "local.accumulate=3"]
    found = plan([1000], "privacy=example", *QUICK, *batches)
    assert found.planned.sampling_probability == 6 / 15


def test_clients_chosen_at_random_may_take_part_more_often_than_on_average():
    found = plan(MANY, "privacy=example", "rounds=100", "pace.clients=10")
    assert found.participations == 12, "5 on average, plus three standard deviations"
    assert plan(MANY, "privacy=example", "rounds=7", "pace.clients=0").participations == 7


def test_the_statement_says_what_is_covered_and_what_is_not():
    seeded = [*COINS, "privacy.rng=seeded"]
    for chosen in (["privacy=example"], CLIENT, COINS, BUFFER, ["privacy=local"], seeded):
        o = compose.load(chosen)
        promise = statement(o, make_plan(o, MANY), len(MANY))
        text = "\n".join(f"{name} {words}" for name, words in rows(promise))
        for word in ("protects", "epsilon", "delta", "noise", "accountant", "trusts"):
            assert word in text
        assert ("NOT PRIVATE" in text) == (chosen is seeded)
        assert "not covered" in text and len(promise["not_covered"]) >= 3


ALL_TEXT = "all text of one client"
PROTECTED = {
    "privacy=example": "one block of 65 tokens of a client's text, cut once (compared with a run"
    " without its gradients)",
    "privacy=local": f"{ALL_TEXT}, also against the server (compared with any other updates of the"
    " client)",
    " ".join(COINS): f"{ALL_TEXT} (compared with a run without its updates)",
    " ".join(BUFFER): f"{ALL_TEXT} (compared with a run with the same participation and updates of"
    " zero)",
}


@pytest.mark.parametrize("chosen", PROTECTED)
def test_the_statement_has_the_unit_and_the_numbers_of_the_plan(chosen):
    o = compose.load([*chosen.split(), *QUICK, "privacy.clip=0.5", "rounds=2", "local.steps=1"])
    made = make_plan(o, MANY)
    shown = dict(rows(statement(o, made, len(MANY))))
    assert shown["protects"] == PROTECTED[chosen]
    assert shown["epsilon"] == f"{made.epsilon:.3g} as planned, at delta {made.delta:.2g}"
    assert shown["noise"].startswith("5 x clip 0.5, ")
    sampled = made.planned.sampling_probability < 1
    assert ("privacy loss distributions" in shown["accountant"]) == sampled
    assert ("closed form" in shown["accountant"]) != sampled


def test_the_statement_says_that_coins_of_few_clients_help_little():
    o = compose.load([*COINS, *QUICK, "rounds=2"])
    for clients, said in ((66, True), (200, False)):
        promise = statement(o, make_plan(o, [2000] * clients), clients)
        assert (f"few clients ({clients})" in dict(rows(promise))["noise"]) == said


def test_the_statement_says_whether_the_plan_is_within_the_budget():
    for noise, words in ((0.5, "but the run ends before it is above 2"), (50, "never above 2")):
        o = compose.load([*CLIENT, "privacy.target_epsilon=2", f"privacy.noise_multiplier={noise}"])
        promise = statement(o, make_plan(o, MANY), len(MANY))
        assert words in dict(rows(promise))["epsilon"]


NOBODY_COVERS = ("public part", "held-out part", "other runs on the same text")
ABOUT = ("name", "how much text", "when and how often", "kinds of its errors", "a digest of all")
OPEN = {
    "example": ("privacy=example", (*ABOUT, "document or an author")),
    "local": ("privacy=local", ABOUT),
    "coins": (COINS, ("number of clients", "times at which", "publish only model/, samples.md")),
    "fixed": (CLIENT, ("number of clients", "times at which", "when and how often a client")),
    "buffer": (BUFFER, ("number of clients", "times at which", "when and how often a client")),
}


@pytest.mark.parametrize("name", OPEN)
def test_the_statement_lists_everything_that_the_guarantee_does_not_cover(name):
    chosen, words = OPEN[name]
    o = compose.load([chosen] if isinstance(chosen, str) else chosen)
    o.privacy.noise_multiplier, o.init_from = 9.0, "some/model"
    o.privacy.target_epsilon = None
    promise = statement(o, make_plan(o, MANY), len(MANY))
    text = "\n".join(promise["not_covered"])
    for part in (*NOBODY_COVERS, "init_from=some/model", *words):
        assert part in text, part
    assert ("when and how often" in text) == (name != "coins")
    shown = dict(rows(promise))
    server = o.privacy.unit == "client"
    assert ("the server, which sees single updates" in shown["trusts"]) == server
    assert ("the client and whoever sets" in shown["trusts"]) != server
    assert ("coin" in shown["noise"]) == (name in ("example", "coins"))
    assert ("no amplification" in shown["noise"]) == (name in ("fixed", "buffer"))


@pytest.mark.parametrize(
    "typed",
    [
        "privacy.target_epsilon=1e-7",
        "privacy.target_epsilon=1e7",
        "privacy.noise_multiplier=1e-7",
        "privacy.noise_multiplier=1e7",
        "privacy.noise_multiplier=1e-300",
        "privacy.delta=1e-301",
        "privacy.delta=1e-320",
        "privacy.delta=-1",
        "privacy.clip=1e-30",
        "privacy.clip=1e30",
        "privacy.participations=0",
        "privacy.participations=1000000000000000000000000000000",
        "privacy.bands=0",
        "privacy.bands=100000000",
        "privacy.separation=0",
        "privacy.separation=1000000000000000000000000000000",
    ],
)
def test_numbers_beyond_their_range_are_refused_with_the_range(typed):
    name = typed.partition("=")[0]
    (message,) = [line for line in refused(*CLIENT, typed).splitlines() if ": must be " in line]
    assert f"- {name}=" in message
    ranges = (
        "must be from ",
        "must be at least 1e-300 and below 1",
        "must be 0, or at least 1e-12",
    )
    assert any(words in message for words in ranges)


@pytest.mark.parametrize(
    "chosen",
    [
        ["privacy=example", "privacy.target_epsilon=1000", "rounds=5"],
        ["privacy=example", "privacy.target_epsilon=1000000"],
        ["privacy=example", "privacy.target_epsilon=1e-6"],
        ["privacy=example", "privacy.delta=1e-18"],
        ["privacy=example", "privacy.delta=1e-300"],
        ["privacy=local", "privacy.target_epsilon=1e-6", "privacy.delta=1e-300"],
        ["privacy=local", "privacy.target_epsilon=1e6"],
        [*COINS, "privacy.target_epsilon=1e-6"],
        [*COINS, "privacy.target_epsilon=1000"],
        [*COINS, "rounds=100000000"],
        [*CLIENT, "privacy.participations=1000000000", "rounds=1000000000"],
        [*CLIENT, "privacy.bands=10000", "privacy.separation=10000", "rounds=1000000000"],
        [*CLIENT, "privacy.noise_multiplier=1e-6", "privacy.target_epsilon=null"],
        ["privacy=example", "privacy.noise_multiplier=1e6"],
    ],
    ids=" ".join,
)
def test_numbers_at_the_ends_of_their_ranges_have_a_plan_within_the_budget(chosen):
    shards = [2000] * 200 if "privacy.bands=10000" not in chosen else [2000] * 200_000
    found = plan(shards, *chosen)
    assert found.budget is None or found.epsilon <= found.budget * (1 + 1e-9)


def test_a_delta_that_promises_next_to_nothing_is_reported_with_a_remedy():
    def statement_of(shards: list[int], *chosen: str) -> dict[str, str]:
        o = compose.load(chosen)
        return dict(rows(statement(o, make_plan(o, shards), len(shards))))

    for few, unit in ((CLIENT, "clients"), (COINS, "clients"), (["privacy=local"], "clients")):
        text = statement_of(
            [2000] * 4, *few, "privacy.noise_multiplier=1", "privacy.target_epsilon=null"
        )
        assert "delta is 0.22" in text["WEAK"] and f"take many more {unit}" in text["WEAK"]
    blocks = statement_of([70], "privacy=example", "rounds=2")
    assert "delta is 0.47" in blocks["WEAK"] and "blocks of text" in blocks["WEAK"]
    advises(
        blocks["WEAK"],
        "set privacy.delta=0.001 or less, which needs more noise, or take many more blocks of text",
    )
    weak = [statement_of([2000] * 4, *CLIENT, f"privacy.delta={d}") for d in (0.011, 0.01)]
    assert ["WEAK" in rows for rows in weak] == [True, False]
    for remedy in (
        statement_of([2000] * 4, *CLIENT, "privacy.delta=0.001"),
        statement_of([2000] * 66, *CLIENT),
        statement_of([2000] * 66, "privacy=example", "rounds=2"),
    ):
        assert "WEAK" not in remedy or "delta is 0.02" in remedy["WEAK"]


def test_privacy_none_is_accepted():
    assert isinstance(compose.load(["privacy=none"]), RunOptions)


SITE = ["corpus=site", "corpus.public_path=.", "corpus.held_out_path=.", "pace.begin=2"]


def test_a_site_may_have_almost_twice_the_text_that_it_reports():
    """The noise is for the smallest text that it may have, and delta for the largest."""
    sizes = [1 << 14, 1 << 16]
    options = [*QUICK, "privacy=example", "pace.clients=2"]
    reported, exact = plan(sizes, *options, *SITE), plan(sizes, *options)
    assert reported.planned == exact.planned
    assert reported.protected == 2 * (1 << 16) // 65 > exact.protected
    assert reported.delta == reported.protected**-1.1
    # so that the client itself, which knows its blocks, finds delta small enough
    assert reported.delta < 1 / ((2 * (1 << 16) - 1) // 65)


def test_a_site_of_one_block_may_report_fewer_tokens_than_a_block_has():
    """65 to 127 tokens are reported as 64, where a block of 64 inputs has 65."""
    chosen = [*QUICK, "privacy=example", "pace.clients=2", *SITE]
    assert plan([64, 1 << 16], *chosen).planned == plan([65, 1 << 16], *chosen).planned


@pytest.mark.parametrize("unit", ["example", "local"])
def test_the_statement_of_sites_says_how_exactly_their_amount_is_known(unit):
    chosen = [f"privacy={unit}", *QUICK, "rounds=2", "local.steps=1"]
    told = {}
    for more in ([], SITE):
        o = compose.load([*chosen, *more])
        promise = statement(o, make_plan(o, [1 << 14] * 4), 4)
        told[bool(more)] = " ".join(promise["not_covered"])
    assert "a digest of all prepared text" in told[False] and "power of two" not in told[False]
    assert "a digest of all prepared text" not in told[True] and "power of two" in told[True]
