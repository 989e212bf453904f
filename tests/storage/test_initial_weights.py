"""The weights that a run starts from."""

from __future__ import annotations

import numpy as np
import pytest

from fedgpt.core.errors import ConfigError, FedGPTError
from fedgpt.core.options import ModelOptions, RunOptions, TokenizerOptions
from fedgpt.data.tokenizer import make_tokenizer
from fedgpt.model.gpt import GPT
from fedgpt.model.hf import export_model
from fedgpt.storage.initial_weights import initial_weights

BYTES = make_tokenizer(TokenizerOptions("bytes"), [])


def options(init_from=None, **model) -> RunOptions:
    shape = {
        "n_layer": 1,
        "n_head": 2,
        "n_embd": 16,
        "block_size": 8,
        "positions": "learned",
        **model,
    }
    return RunOptions(seed=3, init_from=init_from, model=ModelOptions(**shape))


def exported(folder, tokenizer=BYTES, **model) -> GPT:
    gpt = GPT(options(**model).model, tokenizer.vocab_size)
    gpt.init_weights(99)
    tokenizer.save(folder / "tokenizer")
    export_model(folder, gpt, folder / "tokenizer")
    return gpt


def test_initial_weights_follow_from_the_seed():
    one, two = initial_weights(options(), BYTES), initial_weights(options(), BYTES)
    np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("model", [{}, {"positions": "rotary"}, {"norm": "rmsnorm"}], ids=str)
@pytest.mark.parametrize("inside", ["", "model"])
def test_a_folder_of_a_model_or_a_run_gives_its_weights(tmp_path, model, inside):
    exported(tmp_path / inside, **model)
    o = options(str(tmp_path), **model)
    gpt = GPT(o.model, BYTES.vocab_size)
    gpt.init_weights(99)
    from fedgpt.core.flat import flatten

    np.testing.assert_array_equal(initial_weights(o, BYTES), flatten(gpt)[1].numpy())


def test_every_difference_is_reported_with_what_to_set(tmp_path):
    exported(tmp_path, n_embd=32, block_size=16)
    with pytest.raises(ConfigError) as error:
        initial_weights(options(str(tmp_path)), BYTES)
    assert "its model.n_embd is 32, this run's is 16; set model.n_embd=32" in str(error.value)
    assert "model.block_size=16" in str(error.value)


def test_another_tokenizer_is_refused(tmp_path):
    bpe = make_tokenizer(
        TokenizerOptions("bpe", 300), ["some public text, some more public text"] * 20
    )
    exported(tmp_path, bpe)
    with pytest.raises(ConfigError, match="has another tokenizer"):
        initial_weights(options(str(tmp_path)), BYTES)


def test_a_folder_without_a_model_is_refused(tmp_path):
    nothing = str(tmp_path / "nothing")
    with pytest.raises(FedGPTError, match=r"no config\.json") as caught:
        initial_weights(options(nothing), BYTES)
    assert str(caught.value).count(nothing) == 1, "the path is named once"
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(FedGPTError, match=r"init_from=\S+: config\.json is damaged") as caught:
        initial_weights(options(str(tmp_path)), BYTES)
    assert str(caught.value).count(str(tmp_path)) == 1
