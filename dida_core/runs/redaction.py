"""
Redaction: secrets are kept out of what a run writes and sends.

They are found by name, wherever a value has one, and by value, once a secret is known, wherever it turns up.
What has an unsuspicious name, and is in no secret's place, cannot be known: keep secrets in the environment.
"""

import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import quote, quote_plus

REDACTED = "[redacted]"
_SHORTEST = 6  # shorter ones would be found in half of all words
_SECRET_NAMES = {
    "password", "passwd", "pwd", "passphrase", "secret", "token", "apikey", "credential", "credentials",
    "auth", "authorization",
}  # fmt: skip
_SECRET_PAIRS = {("api", "key"), ("access", "key"), ("private", "key"), ("secret", "key"), ("account", "key")}
# In a variable of the environment, one such word is enough: OPENAI_KEY, PGPASSWORD, HF_TOKEN_READ.
_SECRET_VARIABLE = re.compile(
    r"PASSWORD|PASSWD|PASSPHRASE|SECRET|CREDENTIAL|"
    r"(?:^|_)(?:PASS|PWD|TOKENS?|(?:API|ACCESS)?KEYS?|AUTH|AUTHORIZATION|PAT|COOKIES?)(?:$|_)",
    re.IGNORECASE,
)
_NO_SECRETS = {"PWD", "SSH_AUTH_SOCK"}  # the working directory, and a socket
# Tokens of language models are no secrets.
_HARMLESS = {"cls", "pad", "sep", "mask", "bos", "eos", "unk", "num", "max", "min", "use", "class", "special"}
_URL = re.compile(r"(?P<before>[a-zA-Z][a-zA-Z0-9+.-]*://[^\s/:@'\"]*):(?P<password>[^\s@'\"]+)@")
# password=..., --api-key=..., "token": "..." in text
_ASSIGNMENT = re.compile(
    rf"(?P<name>[\w.-]{{0,60}}(?:{'|'.join(_SECRET_NAMES)}|(?:api|access|private|secret|account)[_-]?key))"
    r"(?P<between>[\"']?\s*[=:]\s*[\"']?)(?P<value>[^\s\"',;&]+)",
    re.IGNORECASE,
)
_BEARER = re.compile(r"(?P<name>[Bb]earer|[Bb]asic)\s+(?P<value>[A-Za-z0-9._~+/=-]{8,})")


def is_secret_name(name: str) -> bool:
    """Return whether what has this name is a secret: DB_PASSWORD and apiKey are, num_tokens is not."""
    words = [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)]
    if not words or words[0] in _HARMLESS:
        return False
    return words[-1] in _SECRET_NAMES or tuple(words[-2:]) in _SECRET_PAIRS


class Redactor:
    """Takes secrets out of texts and plain data."""

    def __init__(
        self,
        environment: Mapping[str, str] = os.environ,
        arguments: Sequence[str] | None = None,
        config: Any = None,
    ) -> None:
        """
        :param environment: variables; those with a secret's name are secrets
        :param arguments: of the command line; None: sys.argv
        :param config: what holds secrets under their names, at any depth
        """
        found = {value for name, value in environment.items() if _is_secret_variable(name)}
        found |= {*_passwords(environment.values()), *_in_data(config)}
        found |= set(_in_arguments(sys.argv if arguments is None else arguments))
        forms = {form for value in found for form in _forms(value) if len(form) >= _SHORTEST}
        self._secrets = sorted(forms, key=len, reverse=True)  # longest first: one may be a part of another

    def text(self, text: str) -> str:
        """Return a text without the secrets in it."""
        for secret in self._secrets:
            text = text.replace(secret, REDACTED)
        text = _URL.sub(rf"\g<before>:{REDACTED}@", text)
        text = _BEARER.sub(rf"\g<name> {REDACTED}", text)
        return _ASSIGNMENT.sub(_without_value, text)

    def data(self, value: Any, name: str = "") -> Any:
        """Return dicts and lists without secrets in their strings; what has a secret's name is left out."""
        if isinstance(value, dict):
            keys = {key: self.text(key) if isinstance(key, str) else key for key in value}
            return {keys[key]: self.data(one, str(key)) for key, one in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self.data(item, name) for item in value)
        if not isinstance(value, str):
            return value
        return REDACTED if value and is_secret_name(name) else self.text(value)

    def config(self, captured: Any, path: str = "") -> Any:
        """Return a captured config without the strings that hold secrets; it cannot be restored then."""
        if isinstance(captured, list):
            return [self.config(item, path) for item in captured]
        if isinstance(captured, dict):
            return {key: self.config(one, f"{path}.{key}".strip(".")) for key, one in captured.items()}
        name = path.rpartition(".")[2]
        redacted = captured if name in ("@ref", "@module") else self.data(captured, name)
        is_text = path in ("SESSION_NAME", "__COMMENT")
        return redacted if redacted == captured or is_text else {"@unrecorded": "it holds a secret"}

    def arguments(self, arguments: Sequence[str]) -> list[str]:
        """Return a command line without secrets, where one may be the word after its option."""
        pairs = zip(["", *arguments], arguments, strict=False)
        return [REDACTED if _is_secret_option(before) else self.text(word) for before, word in pairs]


def _is_secret_variable(name: str) -> bool:
    return name not in _NO_SECRETS and (is_secret_name(name) or _SECRET_VARIABLE.search(name) is not None)


def _forms(value: str) -> Iterator[str]:
    """Yield a secret as it may be written: as it is, in code, in JSON, in a URL, and line by line."""
    yield from (value, repr(value)[1:-1], json.dumps(value)[1:-1])
    yield from (quote(value), quote(value, safe=""), quote_plus(value))
    yield from value.splitlines() if "\n" in value else ()


def _passwords(texts: Iterable[str]) -> Iterator[str]:
    return (match["password"] for text in texts for match in _URL.finditer(text))


def _is_secret_option(word: str) -> bool:
    return word.startswith("-") and "=" not in word and is_secret_name(word.lstrip("-"))


def _in_arguments(arguments: Sequence[str]) -> Iterator[str]:
    yield from _passwords(arguments)
    for before, word in zip(["", *arguments], arguments, strict=False):
        if _is_secret_option(before):
            yield word
        parts = word.split("=")
        for number, name in enumerate(parts[:-1], start=1):
            if is_secret_name(name.rpartition(".")[2]):
                yield "=".join(parts[number:])


def _in_data(value: Any, name: str = "") -> Iterator[str]:
    if isinstance(value, dict):
        for key, one in value.items():
            yield from _in_data(one, str(key))
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _in_data(one, name)
    elif isinstance(value, str):
        yield from [value] if is_secret_name(name) else ()
        yield from _passwords([value])


def _without_value(match: re.Match) -> str:
    if not is_secret_name(match["name"].rpartition(".")[2]):
        return match[0]
    return f"{match['name']}{match['between']}{REDACTED}"
