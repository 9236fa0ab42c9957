"""A kind of model that can be loaded from a folder: how it is recognised, built and how its file names its weights.

One more model is one more file with a layout (`layout.py`) and a `Family`, entered in `checkpoint.FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from .layout import Layout
from .text import Text
from .unified import UnifiedModel
from .weights import CheckpointError

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Family:
    """One kind of model and its folders.

    recognises(config) says whether a config.json is of this kind, text(config) gives (size, eot id, eot's name) of its text
    vocabulary, layout(config, text) makes the layout, build(config, layout, shapes) the model with fresh weights (shapes: those in
    the file, by key, or none), and describe(model) is the config.json that a saved model gets. prefixes: beginnings of the file's
    keys -> of the state dict's, the first that fits counts; None marks what belongs to another part. Saving takes the last that fits.
    """

    name: str
    folder: str
    """What such a folder looks like, in words, for messages."""
    recognises: Callable[[dict], bool]
    text: Callable[[dict], tuple[int, int, str]]
    layout: Callable[[dict, Text], Layout]
    build: Callable[[dict, Layout, Shapes], UnifiedModel]
    describe: Callable[[UnifiedModel], dict]
    prefixes: Mapping[str, str | None]

    def ours(self, key: str) -> str | None:
        """The entry of `UnifiedModel.state_dict()` that a key of the file fills."""
        for theirs, ours in self.prefixes.items():
            if key.startswith(theirs):
                return None if ours is None else ours + key[len(theirs):]
        return key

    def theirs(self, key: str) -> str:
        """The file's key for an entry of the state dict."""
        return next(theirs + key[len(ours):] for theirs, ours in reversed(self.prefixes.items()) if ours and key.startswith(ours))


def setting(config: dict, name: str) -> object:
    """A setting that config.json must have. Raises `CheckpointError`."""
    if config.get(name) is None:
        raise CheckpointError(f"config.json has no {name!r}; it has {', '.join(sorted(config)[:12])}. Use the config.json that belongs to the weights.")
    return config[name]


def settings(config: dict, names: Mapping[str, str]) -> dict:
    """Those settings that config.json has, under our own names: {its name: ours}."""
    return {ours: config[theirs] for theirs, ours in names.items() if config.get(theirs) is not None}


def special_ids(config: dict, names: Mapping[str, str], text: Text | None = None, released: Mapping[str, int] | None = None) -> dict[str, int]:
    """Ids of special tokens, {our name: how the tokenizer spells it}.

    Looked up in config.json (NAME_token_id, or its vocabulary_map), then in the text tokenizer; where that does not name all of
    them, those of the released model hold, if given. Raises `CheckpointError`.
    """
    vocabulary = config.get("vocabulary_map") or (text.tokenizer.get_vocab() if hasattr(text, "tokenizer") else {})
    found = {name: config.get(f"{name}_token_id", vocabulary.get(spelled)) for name, spelled in names.items()}
    lacking = [name for name, i in found.items() if i is None]
    if lacking and released is None:
        raise CheckpointError(f"Nothing says which ids the special tokens {', '.join(lacking)} have. Add {lacking[0]}_token_id to config.json, or give "
                              f"text=, a tokenizer that knows {names[lacking[0]]!r}.")
    return dict(released) if lacking else found


def agree(config: dict, found: Iterable[tuple[str, int]]) -> None:
    """Raises `CheckpointError` when config.json says other sizes than follow from the rest of it."""
    for name, value in found:
        if config.get(name, value) != value:
            raise CheckpointError(f"config.json contradicts itself: {name} is {config[name]}, its other settings make it {value}.")
