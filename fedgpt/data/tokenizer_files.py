"""The files of a Hugging Face tokenizer, and the settings in them.

    tokenizer.json            vocabulary, merges, how text is divided
    tokenizer_config.json     special tokens by their role, longest text, chat template
    special_tokens_map.json   special tokens by their role, in older folders
    chat_template.jinja       chat template, in newer folders; more in additional_chat_templates/

or vocab.json and merges.txt instead of the first one. The settings are kept for the user's other
tools, which get them back with the model of a run. Nothing in them is executed: a chat template is
text here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedgpt.core.errors import FedGPTError
from fedgpt.core.files import check_file, is_there, once, read_file, type_word

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Library
    from tokenizers import models

END = "<|endoftext|>"
TOKENIZER, CONFIG = "tokenizer.json", "tokenizer_config.json"
ROLES, TEMPLATE = "special_tokens_map.json", "chat_template.jinja"
MORE_TEMPLATES = "additional_chat_templates"
VOCABULARIES = TOKENIZER, "vocab.json", "merges.txt"
MOST_BYTES = 32 << 20  # of a file; a vocabulary of 200,000 tokens has about 28 MB
MOST_CHARACTERS = 2 * MOST_BYTES  # of a definition, in which the texts of files are quoted
NAMED = (
    *("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"),
)
LISTED = "additional_special_tokens", "extra_special_tokens"
# settings that are kept besides those of special tokens; the others are of one machine or version
KEPT = (
    *("added_tokens_decoder", "chat_template", "model_max_length", "clean_up_tokenization_spaces"),
    *("model_input_names", "padding_side", "truncation_side", "split_special_tokens"),
)
# what fedgpt writes for a tokenizer of its own
OWN = {
    "bos_token": END,
    "eos_token": END,
    "unk_token": END,
    "pad_token": END,
    "clean_up_tokenization_spaces": False,
}


def read_files(folder: Path) -> tuple[Path, dict[str, str]]:
    """The file that has the vocabulary, and the texts of the tokenizer's files by name.

    Of vocab.json and merges.txt it is the text of the tokenizer.json that equals them. Raises
    FedGPTError, naming the file, for what cannot be read, and ValueError for a wrong content.
    """
    path = folder / TOKENIZER
    pair = folder / "vocab.json", folder / "merges.txt"
    if not is_there(path) and any(map(is_there, pair)):
        path = pair[0]
        for part, other in (pair, pair[::-1]):
            if not is_there(part):
                raise FedGPTError(
                    f"{part} is missing, and {other.name} alone is no tokenizer; copy it from the"
                    " model's source into the folder"
                )
            _check_size(part)
    others = [folder / name for name in (CONFIG, ROLES, TEMPLATE) if is_there(folder / name)]
    others += sorted((folder / MORE_TEMPLATES).glob("*.jinja"))
    try:
        content = _of_pair(*pair) if path == pair[0] else _text(path)
    except (ValueError, RecursionError) as error:
        raise unreadable(path, error) from error
    return path, {
        TOKENIZER: content,
        **{str(one.relative_to(folder)): _text(one) for one in others},
    }


def unreadable(path: Path, error: Exception) -> FedGPTError:
    """The error for a file with a wrong content."""
    reason = " ".join(str(error).split())
    return FedGPTError(f"{path}: no tokenizer that fedgpt can read ({reason})")


def _text(path: Path) -> str:
    _check_size(path)
    try:
        return read_file(path).decode("utf-8")
    except ValueError as error:
        raise unreadable(path, error) from error


def _check_size(path: Path) -> None:
    check_file(path)
    if (size := path.stat().st_size) > MOST_BYTES:
        raise FedGPTError(f"{path} has {size:,} bytes, and no tokenizer has over {MOST_BYTES:,}")


def _of_pair(vocabulary: Path, merges: Path) -> str:
    """The content of the tokenizer.json that equals GPT-2's two files; raises ValueError."""
    from tokenizers import models

    more = vocabulary.parent / "added_tokens.json"
    if more.exists():
        raise ValueError(f"{more.name} adds to its vocabulary")
    try:
        model = models.BPE.from_file(str(vocabulary), str(merges))
    except Exception as error:  # the library raises no narrower class
        raise ValueError(f"with {merges.name}: {error}") from error
    json.loads(vocabulary.read_text(encoding="utf-8"), object_pairs_hook=once)
    return with_end(byte_level(model))


def byte_level(model: models.BPE) -> Library:
    """The library's tokenizer of texts as they are, without an end token."""
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, pre_tokenizers

    library = Library(model)
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    return library


def with_end(library: Library) -> str:
    """The content of a tokenizer.json, with the end token behind its vocabulary."""
    from tokenizers import AddedToken

    library.add_special_tokens([AddedToken(END, special=True, normalized=False)])
    return library.to_str()


def read_settings(files: Mapping[str, str]) -> dict[str, Any]:
    """The settings in a tokenizer's files that are kept; raises ValueError for wrong ones."""
    config, roles = (_mapping(files, name) for name in (CONFIG, ROLES))
    if config.get("auto_map"):
        raise ValueError(f"{CONFIG}: auto_map names Python code, and fedgpt runs none")
    if config.get("add_prefix_space"):
        raise ValueError(f"{CONFIG}: add_prefix_space is true, which adds a space to each text")
    config = roles | {name: value for name, value in config.items() if value is not None}
    if (template := _templates(files)) is not None:
        config["chat_template"] = template
    settings = {name: value for name, value in config.items() if _is_kept(name, value)}
    for name, value in settings.items():
        if name in LISTED and isinstance(value, dict):
            settings[name] = {role: content_of(name, each) for role, each in value.items()}
        elif name in LISTED:
            settings[name] = [content_of(name, each) for each in _list(name, value)]
        elif name.endswith("_token"):
            settings[name] = content_of(name, value)
    _check_template(settings.get("chat_template"))
    length = settings.get("model_max_length", 1)
    if type(length) not in (int, float) or not 0 < length < inf:
        raise ValueError(f"{CONFIG}: model_max_length is {length!r:.40}, and must be above 0")
    if not isinstance(settings.get("added_tokens_decoder", {}), dict):
        raise ValueError(f"{CONFIG}: added_tokens_decoder is no object")
    return settings


def special_tokens(settings: Mapping[str, Any]) -> Iterator[str]:
    """The texts of the tokens to which the settings give a role."""
    for name, value in settings.items():
        if name in LISTED:
            yield from value.values() if isinstance(value, dict) else value
        elif name.endswith("_token"):
            yield value


def content_of(name: str, token: Any) -> str:
    """The text of a token, which is a text or an object with `content`; raises ValueError."""
    content = token.get("content") if isinstance(token, dict) else token
    if not isinstance(content, str) or not content:
        raise ValueError(f"{CONFIG}: {name} is {type_word(token)} without a token's text")
    try:
        content.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{CONFIG}: {name} is no text of Unicode ({error})") from error
    return content


def _list(name: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{CONFIG}: {name} is {type_word(value)}, not a list")
    return value


def _mapping(files: Mapping[str, str], name: str) -> dict[str, Any]:
    try:
        found = json.loads(files.get(name, "{}"), object_pairs_hook=once)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{name} has {type_word(found)}, not an object")
    return found


def _is_kept(name: str, value: Any) -> bool:
    of_model = name.endswith("_token") and isinstance(value, str)  # such as image_token
    return value is not None and (name in (*KEPT, *NAMED, *LISTED) or of_model)


def _templates(files: Mapping[str, str]) -> Any:
    """The templates that are files of their own, as tokenizer_config.json has them; else None."""
    found = {
        Path(name).stem: text for name, text in files.items() if name.startswith(MORE_TEMPLATES)
    }
    if not found:
        return files.get(TEMPLATE)
    if TEMPLATE in files:
        found = {"default": files[TEMPLATE], **found}
    return [{"name": name, "template": text} for name, text in found.items()]


def _check_template(template: Any) -> None:
    entries = template if isinstance(template, list) and template else [None]
    named = all(
        isinstance(each, dict)
        and isinstance(each.get("name"), str)
        and isinstance(each.get("template"), str)
        for each in entries
    )
    if template is not None and not isinstance(template, str) and not named:
        raise ValueError(f"{CONFIG}: chat_template is no text, and no list of named templates")
