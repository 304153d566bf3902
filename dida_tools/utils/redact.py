"""
Contains how secrets are kept out of what a run writes and sends: by the name that a value has, wherever it has one, and
by value, once a secret is known, wherever it turns up again.

Whatever has an unsuspicious name, and is in no secret's place, cannot be known: keep secrets in the environment.
"""

import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

REDACTED = "[redacted]"
_SHORTEST = 6  # shorter ones would be found in half of all words
_SECRET_NAMES = {
    "password", "passwd", "pwd", "passphrase", "secret", "token", "apikey", "credential", "credentials", "auth",
    "authorization",
}  # fmt: skip
_SECRET_PAIRS = {("api", "key"), ("access", "key"), ("private", "key"), ("secret", "key"), ("account", "key")}
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
    """Whether a key, option or variable of this name holds a secret: DB_PASSWORD and apiKey do, num_tokens does not."""
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
        # The shell's PWD is the working directory, not a password.
        found = {value for name, value in environment.items() if is_secret_name(name) and name != "PWD"}
        found |= {match["password"] for value in environment.values() for match in _URL.finditer(value)}
        found |= set(_in_arguments(sys.argv if arguments is None else arguments))
        found |= set(_in_data(config))
        # Longest first: one may be a part of another.
        self._secrets = sorted((value for value in found if len(value) >= _SHORTEST), key=len, reverse=True)

    def text(self, text: str) -> str:
        """A text without the secrets in it."""
        for secret in self._secrets:
            text = text.replace(secret, REDACTED)
        text = _URL.sub(rf"\g<before>:{REDACTED}@", text)
        text = _BEARER.sub(rf"\g<name> {REDACTED}", text)
        return _ASSIGNMENT.sub(_without_value, text)

    def data(self, value: Any, name: str = "") -> Any:
        """The same for strings in dicts and lists; what has a secret's name is left out."""
        if isinstance(value, dict):
            return {
                self.text(key) if isinstance(key, str) else key: self.data(one, str(key))
                for key, one in value.items()
            }
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
            return {
                key: one if key in ("@ref", "@module") else self.config(one, f"{path}.{key}".strip("."))
                for key, one in captured.items()
            }
        redacted = self.data(captured, path.rpartition(".")[2])
        if redacted == captured or path in ("SESSION_NAME", "__COMMENT"):
            return redacted
        return {"@unrecorded": "it holds a secret"}

    def arguments(self, arguments: Sequence[str]) -> list[str]:
        """A command line, where a secret may be the word after its option."""
        redacted = []
        for before, word in zip(["", *arguments], arguments, strict=False):
            follows = before.startswith("-") and "=" not in before and is_secret_name(before.lstrip("-"))
            redacted.append(REDACTED if follows else self.text(word))
        return redacted


def _in_arguments(arguments: Sequence[str]) -> Iterable[str]:
    for before, word in zip(["", *arguments], arguments, strict=False):
        if before.startswith("-") and "=" not in before and is_secret_name(before.lstrip("-")):
            yield word
        parts = word.split("=")
        for number, name in enumerate(parts[:-1], start=1):
            if is_secret_name(name.rpartition(".")[2]):
                yield "=".join(parts[number:])
        yield from (match["password"] for match in _URL.finditer(word))


def _in_data(value: Any, name: str = "") -> Iterable[str]:
    if isinstance(value, dict):
        for key, one in value.items():
            yield from _in_data(one, str(key))
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _in_data(one, name)
    elif isinstance(value, str):
        if is_secret_name(name):
            yield value
        yield from (match["password"] for match in _URL.finditer(value))


def _without_value(match: re.Match) -> str:
    if not is_secret_name(match["name"].rpartition(".")[2]):
        return match[0]
    return f"{match['name']}{match['between']}{REDACTED}"
