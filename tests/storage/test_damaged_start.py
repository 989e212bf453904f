"""Any damage to any file of a model folder: one message that names it, or the same weights."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from fedgpt.core.errors import ConfigError
from fedgpt.core.options import ModelOptions, RunOptions, TokenizerOptions
from fedgpt.data.tokenizer import make_tokenizer
from fedgpt.model.gpt import GPT
from fedgpt.model.hf import export_model
from fedgpt.storage.init_from import check_tokenizer, init_from_problems
from fedgpt.storage.initial_weights import check_weights, initial_weights

WEIGHTS = "model.safetensors"
TOKENIZER = make_tokenizer(TokenizerOptions("bytes"), [])
FAMILIES = {"gpt2": {"positions": "learned"}, "gpt_neox": {}, "fedgpt": {"norm": "rmsnorm"}}
Files = dict[str, bytes]


def model_options(family: str) -> ModelOptions:
    return ModelOptions(n_layer=1, n_head=2, n_embd=8, block_size=8, **FAMILIES[family])


def files_of(folder: Path) -> Files:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def made(family: str, own: bool) -> tuple[Files, np.ndarray]:
    """The files of a folder, and its weights: our own export, or shards without a checksum."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = GPT(model_options(family), TOKENIZER.vocab_size)
        model.init_weights(3)
        export_model(folder, model)
        TOKENIZER.save(folder, 8)
        if not own:
            weights = load_file(folder / WEIGHTS)
            shard_of = {key: f"{'ab'[n % 2]}.safetensors" for n, key in enumerate(weights)}
            for shard in set(shard_of.values()):
                part = {key: p for key, p in weights.items() if shard_of[key] == shard}
                save_file(part, folder / shard)
            index = json.dumps({"metadata": {"total_size": 1}, "weight_map": shard_of})
            (folder / f"{WEIGHTS}.index.json").write_text(index)
            for leftover in (WEIGHTS, "SHA256SUMS"):
                (folder / leftover).unlink()
        return files_of(folder), initial_weights(options(folder, family), TOKENIZER)


def options(folder: Path, family: str) -> RunOptions:
    return RunOptions(
        init_from=str(folder), model=model_options(family), tokenizer=TokenizerOptions("bytes")
    )


FOLDERS = {(family, own): made(family, own) for family in FAMILIES for own in (True, False)}
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)
how = st.sampled_from(["cut", "empty", "flip", "utf-16", "latin-1", "insert", "json", "gone"])


def damaged(data: st.DataObject, content: bytes, damage: str) -> bytes:
    if damage == "cut":
        return content[: data.draw(st.integers(0, len(content) - 1), "kept")]
    if damage in ("flip", "insert"):
        # half of the places are at the start, where headers and most of the structure are
        place = data.draw(
            st.integers(0, min(400, len(content) - 1)) | st.integers(0, len(content) - 1), "place"
        )
        if damage == "insert":
            return content[:place] + data.draw(st.binary(min_size=1, max_size=9)) + content[place:]
        flipped = bytearray(content)
        flipped[place] ^= 1 << data.draw(st.integers(0, 7), "bit")
        return bytes(flipped)
    if damage in ("utf-16", "latin-1"):
        text = content.decode("utf-8", errors="replace") + "é"
        return text.encode(damage, errors="replace")
    return changed_json(data, content) if damage == "json" else b""


def changed_json(data: st.DataObject, content: bytes) -> bytes:
    """Another value of any type somewhere in the document; a header of weights stays a header."""
    header = len(content) > 8 and content[8:9] == b"{"
    length = int.from_bytes(content[:8], "little") if header else len(content)
    text, rest = (content[8 : 8 + length], content[8 + length :]) if header else (content, b"")
    try:
        document: Any = json.loads(text)
    except ValueError:
        return text[::-1]
    places = list(places_in(document))
    parent, key = data.draw(st.sampled_from(places), "place") if places else ([document], 0)
    parent[key] = data.draw(json_values, "value")
    changed = json.dumps(document).encode()
    return len(changed).to_bytes(8, "little") + changed + rest if header else changed


def places_in(node: Any, depth: int = 0) -> Any:
    """Each place in a document; of a long list or mapping only the start."""
    keys = list(node) if isinstance(node, dict) else []
    keys = list(range(len(node))) if isinstance(node, list) else keys
    for key in keys[:30]:
        yield node, key
        if depth < 4:
            yield from places_in(node[key], depth + 1)


@pytest.mark.parametrize("own", [True, False], ids=["our export", "shards"])
@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_damaged_file_is_named_or_changes_nothing(data, family, own):
    files, expected = FOLDERS[family, own]
    name = data.draw(st.sampled_from(sorted(files)), "file")
    damage = data.draw(how, "damage")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for each, content in files.items():
            (folder / each).write_bytes(content)
        if damage == "gone":
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(damaged(data, files[name], damage))
        o = options(folder, family)
        before = list(init_from_problems(o))
        try:
            check_weights(o)
            check_tokenizer(o, TOKENIZER)
            found = initial_weights(o, TOKENIZER)
        except ConfigError as error:
            check_message(error, folder, name)
            return
    assert not before
    if own or not name.endswith(".safetensors"):
        np.testing.assert_array_equal(found, expected)
    assert found.shape == expected.shape and np.isfinite(found).all()


def check_message(error: ConfigError, folder: Path, name: str) -> None:
    for problem in error.problems:
        assert problem.startswith(f"init_from={folder}: ") and "\n" not in problem
        reason = problem.removeprefix(f"init_from={folder}: ")
        assert str(folder) not in reason
        # other options than the run's are named as options
        known = [re.escape(name), "has another tokenizer"]
        known += ["its model\\.", "its vocab_size"] if name == "config.json" else []
        assert re.search("|".join(known), reason), reason


def test_the_undamaged_folders_give_the_same_weights_in_all_forms():
    for family in FAMILIES:
        one, other = FOLDERS[family, True][1], FOLDERS[family, False][1]
        np.testing.assert_array_equal(one, other)
        assert one.dtype == np.float32 and torch.from_numpy(one).std() > 0
