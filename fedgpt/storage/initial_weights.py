"""The weights that a run starts from: a fresh model's, or those of one that was trained before, on
public text say.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np

from fedgpt.core.errors import ConfigError, FedGPTError
from fedgpt.core.flat import flatten
from fedgpt.core.options import RunOptions
from fedgpt.core.seeds import derive_seed
from fedgpt.data.tokenizer import Tokenizer, load_tokenizer
from fedgpt.model.gpt import GPT
from fedgpt.model.hf import import_model

FREE = {"dropout", "bias", "trainable"}  # may differ, as long as the parameters are the same ones


def initial_weights(o: RunOptions, tokenizer: Tokenizer) -> np.ndarray:
    """(parameters,) float32: by the run's seed, or from `init_from`, a run's folder or a Hugging
    Face folder.

    Raises ConfigError where that model or its tokenizer is another one.
    """
    model = GPT(o.model, tokenizer.vocab_size)
    if o.init_from is None:
        model.init_weights(derive_seed(o.seed, "init"))
        return flatten(model)[1].numpy()
    folder = Path(o.init_from)
    folder = folder / "model" if (folder / "model" / "config.json").is_file() else folder
    try:
        found = import_model(folder)
    except FedGPTError as error:
        raise ConfigError(f"init_from={o.init_from}: {error}") from error
    if problems := _differences(o, found, model, folder, tokenizer):
        raise ConfigError(problems)
    return flatten(found.float())[1].numpy()


def _differences(
    o: RunOptions, found: GPT, model: GPT, folder: Path, tokenizer: Tokenizer
) -> list[str]:
    where = f"init_from={o.init_from}"
    theirs, ours = asdict(found.options), asdict(model.options)
    problems = [
        f"{where}: its model.{name} is {theirs[name]}, this run's is {ours[name]}; set"
        f" model.{name}={theirs[name]}"
        for name in ours
        if name not in FREE and theirs[name] != ours[name]
    ]
    if (folder / "tokenizer.json").is_file():
        if load_tokenizer(folder).digest != tokenizer.digest:
            problems.append(
                f"{where}: has another tokenizer; train both with tokenizer=bytes, which all runs"
                " share"
            )
    elif found.vocab_size != model.vocab_size:
        problems.append(
            f"{where}: has {found.vocab_size} tokens, this run's tokenizer has {model.vocab_size}"
        )
    if not problems and flatten(found)[0] != flatten(model)[0]:
        problems.append(
            f"{where}: has other parameters (model.bias, model.tie); set them as that model has"
            " them"
        )
    return problems
