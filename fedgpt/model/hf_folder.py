"""What a Hugging Face folder contains, read from config.json and the headers of its weight files.

No weights are read and torch is not imported, so a folder that does not fit is refused at once.
Only safetensors is read, never pickle.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import SafetensorError, safe_open

from fedgpt.core.errors import FedGPTError
from fedgpt.core.files import SUMS, check_file, is_there, read_file, read_json, sha256_of
from fedgpt.core.gguf_file import is_gguf
from fedgpt.core.options import ModelOptions
from fedgpt.model.families.base import Family, whole
from fedgpt.model.gguf import read_gguf
from fedgpt.model.hf_formats import FAMILIES
from fedgpt.model.shape import parameter_shapes

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
DTYPES = ("F64", "F32", "F16", "BF16")  # the names that safetensors gives them
GGUF = "GGUF"  # the dtype of a tensor in a GGUF file, whose formats gguf.py checks and reads
HEAD = "lm_head.weight"
# parts of names that torch.compile, DistributedDataParallel and FSDP add
WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "module.")


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: its name there, its shape and dtype."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class ModelFolder:
    """A model in a Hugging Face folder whose names and shapes fit its config.json."""

    path: Path
    family: Family
    options: ModelOptions
    vocab_size: int
    # by our name, in the order of Family.theirs; a tied head only if the file has it too
    parameters: Mapping[str, tuple[Stored, ...]]
    zeros: tuple[Stored, ...]  # biases that must be 0, because our model does not have them

    def check_sum(self) -> None:
        """Raise FedGPTError if the weights are not those that fedgpt exported to this folder.

        A folder that transformers wrote has no SHA256SUMS, and nothing to compare with.
        """
        sums = self.path / SUMS
        if is_gguf(self.path) or not is_there(sums):
            return
        text = read_file(sums).decode("utf-8", errors="replace")
        lines = [line.split(maxsplit=1) for line in text.splitlines()]
        for path in sorted({part.path for parts in self.parameters.values() for part in parts}):
            if [sha256_of(path), path.relative_to(self.path).as_posix()] not in lines:
                raise FedGPTError(
                    f"{path} is damaged: its sha256 is not in {SUMS}; copy the folder again, or"
                    f" delete {SUMS} if you replaced the weights yourself"
                )


def read_folder(folder: str | Path) -> ModelFolder:
    """Read config.json, the index if there is one, and the headers of the weight files; or the
    header of a GGUF file, which has all of it.

    Raises FedGPTError, naming file and reason, for what is missing, damaged or unsupported.
    """
    folder = Path(folder)
    if is_gguf(folder):
        model = read_gguf(folder)
        tensors = {
            name: Stored(folder, name, tensor.shape, GGUF) for name, tensor in model.tensors.items()
        }
        return _fitting(folder, folder, _understood(folder, model.config), tensors)
    config = folder / CONFIG
    if not is_there(config):
        raise FedGPTError(
            f"{folder}: no {CONFIG}; expected a Hugging Face folder with {CONFIG} and {WEIGHTS}"
        )
    about = _understood(config, read_json(config))
    tensors, source = _read_headers(folder)
    return _fitting(folder, source, about, tensors)


Understood = tuple[Family, ModelOptions, int]  # with the rows of the embedding


def _fitting(
    folder: Path, source: Path, about: Understood, tensors: Mapping[str, Stored]
) -> ModelFolder:
    """The model whose tensors are those that its config.json needs; `source` has the tensors."""
    family, options, vocab_size = about
    if options.n_layer > len(tensors):  # before the names of that many layers are listed
        raise FedGPTError(
            f"{source} does not fit config.json: it has {len(tensors)} tensors for"
            f" {options.n_layer} layers"
        )
    shapes = parameter_shapes(options, vocab_size)
    zeros = family.zeros(options)
    # our name -> names in the files; NeoX's head has another name in files than in the module
    theirs = {name: family.theirs(name) for name in (*shapes, *zeros)}
    expected = {part: part for parts in theirs.values() for part in parts}
    expected |= {HEAD: theirs[HEAD][0]}
    found: dict[str, Stored] = {}  # by the name that `theirs` has
    unexpected: list[str] = []
    for name, stored in tensors.items():
        if name.endswith(family.skipped):
            continue
        known = expected.get(family.full(name))
        if known is None:
            unexpected.append(name)
        elif known in found:
            raise FedGPTError(f"{source}: {found[known].name} and {name} are the same parameter")
        else:
            found[known] = stored
    optional = {HEAD} if options.tie else set()
    missing = sorted(
        part for name in shapes.keys() - optional for part in theirs[name] if part not in found
    )
    if missing or unexpected:
        raise FedGPTError(
            f"{source} does not fit config.json: missing {missing[:5]}, unexpected"
            f" {sorted(unexpected)[:5]}{_wrapped(unexpected, set(expected), family)}"
        )
    parameters: dict[str, tuple[Stored, ...]] = {}
    for name, shape in {**zeros, **shapes}.items():
        parts = tuple(found[part] for part in theirs[name] if part in found)
        needed = family.stored_shapes(name, shape, options)
        for stored, one in zip(parts, needed, strict=False):
            _check_tensor(stored, one)
        if parts:
            parameters[name] = parts
    extra = tuple(parameters.pop(name)[0] for name in zeros if name in parameters)
    return ModelFolder(folder, family, options, vocab_size, parameters, extra)


def _understood(path: Path, config: Mapping[str, Any]) -> Understood:
    """What config.json says, or another file at `path` in its words."""
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        *others, last = FAMILIES
        allowed = f"{', '.join(others)} and {last}"
        raise FedGPTError(f"{path}: model_type={kind!r} is not supported; allowed are {allowed}")
    try:
        if config.get("quantization_config") is not None:
            raise ValueError("quantization_config: save the model in float32, float16 or bfloat16")
        options, vocab_size = FAMILIES[kind].options(dict(config)), whole(config, "vocab_size")
    except ValueError as problem:
        raise FedGPTError(f"{path} is not supported: {problem}") from None
    if problems := list(options.problems()):
        raise FedGPTError(f"{path} is not supported: {'; '.join(problems)}")
    return FAMILIES[kind], options, vocab_size


def _read_headers(folder: Path) -> tuple[dict[str, Stored], Path]:
    """All tensors by name, and the file to name for what is wrong with them together.

    As in transformers, one file of weights comes before an index of several.
    """
    single, index = folder / WEIGHTS, folder / INDEX
    if is_there(single):
        return {stored.name: stored for stored in _read_header(single)}, single
    if not is_there(index):
        others = sorted(path.name for path in folder.glob("*.bin"))
        instead = f" ({', '.join(others[:3])} is pickle)" if others else ""
        raise FedGPTError(
            f"{single} is missing, and {INDEX} too; only safetensors is read{instead}, save with"
            " save_pretrained(...) anew"
        )
    tensors: dict[str, Stored] = {}
    shard_of = _read_index(index)
    for shard in sorted(set(shard_of.values())):
        if not is_there(folder / shard):
            raise FedGPTError(f"{index}: {shard!r} is missing")
        for stored in _read_header(folder / shard):
            if stored.name in tensors:
                first = tensors[stored.name].path.name
                raise FedGPTError(f"{index}: {stored.name!r} is in both {first} and {shard}")
            tensors[stored.name] = stored
    for name, shard in shard_of.items():
        if name not in tensors or tensors[name].path != folder / shard:
            raise FedGPTError(f"{index}: {name!r} is not in {shard}")
    return tensors, index


def _read_index(path: Path) -> dict[str, str]:
    """Name of each tensor -> name of its file, inside the folder."""
    shard_of = read_json(path).get("weight_map")
    if not isinstance(shard_of, dict) or not shard_of:
        raise FedGPTError(f"{path} is damaged: weight_map is missing, empty or no mapping")
    for shard in shard_of.values():
        if not isinstance(shard, str) or not shard:
            raise FedGPTError(f"{path} is damaged: weight_map has {shard!r} for a file's name")
        parts = PurePosixPath(shard)
        if parts.is_absolute() or ".." in parts.parts:
            raise FedGPTError(f"{path}: {shard!r} is outside the folder")
    return shard_of


def _read_header(path: Path) -> list[Stored]:
    check_file(path)
    try:
        with safe_open(path, framework="numpy") as opened:
            names = list(opened.keys())
            parts = {name: opened.get_slice(name) for name in names}
            return [
                Stored(path, name, tuple(part.get_shape()), part.get_dtype())
                for name, part in parts.items()
            ]
    except (SafetensorError, OSError) as error:
        raise FedGPTError(f"{path} is damaged: {' '.join(str(error).split())}") from None


def _check_tensor(stored: Stored, shape: tuple[int, ...]) -> None:
    if stored.shape != shape:
        raise FedGPTError(
            f"{stored.path}: {stored.name} has shape {stored.shape}, config.json says {shape}"
        )
    if stored.dtype not in (*DTYPES, GGUF):
        raise FedGPTError(
            f"{stored.path}: {stored.name} has dtype {stored.dtype}; allowed are"
            f" {', '.join(DTYPES)}"
        )


def _wrapped(names: Sequence[str], expected: set[str], family: Family) -> str:
    """What to do about unexpected names that would fit without a part that a wrapper added."""
    parts = names[0].split(".") if names else []
    starts = [".".join(parts[:end]) + "." for end in range(1, len(parts))]
    for extra in (*WRAPPERS, *starts):
        if names and all(family.full(name.replace(extra, "")) in expected for name in names):
            return (
                f"; the names fit without {extra!r}, which a wrapper of the model added: save the"
                " model that is inside, or rename the tensors (with safetensors.torch:"
                f" save_file({{n.replace({extra!r}, ''): p for n, p in load_file(f).items()}}, f,"
                " {'format': 'pt'}))"
            )
    return ""
