"""The weights that a run starts from."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedgpt.core.errors import ConfigError
from fedgpt.core.options import ModelOptions, RunOptions, TokenizerOptions
from fedgpt.data.tokenizer import make_tokenizer
from fedgpt.model.gpt import GPT
from fedgpt.model.hf import export_model
from fedgpt.storage.initial_weights import check_weights, initial_weights

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
    tokenizer = TokenizerOptions("bytes")
    return RunOptions(seed=3, init_from=init_from, model=ModelOptions(**shape), tokenizer=tokenizer)


def exported(folder, tokenizer=BYTES, **model) -> GPT:
    gpt = GPT(options(**model).model, tokenizer.vocab_size)
    gpt.init_weights(99)
    export_model(folder, gpt)
    tokenizer.save(folder)
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


def test_options_that_change_no_weight_may_differ(tmp_path):
    exported(tmp_path, dropout=0.3)
    o = options(str(tmp_path), dropout=0.1, trainable=["transformer.ln_f.*"])
    whole = initial_weights(options(str(tmp_path), dropout=0.3), BYTES)
    trained = initial_weights(o, BYTES)
    assert trained.size == 32, "weight and bias of ln_f"
    np.testing.assert_array_equal(trained, whole[-trained.size :])


def test_a_damaged_model_is_refused_by_the_name_of_the_option_and_of_the_file(tmp_path):
    exported(tmp_path / "model")
    o = options(str(tmp_path))
    check_weights(o)
    (tmp_path / "model" / "model.safetensors").write_bytes(b"")
    for read in (check_weights, lambda o: initial_weights(o, BYTES)):
        with pytest.raises(ConfigError) as caught:
            read(o)
        assert caught.value.problems == [f"init_from={tmp_path}: model/model.safetensors is empty"]


def test_weights_that_are_not_finite_are_found_before_the_run(tmp_path):
    gpt = exported(tmp_path)
    with torch.no_grad():
        gpt.lm_head.weight[3, 2] = torch.nan
    export_model(tmp_path, gpt)
    with pytest.raises(
        ConfigError, match=r"model\.safetensors: transformer\.wte\.weight has values"
    ):
        check_weights(options(str(tmp_path)))
