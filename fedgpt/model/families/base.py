"""What a family of models says about its Hugging Face folders: config.json and the weight files.

A family is a subclass of `Family`: what config.json means in our options and what our options are
in config.json, the names of the tensors, and how a tensor is laid out. Most of it has a default.
Free of torch, so that a folder can be checked before torch is imported.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from fedgpt.core.options import ModelOptions
from fedgpt.core.options.option import KINDS, is_a

if TYPE_CHECKING:
    from torch import Tensor

# Hugging Face's names of activations -> model.gelu
GELUS = {
    "gelu": "exact",
    "gelu_python": "exact",
    "gelu_new": "tanh",
    "gelu_pytorch_tanh": "tanh",
}


class Family(ABC):
    """One `model_type`."""

    prefix: ClassVar[str] = ""  # start of the names, which some files leave out
    names: ClassVar[Mapping[str, str]] = {}  # parts of our names -> parts of the file's
    transposed: ClassVar[tuple[str, ...]] = ()  # ends of names: matrices stored as (in, out)
    skipped: ClassVar[tuple[str, ...]] = ()  # ends of names in old files that are no parameters

    @abstractmethod
    def fits(self, options: ModelOptions) -> bool:
        """Whether this family computes what `options`, in which nothing is null, describe."""

    @abstractmethod
    def config(self, options: ModelOptions, vocab_size: int) -> dict[str, Any]:
        """config.json of a model with `vocab_size` rows of the embedding."""

    @abstractmethod
    def options(self, config: dict[str, Any]) -> ModelOptions:
        """The options that config.json describes; raises ValueError for what our model does not
        compute.
        """

    def theirs(self, name: str) -> tuple[str, ...]:
        """The names in a file of the tensors that, one below the other, are our parameter."""
        for ours, theirs in self.names.items():
            name = name.replace(ours, theirs)
        return (name,)

    def full(self, name: str) -> str:
        """A name in a file, with the prefix that some files leave out."""
        return name if name.startswith((self.prefix, "lm_head.")) else self.prefix + name

    def zeros(self, options: ModelOptions) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the tensors that a file contains and our model does not have."""
        return {}

    def stored_shapes(
        self, name: str, shape: tuple[int, ...], options: ModelOptions
    ) -> tuple[tuple[int, ...], ...]:
        """The shapes in a file of the tensors `theirs(name)`; `shape` is our parameter's."""
        return (shape[::-1] if name.endswith(self.transposed) else shape,)

    def to_file(self, name: str, p: Tensor, options: ModelOptions) -> tuple[Tensor, ...]:
        """A parameter as the tensors `theirs(name)` of a file."""
        return (p.t() if name.endswith(self.transposed) else p,)

    def from_file(self, name: str, parts: tuple[Tensor, ...], options: ModelOptions) -> Tensor:
        """The inverse of `to_file`; `name` is ours."""
        (p,) = parts
        return p.t() if name.endswith(self.transposed) else p


def value(config: Mapping[str, Any], name: str, kind: type) -> Any:
    """The value `name` of config.json; raises ValueError unless it is there and of this kind."""
    if name not in config:
        raise ValueError(f"{name} is missing")
    if not is_a(config[name], kind):
        words = KINDS.get(kind, "a mapping")
        raise ValueError(f"{name}={config[name]!r}: must be {words}")
    return config[name]


def whole(config: Mapping[str, Any], name: str) -> int:
    """The whole number `name`, which config.json must have; raises ValueError below 1."""
    number = value(config, name, int)
    if number < 1:
        raise ValueError(f"{name}={number}: must be at least 1")
    return number


def unless(config: Mapping[str, Any], name: str, usual: int) -> int | None:
    """The whole number `name`, or None if it is null, missing or what it usually is."""
    number = usual if config.get(name) is None else whole(config, name)
    return None if number == usual else number


def check_fixed(config: Mapping[str, Any], fixed: Mapping[str, Any]) -> None:
    """Raise ValueError if a setting has another value than the one that our model computes."""
    for name, needed in fixed.items():
        if config.get(name, needed) != needed:
            raise ValueError(f"{name}={config[name]!r}: must be {needed!r}")


def one_rate(config: Mapping[str, Any], *names: str) -> float:
    """The dropout rate that all `names` have; raises ValueError if they differ."""
    rates = {value(config, name, float) for name in names}
    if len(rates) > 1:
        *others, last = names
        raise ValueError(f"{', '.join(others)} and {last} are {sorted(rates)}: must be one rate")
    return float(rates.pop())


def gelu(config: Mapping[str, Any], name: str) -> str:
    """model.gelu of an activation; raises ValueError for another one."""
    activation = value(config, name, str)
    if activation not in GELUS:
        raise ValueError(f"{name}={activation!r}: must be one of {', '.join(GELUS)}")
    return GELUS[activation]


def rope(config: dict[str, Any], **names: str) -> dict[str, Any]:
    """`config` with the settings of rotary positions under their own names, wherever they are.

    transformers 5 has them in rope_parameters, earlier versions on top and in rope_scaling. `names`
    are what the family calls them on top. Raises ValueError for scaled positions, whose angles our
    model does not compute.
    """
    place = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    inside: dict[str, Any] = value(config, place, dict) if config.get(place) else {}
    kind = inside.get("rope_type", inside.get("type", "default"))
    if kind != "default":
        raise ValueError(
            f"{place} has rope_type={kind!r}: scaled rotary positions are not supported; it must be"
            " 'default'"
        )
    return config | {names.get(name, name): inside[name] for name in inside}


def with_bias(options: ModelOptions) -> set[bool]:
    """Whether the linear layers have biases: one value, or both if they differ."""
    return {options.has_bias(part) for part in ("qkv", "mlp", "output")}
