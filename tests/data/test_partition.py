import re
import string
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from support import third_party  # noqa: F401  # makes the module `outsider`
from support.advice import advises

from fedgpt.core.errors import ConfigError
from fedgpt.core.options import PartitionOptions
from fedgpt.data.names import Names
from fedgpt.data.partition import (
    PARTITIONS,
    Shard,
    natural_owners,
    partition,
    partition_of,
)
from fedgpt.data.partitions.base import Partition, made_clients
from fedgpt.data.prepare import CLIENTS, HELD_OUT, PUBLIC


def corpus(lengths, owners, labels, parts) -> Any:
    """A prepared corpus of numbered tokens, so that each token shows where it comes from."""
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return SimpleNamespace(
        tokens=np.arange(starts[-1], dtype=np.uint32),
        starts=starts,
        part=np.array(parts, dtype=np.int8),
        clients=Names.of(string.ascii_lowercase[owner] for owner in owners),
        labels=Names.of(f"label {label}" for label in labels),
    )


def tokens_of_the_part(prepared) -> np.ndarray:
    return np.concatenate(
        [prepared.tokens[prepared.starts[d] : prepared.starts[d + 1]] for d in of_clients(prepared)]
    )


def of_clients(prepared) -> np.ndarray:
    return np.flatnonzero(prepared.part == CLIENTS)


def owner_of(prepared, token: int) -> str:
    return prepared.clients[int(np.searchsorted(prepared.starts, token, side="right")) - 1]


@st.composite
def corpora(draw):
    documents = draw(st.integers(3, 30))

    def each(values):
        return draw(st.lists(values, min_size=documents, max_size=documents))

    parts = each(st.sampled_from([CLIENTS, CLIENTS, CLIENTS, PUBLIC, HELD_OUT]))
    parts[:2] = [CLIENTS, CLIENTS]
    labels = each(st.integers(0, 3))
    labels[:2] = [0, 1]
    return corpus(each(st.integers(2, 60)), each(st.integers(0, 5)), labels, parts)


made = st.builds(
    PartitionOptions,
    name=st.sampled_from(PARTITIONS.names()),
    clients=st.integers(1, 6),
    alpha=st.floats(0.01, 100),
    exponent=st.floats(0, 3),
    piece=st.integers(1, 20),
    min_tokens=st.integers(0, 20),
)
outside = st.builds(
    PartitionOptions,
    name=st.just("custom"),
    _target_=st.just("outsider.Alternate"),
    arguments=st.fixed_dictionaries({"clients": st.integers(1, 6)}),
    min_tokens=st.integers(0, 20),
)


@settings(deadline=None, max_examples=300)
@given(corpora(), made | outside, st.integers(0, 2**31), st.integers(1, 12))
def test_every_client_gets_enough_tokens_and_no_token_twice_or_it_is_an_error(
    prepared, options, seed, window
):
    try:
        shards = partition(prepared, options, seed, window, ["outsider"])
    except ConfigError as error:
        assert "partition." in str(error)
        return
    assert [shard.client for shard in shards] == sorted({shard.client for shard in shards})
    assert len(shards) == (options.arguments or {}).get("clients", options.clients)
    dealt = np.concatenate([shard.read(prepared.tokens) for shard in shards])
    assert len(np.unique(dealt)) == len(dealt)
    assert np.isin(dealt, tokens_of_the_part(prepared)).all()
    if options.name == "natural":
        for shard in shards:
            assert {owner_of(prepared, token) for token in shard.read(prepared.tokens)} == {
                shard.client
            }
    else:
        assert len(dealt) == len(tokens_of_the_part(prepared))
    for shard in shards:
        assert shard.size == len(shard.read(prepared.tokens)) >= max(window, options.min_tokens)
        assert (shard.spans[1:, 0] > shard.spans[:-1, 1]).all()  # sorted and merged
    again = partition(prepared, options, seed, window, ["outsider"])
    assert all(np.array_equal(a.spans, b.spans) for a, b in zip(shards, again, strict=True))


@pytest.fixture
def ten():
    """Ten documents of 100 tokens of the clients a (4), b (3), c (2) and d (1), and two others."""
    parts = [CLIENTS] * 3 + [PUBLIC] + [CLIENTS] * 4 + [HELD_OUT] + [CLIENTS] * 3
    owners = [0, 0, 0, 5, 0, 1, 1, 1, 5, 2, 2, 3]
    return corpus([100] * 12, owners, [0, 1] * 6, parts)


def test_natural_keeps_owners_and_merges_neighbours(ten):
    shards = partition(ten, PartitionOptions(), 0, 10)
    assert [(shard.client, shard.spans.tolist()) for shard in shards] == [
        ("a", [[0, 300], [400, 500]]),
        ("b", [[500, 800]]),
        ("c", [[900, 1100]]),
        ("d", [[1100, 1200]]),
    ]


def test_natural_keeps_the_largest_and_leaves_small_ones_out(ten):
    largest = partition(ten, PartitionOptions(clients=2), 0, 10)
    assert [shard.client for shard in largest] == ["a", "b"]
    assert [shard.client for shard in partition(ten, PartitionOptions(), 0, 101)] == ["a", "b", "c"]
    assert [shard.client for shard in partition(ten, PartitionOptions(min_tokens=300), 0, 10)] == [
        "a",
        "b",
    ]
    assert natural_owners(ten) == 4


def test_natural_errors_name_what_to_change(ten):
    with pytest.raises(
        ConfigError, match=r"partition\.clients=9: the corpus has 4 natural clients.*partition=iid"
    ):
        partition(ten, PartitionOptions(clients=9), 0, 10)
    with pytest.raises(
        ConfigError, match=r"model\.block_size=499: none of 4 natural clients has 500 .*has 400"
    ):
        partition(ten, PartitionOptions(), 0, 500)


def test_iid_is_even_and_mixes_owners(ten):
    shards = partition(ten, PartitionOptions(name="iid", clients=3, piece=10), 0, 10)
    assert [shard.client for shard in shards] == ["client-000", "client-001", "client-002"]
    assert sorted(shard.size for shard in shards) == [330, 330, 340]
    assert all(
        len({owner_of(ten, token) for token in shard.read(ten.tokens)}) == 4 for shard in shards
    )


def test_another_seed_gives_other_shards(ten):
    options = PartitionOptions(name="iid", clients=3, piece=10)
    one, two = (partition(ten, options, seed, 10)[0].spans for seed in (0, 1))
    assert not np.array_equal(one, two)


def test_quantity_follows_the_power_law(ten):
    sizes = [
        s.size
        for s in partition(
            ten, PartitionOptions(name="quantity", clients=4, exponent=1.0, piece=1), 0, 10
        )
    ]
    expected = 1000 / np.arange(1, 5) / (1 / np.arange(1, 5)).sum()
    assert np.abs(np.array(sizes) - expected).max() <= 1
    assert [
        s.size
        for s in partition(
            ten, PartitionOptions(name="quantity", clients=4, exponent=0.0, piece=1), 0, 10
        )
    ] == [250] * 4


def label_shares(prepared, alpha: float, seeds: int) -> float:
    """Mean over clients and seeds of how far a client's share of label 0 is from a half."""
    label_of = np.repeat([name == "label 0" for name in prepared.labels], np.diff(prepared.starts))
    options = PartitionOptions(name="dirichlet", clients=4, alpha=alpha, piece=5)
    distances = []
    for seed in range(seeds):
        try:
            shards = partition(prepared, options, seed, 1)
        except ConfigError:
            continue
        distances += [abs(label_of[shard.read(prepared.tokens)].mean() - 0.5) for shard in shards]
    return float(np.mean(distances))


def test_a_smaller_alpha_is_more_skewed(ten):
    even, skewed = label_shares(ten, 1000.0, 10), label_shares(ten, 0.3, 60)
    assert even < 0.05
    assert skewed > 0.2


def test_dirichlet_needs_labels(ten):
    labels, ten.labels = ten.labels, Names.of(["x"] * len(ten.labels))
    with pytest.raises(ConfigError, match=r"partition=dirichlet: ") as refused:
        partition(ten, PartitionOptions(name="dirichlet", clients=2), 0, 10)
    advises(
        refused.value,
        "set corpus.label_field for records, put files of text into sub-folders, or make sizes"
        " uneven with partition=quantity",
    )
    partition(ten, PartitionOptions(name="quantity", clients=2, piece=10), 0, 10)
    ten.labels = labels  # as records or sub-folders give them
    partition(ten, PartitionOptions(name="dirichlet", clients=2, piece=10), 0, 10)


def test_too_small_made_clients_name_the_count_and_the_smallest(ten):
    options = PartitionOptions(name="quantity", clients=15, exponent=2.0, piece=5)
    with pytest.raises(
        ConfigError,
        match=r"\d+ of 15 clients have fewer than 65 tokens \(the smallest, client-\d+, has \d+",
    ):
        partition(ten, options, 0, 65)


# partition, window -> what the message advises, in its own words
REMEDIES: list[tuple[dict[str, Any], int, list[str]]] = [
    ({"name": "natural", "clients": 3}, 450, ["lower model.block_size to 199"]),
    ({"name": "natural", "clients": 3}, 250, ["use 2 or fewer", "lower model.block_size to 199"]),
    ({"name": "iid", "clients": 40}, 65, ["clients=1,", "clients=7 partition.piece=17"]),
    ({"name": "iid", "clients": 10**6}, 65, ["clients=7 partition.piece=17"]),
    ({"name": "grouped", "clients": 4}, 300, ["clients=3", "block_size to 99"]),
    ({"name": "grouped", "clients": 4}, 150, ["clients=3", "block_size to 99"]),
    ({"name": "iid", "clients": 2}, 1500, ["piece=62, and lower model.block_size to 495"]),
    ({"name": "iid", "clients": 2, "piece": 10**6}, 65, ["clients", "set partition.piece=62"]),
    (
        {"name": "iid", "clients": 2, "min_tokens": 600},
        65,
        ["set partition.clients=1"],
    ),
    (
        {"name": "iid", "clients": 2, "min_tokens": 1500},
        600,
        ["piece=62, and lower model.block_size to 495 and partition.min_tokens to 496"],
    ),
    (
        {"name": "quantity", "clients": 8, "exponent": 3.0, "piece": 10},
        50,
        ["partition.clients=1", "set partition.exponent=0.5"],
    ),
    (
        {"name": "dirichlet", "clients": 8, "alpha": 0.1, "piece": 5},
        65,
        ["partition.clients=1", "set partition.alpha=10.0"],
    ),
    (
        {"name": "natural"},
        500,
        [
            "lower model.block_size to 399",
            "use partition=iid partition.clients=1 partition.piece=500, which divides all text",
        ],
    ),
    (
        {"name": "natural", "min_tokens": 450},
        65,
        ["lower partition.min_tokens to 400", "use partition=iid partition.clients=1"],
    ),
    (
        {"name": "natural", "clients": 9},
        65,
        ["use 4 or fewer (0 = all)", "use partition=iid partition.clients=7 partition.piece=65"],
    ),
    ({"name": "grouped", "clients": 9}, 65, ["clients=4", "or use partition=iid"]),
]


def follow(prepared, chosen: dict[str, Any], window: int, problem: str, remedy: str) -> None:
    """Do what a message advises: the partition is possible then."""
    chosen = dict(chosen)
    remedy = re.sub(r"^(lower it to|use) (?=\d)", "partition.clients=", remedy)
    for key, value in re.findall(r"([a-z_.]+)(?:=| to )(\w[\w.]*)", remedy):
        if key == "model.block_size":
            assert int(value) < window - 1
            window = int(value) + 1
        else:
            name = "name" if key == "partition" else key.removeprefix("partition.")
            chosen[name] = value if name == "name" else float(value) if "." in value else int(value)
    try:
        partition(prepared, PartitionOptions(**chosen), 0, window)
    except ConfigError as error:
        raise AssertionError(f"{problem}\n{remedy}") from error


def remedies_of(problem: str) -> list[str]:
    words = problem.partition("; ")[2]
    words = words.replace(" or fewer (0 = all)", "").replace(" or fewer", "")
    return [one.partition(", which")[0] for one in re.split(r",? or (?=lower|set|use|part)", words)]


@pytest.mark.parametrize("chosen, window, parts", REMEDIES)
def test_every_remedy_for_clients_with_too_little_text_helps(ten, chosen, window, parts):
    with pytest.raises(ConfigError) as caught:
        partition(ten, PartitionOptions(**chosen), 0, window)
    [problem] = caught.value.problems
    assert all(part in problem for part in parts), problem
    for remedy in remedies_of(problem):
        follow(ten, chosen, window, problem, remedy)


@settings(max_examples=12, deadline=None, phases=[Phase.generate])
@given(
    corpora(),
    st.sampled_from(["iid", "dirichlet", "quantity", "grouped", "natural"]),
    st.integers(1, 12),
    st.sampled_from([1, 5, 50, 1000]),
    st.integers(2, 80),
    st.sampled_from([0, 10, 70]),
)
def test_no_remedy_is_named_that_does_not_help(prepared, name, clients, piece, window, least):
    chosen: dict[str, Any] = {"name": name, "clients": clients, "piece": piece, "min_tokens": least}
    try:
        partition(prepared, PartitionOptions(**chosen), 0, window)
    except ConfigError as error:
        [problem] = error.problems
        if "have the same one" not in problem and not problem.endswith("add text"):
            for remedy in remedies_of(problem):
                follow(prepared, chosen, window, problem, remedy)


def test_far_too_many_clients_are_refused_without_making_them(ten, monkeypatch):
    def few(count):  # to make 10 ** 6 clients takes half a minute
        assert count <= 10_000
        return made_clients(count)

    monkeypatch.setattr("fedgpt.data.partitions.iid.made_clients", few)
    for clients in (16, 10**6):
        with pytest.raises(ConfigError, match=f"partition.clients={clients}: each needs 65 tokens"):
            partition(ten, PartitionOptions(name="iid", clients=clients), 0, 65)


@pytest.mark.parametrize("clients", [10, 1000, 1001])
def test_made_names_sort_as_numbers(clients):
    many = corpus([clients * 4], [0], [0], [CLIENTS])
    names = [
        shard.client
        for shard in partition(many, PartitionOptions(name="iid", clients=clients, piece=4), 0, 4)
    ]
    assert [int(name.removeprefix("client-")) for name in names] == list(range(clients))
    assert len({len(name) for name in names}) == 1


def test_pieces_may_run_over_the_end_of_a_document():
    prepared = corpus([7, 5, 9, 7], [0, 1, 2, 3], [0] * 4, [CLIENTS, PUBLIC, CLIENTS, CLIENTS])
    shards = partition(prepared, PartitionOptions(name="iid", clients=2, piece=10), 0, 1)
    dealt = np.sort(np.concatenate([shard.read(prepared.tokens) for shard in shards]))
    assert dealt.tolist() == [*range(7), *range(12, 28)]
    owner = next(shard for shard in shards if 6 in shard.read(prepared.tokens))
    # the first piece is the first document and the next one's start
    assert 12 in owner.read(prepared.tokens)


def test_wrong_options_are_refused_before_any_work():
    wrong = PartitionOptions(name="dirichlet", clients=0, alpha=0.0, piece=0, min_tokens=-1)
    text = "\n".join([*wrong.problems(), *PARTITIONS.problems(wrong)])
    for option in ("clients=0", "alpha=0.0", "piece=0", "min_tokens=-1"):
        assert f"partition.{option}" in text
    for options, words in (
        (PartitionOptions(name="quantity", clients=2, exponent=-1), "partition.exponent=-1"),
        (PartitionOptions(clients=-1), "partition.clients=-1"),
        (PartitionOptions(name="nature", clients=2), "did you mean 'natural'"),
    ):
        [problem] = [*options.problems(), *PARTITIONS.problems(options)]
        assert words in problem
    with pytest.raises(ConfigError, match=r"4 problems"):
        partition(corpus([5], [0], [0], [CLIENTS]), wrong, 0, 1)


def test_a_shard_reads_its_ranges_in_order():
    shard = Shard("a", np.array([[1, 3], [5, 6]]))
    assert shard.size == 3
    assert shard.read(np.arange(10, 20)).tolist() == [11, 12, 15]


def test_grouped_joins_natural_clients_evenly(ten):
    natural = {s.client: s for s in partition(ten, PartitionOptions(), 0, 1)}
    groups = partition(ten, PartitionOptions(name="grouped", clients=2), 0, 1)
    tokens = [set(s.read(np.arange(ten.tokens.size))) for s in groups]
    for shard in natural.values():
        owned = set(shard.read(np.arange(ten.tokens.size)))
        assert sum(owned <= group for group in tokens) == 1, "an owner's text stays together"
    sizes = sorted(s.size for s in groups)
    assert sizes[1] - sizes[0] <= max(s.size for s in natural.values())
    with pytest.raises(ConfigError, match="partition=grouped joins natural clients"):
        partition(ten, PartitionOptions(name="grouped", clients=99), 0, 1)


# ---- a partition from outside


def test_the_partitions_are_those_in_the_folder():
    assert PARTITIONS.names() == ["dirichlet", "grouped", "iid", "natural", "quantity"]


def test_a_partition_from_outside_is_built_from_its_name_and_arguments(ten):
    options = PartitionOptions(
        name="custom", _target_="outsider.Alternate", arguments={"clients": 5}
    )
    assert partition_of(options, ["outsider"]).clients == 5
    shards = partition(ten, options, 0, 1, ["outsider"])
    assert [(shard.client, shard.size) for shard in shards] == [
        (f"client-00{number}", 200) for number in range(5)
    ]
    assert PARTITIONS.problems(options)[0].startswith("partition._target_=outsider.Alternate: only")
    with pytest.raises(
        ConfigError, match=r"Alternate: 5 of 5 clients have fewer than 300"
    ) as error:
        partition(ten, options, 0, 300, ["outsider"])
    advises(error.value, "change partition.arguments")
    partition(ten, replace(options, arguments={"clients": 3}), 0, 300, ["outsider"])
    advises(error.value, "lower model.block_size to 199")
    partition(ten, options, 0, 200, ["outsider"])


def test_the_arguments_that_a_message_advises_for_a_custom_partition_help(ten):
    iid = {"name": "custom", "_target_": "fedgpt.data.partitions.iid.Iid"}
    with pytest.raises(ConfigError) as refused:
        partition(ten, PartitionOptions(**iid, arguments={"clients": 40}), 0, 65)
    advises(refused.value, "set clients: 1 in partition.arguments")
    partition(ten, PartitionOptions(**iid, arguments={"clients": 1}), 0, 65)


class Careless(Partition):
    """A partition whose `deal` violates the interface in the way that the spans say."""

    spans: ClassVar[Any] = {}

    def deal(self, documents, seed):
        return [Shard(name, np.array(spans)) for name, spans in self.spans]


@pytest.mark.parametrize(
    "spans, text",
    [
        ([], "makes no client"),
        ([("a", [[0, 100]]), ("a", [[100, 200]])], "makes two clients with the same name"),
        ([("a", [0, 100])], r"gives a spans that are not an array \(spans, 2\)"),
        ([("a", [[0, 100]]), ("b", [[99, 200]])], "assigns a token twice"),
        ([("a", [[0, 100], [50, 150]])], "assigns a token twice"),
        ([("a", [[300, 400]])], "gives . a token that is not in the clients' part"),  # it is public
        ([("a", [[299, 301]])], "gives . a token that is not in the clients' part"),
        ([("a", [[-5, 10]])], "gives . a token that is not in the clients' part"),
        ([("a", [[1100, 1300]])], "gives . a token that is not in the clients' part"),
        ([("a", [[100, 100]])], "gives . a span without tokens"),
        ([("a", [[200, 100]])], "gives . a span without tokens"),
        ([("a", [[0, 100]]), ("b", [[100, 105]])], "1 of 2 clients have fewer than 10 tokens"),
    ],
)
def test_invalid_shards_of_a_partition_are_refused(ten, spans, text, monkeypatch):
    monkeypatch.setattr(Careless, "spans", spans)
    options = PartitionOptions(name="custom", _target_=f"{__name__}.Careless")
    with pytest.raises(ConfigError, match=text):
        partition(ten, options, 0, 10, [__name__.partition(".")[0]])


@pytest.mark.parametrize(
    "dealt, text",
    [
        (None, "deal returned None; it must return a list of fedgpt.data.partitions.base.Shard"),
        (3, "deal returned 3; it must return a list"),
        (["ann"], "deal returned 'ann'; it must"),
        ([None], "deal returned None; it must"),
        (
            [Shard("ann", [[0, 100]])],
            "deal returned Shard(client='ann', spans=[[0, 100]]); it must",
        ),
        ([Shard(1, np.array([[0, 100]]))], "deal returned Shard(client=1, spans=array([[  0, 100]"),
        ([Shard("ann", np.array([[0.0, 9.0]]))], "deal returned Shard(client='ann'"),
        (map(int, ["x"]), "deal raised ValueError: invalid literal for int() with base 10: 'x'"),
    ],
)
def test_what_is_no_list_of_shards_is_refused(ten, dealt, text, monkeypatch):
    monkeypatch.setattr(Careless, "deal", lambda self, documents, seed: dealt)
    options = PartitionOptions(name="custom", _target_=f"{__name__}.Careless")
    with pytest.raises(ConfigError, match=re.escape(text)):
        partition(ten, options, 0, 10, [__name__.partition(".")[0]])


def test_a_partition_may_yield_its_shards(ten, monkeypatch):
    shard = Shard("ann", np.array([[0, 100]]))
    monkeypatch.setattr(Careless, "deal", lambda self, documents, seed: iter([shard]))
    options = PartitionOptions(name="custom", _target_=f"{__name__}.Careless")
    assert partition(ten, options, 0, 10, [__name__.partition(".")[0]]) == [shard]


def test_messages_count_in_the_singular_and_the_plural(ten):
    with pytest.raises(ConfigError, match=r"partition\.clients=-1: must be the number of largest"):
        partition(ten, PartitionOptions(clients=-1), 0, 10)
    with pytest.raises(
        ConfigError,
        match=r"the clients' part of the text has 1,000; lower model\.block_size to 999",
    ):
        partition(ten, PartitionOptions(name="iid", clients=1), 0, 5000)
