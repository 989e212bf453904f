"""The attributes of a Flower strategy as arrays in `state.memory`, and back."""

from __future__ import annotations

import copy
from numbers import Real
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord
from flwr.serverapp import strategy as stock

MEMORY = "flower"  # first part of the names in state.memory: flower.<attribute>.<kind>.<key>


def is_plain(value: object) -> bool:
    """Whether an attribute can be copied and compared; true for a function, because it does not
    change.
    """
    return callable(value) or _data(value)


def _data(value: object) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_data, value))
    if isinstance(value, dict):
        return all(isinstance(key, str) and _data(item) for key, item in value.items())
    return value is None or isinstance(value, bool | Real | str | bytes | np.ndarray | ArrayRecord)


def copied(attributes: dict[str, Any]) -> dict[str, Any]:
    """A deep copy, but functions are not copied: a bound method would copy its object."""
    return {
        name: value if callable(value) else copy.deepcopy(value)
        for name, value in attributes.items()
    }


def same(one: Any, two: Any) -> bool:
    """Whether two values have the same type and the same bits."""
    if type(one) is not type(two):
        return False
    if isinstance(one, np.ndarray):
        return one.dtype == two.dtype and one.shape == two.shape and one.tobytes() == two.tobytes()
    if isinstance(one, ArrayRecord):
        return same({k: a.numpy() for k, a in one.items()}, {k: a.numpy() for k, a in two.items()})
    if isinstance(one, dict):
        return list(one) == list(two) and all(same(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(same, one, two))
    return one is two or bool(one == two)


def _arrays(value: Any) -> dict[str, np.ndarray] | None:
    """The arrays in a container of a known type, by key; None for other types."""
    if isinstance(value, ArrayRecord):
        return {key: array.numpy() for key, array in value.items()}
    if isinstance(value, np.ndarray):
        return {"": value}
    if isinstance(value, list):
        value = {str(index): item for index, item in enumerate(value)}
    if (
        isinstance(value, dict)
        and value
        and all(isinstance(item, np.ndarray) for item in value.values())
    ):
        return value
    return None


def is_model(value: Any, params: np.ndarray) -> bool:
    """Whether a value is one array with the bits of `params`."""
    arrays = _arrays(value)
    return arrays is not None and len(arrays) == 1 and same(next(iter(arrays.values())), params)


def models_in(inner: stock.Strategy, params: np.ndarray) -> set[str]:
    """Names of the attributes that are the global model."""
    return {name for name, value in vars(inner).items() if is_model(value, params)}


_KINDS: dict[str, type] = {"record": ArrayRecord, "array": np.ndarray, "list": list, "dict": dict}


def encode(name: str, value: Any) -> dict[str, np.ndarray] | None:
    """An attribute as arrays named flower.<attribute>.<kind>.<key>; None for an unknown kind."""
    if value is None:
        return {f"{MEMORY}.{name}.none.": np.zeros(0, np.float32)}
    # not a Python number: it changes the dtype of the arrays that it is multiplied with
    if isinstance(value, np.generic):
        kind, arrays = "scalar", {"": np.asarray(value)}
    elif isinstance(value, bool | int | float):
        kind, arrays = "number", {"": np.asarray(value)}
    elif (arrays := _arrays(value)) is not None:
        kind = next(kind for kind, container in _KINDS.items() if isinstance(value, container))
    else:
        return None
    if any(array.dtype.kind not in "biuf" for array in arrays.values()):
        return None
    return {f"{MEMORY}.{name}.{kind}.{key}": np.array(array) for key, array in arrays.items()}


def decode(memory: dict[str, np.ndarray]) -> dict[str, Any]:
    """The attributes that `encode` stored in a state's memory."""
    attributes: dict[str, Any] = {}
    paths = [path for path in memory if path.startswith(f"{MEMORY}.")]
    # in this order the items of a list come in theirs
    for path in sorted(paths, key=lambda path: (len(path), path)):
        _, name, kind, key = path.split(".", 3)
        array = np.array(memory[path])  # a copy: strategies may write to it
        if kind == "none":
            attributes[name] = None
        elif kind == "number":
            attributes[name] = array.item()
        elif kind == "scalar":
            attributes[name] = array[()]
        elif kind == "array":
            attributes[name] = array
        elif kind == "list":
            attributes.setdefault(name, []).append(array)
        elif kind == "dict":
            attributes.setdefault(name, {})[key] = array
        else:
            attributes.setdefault(name, ArrayRecord())[key] = Array(array)
    return attributes
