"""Tokens that a checkpoint's folder declares beside tokenizer.json, added with the ids that AutoTokenizer gives them.

They stand in tokenizer_config.json (`added_tokens_decoder`, `extra_special_tokens` and its older name
`additional_special_tokens`, `*_token`), or in files of older folders, special_tokens_map.json and added_tokens.json,
which count where the former has no `added_tokens_decoder`. What is not in the tokenizer gets the next free ids: first
what `added_tokens_decoder` or added_tokens.json lists, then the named tokens, then the extra ones.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from hotplug.core.errors import ModelError
from hotplug.core.text.json_scan import LONE_SURROGATE
from hotplug.core.weights.metadata import read_json_object

_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")
_CONFIG, _MAP, _ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
_EXTRA, _EXTRA_BEFORE = "extra_special_tokens", "additional_special_tokens"


Declared = str | AddedToken
"""A token as it is declared: by its text alone, which makes it special, or with flags."""


@dataclass(slots=True)
class DeclaredTokens:
    """What the files beside tokenizer.json say of tokens."""

    config: dict[str, Any]
    """tokenizer_config.json."""
    named: dict[str, Declared] = field(default_factory=dict)
    """By role: bos_token, eos_token, ..., and those of a model's own, as image_token."""
    extra: list[Declared] = field(default_factory=list)
    by_id: dict[int, AddedToken] = field(default_factory=dict)
    by_id_is_legacy: bool = False
    """Whether that comes from added_tokens.json, whose ids yield to those in tokenizer.json."""
    legacy_names: dict[str, str] = field(default_factory=dict)
    """Roles that only special_tokens_map.json fills though it does not count."""

    @property
    def roles(self) -> dict[str, str]:
        """Role -> text of its token, as templates see it."""
        return {**self.legacy_names, **{role: _text(token) for role, token in self.named.items()}}

    def add_to(self, backend: tokenizers.Tokenizer) -> None:
        """Add what `backend` does not have; a token that it has with other flags gets these."""
        there = backend.get_added_tokens_decoder()
        by_id = {**self.by_id, **there} if self.by_id_is_legacy else self.by_id
        new: list[Declared] = [token for _, token in sorted(by_id.items(), key=lambda item: item[0])]
        known = {token.content for token in there.values()}
        known |= set(map(_text, new))
        for declared in (*self.named.values(), *self.extra):
            if _text(declared) not in known and declared not in new:
                new.append(declared)
        names = set(map(_text, self.named.values()))
        tokens = [AddedToken(token, special=True) if isinstance(token, str) else token for token in new]
        for token in tokens:
            token.special = token.special or token.content in names  # also decides `normalized` where that is not given
        backend.add_tokens(tokens)


def read_declared(folder: Path) -> DeclaredTokens:
    """The tokens that a folder declares. Raises ModelError naming the file and the key."""
    config = _read_object(folder / _CONFIG)
    map_ = _read_object(folder / _MAP)
    found = DeclaredTokens(config)
    where = str(folder / _CONFIG)
    settings = dict(config)
    if not settings.get(_EXTRA) and _EXTRA_BEFORE in settings:
        settings[_EXTRA] = settings.pop(_EXTRA_BEFORE)
    if "added_tokens_decoder" in config:
        declared = _object(config["added_tokens_decoder"], where, "added_tokens_decoder")
        found.by_id = {
            _id(key, where): _with_flags(value, where, f"added_tokens_decoder.{key}") for key, value in declared.items()
        }
        by_text = {token.content: token for token in found.by_id.values()}
        _name(found, settings, {}, where)
        for role in _ROLES:
            if role not in found.named and (value := map_.get(role)) is not None:
                found.legacy_names[role] = _text(_token(value, str(folder / _MAP), role))
    else:
        merged = settings | _merged(settings, map_)
        _name(found, merged, map_, where)
        special = _told_special(merged, map_)
        found.by_id_is_legacy = True
        by_text = {}
        added = folder / _ADDED
        for text, index in _read_object(added).items():
            flags = {"normalized": text not in special, "special": text in special}
            by_text[text] = _with_flags({"content": text, **flags}, str(added), text)
            found.by_id[_id(index, str(added))] = by_text[text]
    found.named = {
        role: by_text.get(_text(token), token) if role in _ROLES else token for role, token in found.named.items()
    }
    return found


def _merged(settings: dict[str, Any], map_: dict[str, Any]) -> dict[str, Any]:
    """What special_tokens_map.json changes in the settings."""
    changed = dict(map_)
    if isinstance(extra := map_.get(_EXTRA), list):
        have = settings.get(_EXTRA)
        changed[_EXTRA] = [*(have if isinstance(have, list) else []), *extra]
    elif not isinstance(settings.get(_EXTRA), list) and _EXTRA not in map_ and _EXTRA_BEFORE in map_:
        changed[_EXTRA_BEFORE] = map_[_EXTRA_BEFORE]
    return changed


def _told_special(settings: dict[str, Any], map_: dict[str, Any]) -> set[str]:
    """Texts that make a token of added_tokens.json special: roles and extra tokens, but objects only in the map."""
    extra = settings.get(_EXTRA)
    values = [settings.get(role) for role in _ROLES] + (extra if isinstance(extra, list) else [])
    values += [value["content"] for role in _ROLES if isinstance(value := map_.get(role), dict)]
    return {value for value in values if isinstance(value, str)}


def _name(found: DeclaredTokens, settings: dict[str, Any], map_: dict[str, Any], where: str) -> None:
    """Fill the named and extra tokens, in AutoTokenizer's order."""
    for role in _ROLES:
        if settings.get(role) is not None:
            found.named[role] = _token(settings[role], where, role)
    for role, value in [*map_.items(), *found.config.items()]:
        if role.endswith("_token") and role not in _ROLES and isinstance(value, str):
            found.named[role] = _token(value, where, role)
    extra = settings.get(_EXTRA)
    if isinstance(extra, dict):
        found.named |= {role: _token(value, where, f"{_EXTRA}.{role}") for role, value in extra.items()}
        extra = None
    if extra is None:
        extra = settings.get(_EXTRA_BEFORE) or []
    if not isinstance(extra, list):
        raise ModelError(f"{_EXTRA} must be a list or an object, got {type(extra).__name__}", where=where)
    found.extra = [_token(value, where, _EXTRA) for value in extra]


def _text(token: Declared) -> str:
    return token if isinstance(token, str) else token.content


def _token(value: Any, where: str, key: str) -> Declared:
    if not isinstance(value, str):
        return _with_flags(value, where, key)
    if LONE_SURROGATE.search(value):
        raise ModelError(f"{key} is not Unicode text", where=where)
    return value


def _with_flags(given: Any, where: str, key: str) -> AddedToken:
    if not isinstance(given, dict) or not isinstance(given.get("content"), str):
        raise ModelError(f"{key} must be a token's text, or an object with its content", where=where)
    content = _text(_token(given["content"], where, key))
    flags = {flag: given[flag] for flag in _FLAGS if given.get(flag) is not None}
    for flag, is_set in flags.items():
        if not isinstance(is_set, bool):
            raise ModelError(f"{key}.{flag} must be true or false, got {is_set!r}", where=where)
    return AddedToken(content, **flags)


def _id(value: Any, where: str) -> int:
    try:
        token_id = int(value)
    except (TypeError, ValueError):
        token_id = -1
    if not 0 <= token_id < 2**31 or isinstance(value, bool | float):
        raise ModelError(f"{value!r} is not a token id", where=where)
    return token_id


def _object(value: Any, where: str, key: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ModelError(f"{key} must be an object, got {type(value).__name__}", where=where)
    return value


def _read_object(file: Path) -> dict[str, Any]:
    return read_json_object(file) if file.exists() else {}
