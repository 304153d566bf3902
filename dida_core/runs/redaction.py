"""
Redaction: secrets are kept out of what a run writes and sends.

They are found by name, wherever a value has one, by their form, and by value, once a secret is known,
wherever it turns up. Texts lose them, up to the end of the line; code loses whole lines: rather lose a line
than store a secret. What has an unsuspicious name and form cannot be known: keep secrets in the environment.
"""

import base64
import html
import itertools
import json
import os
import re
import sys
from bisect import bisect
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any
from urllib.parse import quote, quote_plus

REDACTED = "[redacted]"
DROPPED = "[dropped: it looks like a secret]"
_SHORTEST = 6  # shorter ones would be found in half of all words

# How much a name speaks for a secret: as that of a function only, where the value looks random, where it is a
# text, or a number, too. Of a variable of the environment, MAYBE is enough.
_CALLED, _MAYBE, _LIKELY, _SURE = 1, 2, 3, 4
_SURE_NAME = re.compile(
    r"passw|passphrase|passcode|kennwort|contrase|mot_?de_?passe|secret|credential|authorization|"
    r"connection_?string|(?:api|access|private|account|auth|sign(?:ing)?|(?:en)?crypt(?:ion)?|master|deploy|"
    r"service|shared|subscription|functions|license|ssh|jwt|openai|hf|wandb|aws|azure|gcp|google|maps|"
    r"github)[_.-]?key",
    re.IGNORECASE,
)
_LIKELY_WORDS = {"auth", "cookie", "cookies", "cred", "creds", "pw", "pwd", "pswd", "jwt", "bearer"}
_PARTS = {"token", "pass", "pat"}  # of the names of constants
_MAYBE_WORDS = {"key", "keys", "tokens", "pass", "pat", "pats", *_LIKELY_WORDS}
# Tokens of language models are no secrets.
_HARMLESS = {"cls", "pad", "sep", "mask", "bos", "eos", "unk", "num", "max", "min", "use", "class", "special"}
_HARMLESS |= {"start", "end", "next", "text", "image", "patch", "register", "sos", "sot", "eot", "prompt"}
_HARMLESS |= {"first", "second", "forward", "backward", "single", "multi"}
_QUALIFIERS = {"read", "write", "prod", "production", "dev", "test", "staging", "base", "old", "new", "value"}
_NO_SECRETS = {"PWD", "OLDPWD", "SSH_AUTH_SOCK"}  # working directories, and a socket
_WORD = re.compile(r"[^\W\d](?:[\w.-]*\w)?")
_QUOTE = re.compile(r"[fFrRbBuU]{0,2}(\\*(?:\"\"\"|'''|[\"'`]))")
# What is written in a secret's place without being one.
_REFERENCE = re.compile(
    r"[\s\"'`()\[\]{},;\\]*(?:(?:[Bb]earer|[Bb]asic|token)\s+)?"
    r"(?:redacted|None|none|null|nil|True|False|true|false|\.\.\.|\*+|x{3,}|<[\w -]*>|%s|%\(\w+\)s|"
    r"\$?\{+[\w.\[\]()!:]*\}+|\$\w+|\$\([^()]*\))?[\s\"'`()\[\]{},;\\]*"
)
_RANDOM = re.compile(r"(?=[\w.+/@$!-]*[^\W\d_])(?=[\w.+/@$!-]*\d)[\w.+/@$!-]{8,}")
# Between a name and its value: first what may have a type, then pairs, marked-up text, options, declarations.
_BETWEEN = re.compile(
    r"(?:\\*[\"'`])?[\])}]?[ \t]*"
    r"(?:(?::[ \t]*[\w.\[\], |\"']{1,60}?[ \t]*)?(?:=>|:=|[=!+?]?=(?!=)|==|%3D|<-)|:(?!:))"
    r"|\\*[\"'`]?\s{0,99},?\s{0,99}\\*[\"'`]?\bvalue\\*[\"'`]?\s*[:=]"
    r"|\\*[\"'`],\s*(?=[fFrRbBuU]{0,2}\\*[\"'`])"
)
_DECLARED = re.compile(r"(?:\b(?:ENV|ARG|SetEnv|setenv|set(?:\s+-\w+)*|(?:login|machine|user)\s+\S+)\s+|-)$")
_SAID = re.compile(
    r"(?:[ \t]+\w+){0,3}[ \t]+(?:(?:is|was)(?:[ \t]*[:=]|[ \t]+(?=\S*[A-Z\d\"']))|\w+[ \t]*[:=])"
    r"|[ \t]+(?=[\"'])"
)
_ALONE = re.compile(r"[ \t]+(?=\S+[ \t]*$)", re.MULTILINE)
_SPACES, _BLANKS = re.compile(r"[\"']?[ \t]+(?=[^\s-])"), re.compile(r"[ \t]*")
_JOINT = re.compile(r"[ \t]*(?:\\\n|\+\s*)?[ \t]*(?=[fFrRbBuU]{0,2}\\*[\"'])")  # of two texts in quotes
_REST = re.compile(r"(?:[^\n]*\\\n)*[^\n]*")  # of the line, and of those that it continues in
_MARKED, _SECTION = re.compile(r"[^<>\n]*>"), re.compile(r"\][ \t]*\n((?:(?!\[).+\n?)*)")
_FORMS = re.compile(
    r"-----BEGIN [A-Z0-9 ]*-----(?s:.*?)(?:-----END [A-Z0-9 ]*-----|\Z)"
    r"|https?://(?!git@)([^\s/@\"'<>:]+)@(?=\w|\[)"  # a token
    r"|://[^\s/@:\"'<>]*:(?!\d+/)([^\s\"']{1,300})@"
    r"|[?&;](?i:amp;)?(?i:sig|key|code|[\w-]{0,60}(?:signature|credential|token|secret|passw\w*|key|auth))"
    r"(?:=|%3D)([^\s&\"'<>]+)"
    r"|\b(?:AKIA|ASIA)[A-Z0-9]{12,}"
    r"|\b(?:gh[pousr]_|github_pat_|glpat-|xox[a-z]-|npm_|pypi-|dckr_pat_|[srp]k[-_]|SG\.|AIza|ya29\.|"
    r"dop_v1_|shpat_|dapi|glsa_|whsec_|AGE-SECRET-)(?=[\w.-]{0,200}[\dA-Z])[\w.-]{10,}"
    r"|\bhf_(?=\w*[\dA-Z])[A-Za-z0-9]{8,}"
    r"|\beyJ[\w-]{5,500}\.[\w-]{5,}(?:\.[\w-]*)?"
    r"|hooks\.slack\.com/services/\S+|/api/webhooks/\S+|\b\d{8,10}:AA[\w-]{30,}"
    r"|\$(?:apr1|2[aby]|5|6|y|argon2\w*)\$[^\s\"']+"
    r"|\b[Bb]earer\s+([\w.~+/=-]{8,})|\b[Bb]asic\s+(?=\S*[\dA-Z=])([\w.~+/=-]{8,})"
    r"|[\s\"'](?:-u|--user|--proxy-user)[\"',=\s]+(?!\d+:\d+\b)([^\s:\"',]+:[^\s\"']+)"
    r"|\b(?:sshpass|mysql\w*|mariadb\w*|login)\b[^\n]{0,300}?\s[\"']?-p[\"',\s]*([^\s\"',]+)"
    r"|\b(?:echo|printf)\s+([^|\n]{1,300})\|[^\n]{0,300}?(?:passw|login|secret)"
    r"|(?i:\bidentified\s+by\s+)(\S+)"
    r"|^[\w.*-]+:(?:\d{2,5}|\*):[^:\s]+:[^:\s]+:(\S+)$",  # .pgpass
    re.MULTILINE,
)
_MIXED = re.compile(r"[A-Za-z0-9]{20,}")
# Code: comments and strings; what follows a name there; what takes the name of a secret, not its value.
_PIECES = re.compile(
    r"#[^\n]*|[fFrRbBuU]{0,2}(?:('''|\"\"\")(?:\\.|(?!\1).)*(?:\1|\Z)"
    r"|([\"'])(?:\\.|(?!\2)[^\\\n])*(?:\2|$|\\\Z))",
    re.DOTALL | re.MULTILINE,
)
_CODE_BETWEEN = re.compile(r"\s*\]?[ \t]*(?::[ \t]*[^=\n\x01,(){}:]{1,60})?(?::=|[=!+]=|=|:|in\b|\(|,)[ \t]*")
_TUPLE = re.compile(r"(?:\s*,\s*[\w.]+){1,20}\s*=(?!=)")
_CONTINUED = re.compile(r"\s*[\x01+]")
# Bounds, in characters, that keep the time linear: of a value; of a line looked into, as longer ones
# that name a secret are lost whole; of what may be a reference.
_LONGEST, _LONG_LINE, _LONG_REFERENCE = 20_000, 2_000, 200
_LONG_LINES, _RUNS = re.compile(rf"[^\n]{{{_LONG_LINE + 1},}}"), re.compile(r"[\w.+/@$!-]{8,}")
_LOOKED_UP = re.compile(
    r"\[\x01+\]|\b(?:get|getenv|pop|getpass|input|prompt|read_text|open|Path)\(\x01*(?:, None)?\)"
)


def is_secret_name(name: str) -> bool:
    """Return whether what has this name is a secret: DB_PASSWORD and apiKey are, num_tokens is not."""
    return _suspicion(name) >= _LIKELY


@lru_cache(maxsize=10_000)
def _suspicion(name: str) -> int:
    if _SURE_NAME.search(name):
        return _SURE
    words = [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name.rpartition(".")[2])]
    if not words or words[0] in _HARMLESS:
        return 0
    while len(words) > 1 and words[-1] in _QUALIFIERS:
        words.pop()
    last, is_alone, is_constant = words[-1], len(words) == 1, name.isupper()
    is_likely = last.endswith(("token", "oauth")) or last in _LIKELY_WORDS
    is_likely |= last in ("pass", "pat") and not is_alone
    is_likely |= is_constant and ((last == "key" and not is_alone) or bool(_PARTS.intersection(words)))
    if is_likely:
        return _LIKELY
    if any(word in _MAYBE_WORDS or word.endswith("token") for word in words):
        return _MAYBE
    return _CALLED if last in ("login", "authenticate") else 0


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
        found = {value for name, value in environment.items() if _is_secret_variable(name, value)}
        texts = [*environment.values(), *_pairs(sys.argv if arguments is None else arguments)]
        found |= {text[start:end] for text in texts for start, end in _find(text)} | set(_in_data(config))
        forms = {form for value in found for form in _forms(value.strip()) if len(form) >= _SHORTEST}
        self._secrets = sorted(forms, key=len, reverse=True)  # longest first: one may be a part of another

    def text(self, text: str) -> str:
        """Return a text without the secrets in it."""
        parts, done = [], 0
        for start, end in sorted(self._spans(text)):
            if end > done:
                parts += [text[done:start], REDACTED] if start >= done else []
                done = end
        return "".join([*parts, text[done:]])

    def secret_lines(self, text: str, is_code: bool) -> set[int]:
        """
        Return the numbers, from 0, of the lines that look like secrets or parts of one.

        :param is_code: of Python: what is neither text nor number there is no secret
        """
        ends = [match.start() for match in re.finditer("\n", text)]
        spans = self._spans(text, is_code)
        return {
            line for span in spans for line in range(bisect(ends, span[0] - 1), bisect(ends, span[1] - 1) + 1)
        }

    def data(self, value: Any, name: str = "") -> Any:
        """Return dicts and lists without secrets in their strings; what has a secret's name is left out."""
        if isinstance(value, dict):
            keys = {key: self.text(key) if isinstance(key, str) else key for key in value}
            inherited = name if is_secret_name(name) else ""
            return {keys[key]: self.data(one, inherited or str(key)) for key, one in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self.data(item, name) for item in value)
        if _is_secret_value(name, value):
            return REDACTED
        return self.text(value) if isinstance(value, str) else value

    def config(self, captured: Any, path: str = "") -> Any:
        """Return a captured config without the strings that hold secrets; it cannot be restored then."""
        if isinstance(captured, list):
            return [self.config(item, path) for item in captured]
        if isinstance(captured, dict):
            return {key: self.config(one, f"{path}.{key}".strip(".")) for key, one in captured.items()}
        names = path.split(".")
        name = next(filter(is_secret_name, names), names[-1])
        redacted = captured if names[-1] in ("@ref", "@module") else self.data(captured, name)
        is_text = path in ("SESSION_NAME", "__COMMENT")
        return redacted if redacted == captured or is_text else {"@unrecorded": "it holds a secret"}

    def arguments(self, arguments: Sequence[str]) -> list[str]:
        """Return a command line without secrets, where one may be the word after its option."""
        redacted = []
        for word, pair in zip(arguments, _pairs(arguments), strict=True):
            text = self.text(word)
            redacted.append(text if text != word or self.text(pair).endswith(word) else REDACTED)
        return redacted

    def _spans(self, text: str, is_code: bool | None = None) -> Iterator[tuple[int, int]]:
        for secret in self._secrets:
            start = text.find(secret)
            while start >= 0:
                yield start, start + len(secret)
                start = text.find(secret, start + 1)
        yield from _find(text, is_code)


def _is_secret_variable(name: str, value: str) -> bool:
    level = 0 if name in _NO_SECRETS else _suspicion(name)
    return level >= _LIKELY or (level == _MAYBE and not value.isalpha())


def _is_secret_value(name: str, value: Any) -> bool:
    level = _suspicion(name)
    if isinstance(value, str):
        return level > _CALLED and _speaks(level, value)
    return level == _SURE and isinstance(value, int | float) and not isinstance(value, bool)


def _speaks(level: int, value: str) -> bool:
    """Return whether what is written in the place of a secret may be one."""
    if len(value) <= _LONG_REFERENCE and _REFERENCE.fullmatch(value):
        return False
    if level in (_CALLED, _LIKELY):
        return re.search(r"[^\W\d_]", value) is not None
    return level == _SURE or any(map(_RANDOM.match, _RUNS.findall(value)))


def _forms(value: str) -> Iterator[str]:
    """Yield a secret as it may be written: as it is, in code, JSON, URLs, HTML, shells, base64, by lines."""
    for text in (value, *(value.splitlines() if "\n" in value else ())):
        once = [text, repr(text)[1:-1], ascii(text)[1:-1], repr(text.encode())[2:-1], json.dumps(text)[1:-1]]
        once += [json.dumps(text, ensure_ascii=False)[1:-1], text.replace('"', '""')]
        once += [text.replace("'", "'\"'\"'"), text.replace("'", "'\\''")]
        yield from once
        yield from (repr(one)[1:-1] for one in once)
        yield from (json.dumps(one)[1:-1] for one in once)
        for quoted in (quote(text), quote(text, safe=""), quote_plus(text)):
            yield from (quoted, re.sub("%..", lambda match: match[0].lower(), quoted))
        yield from (html.escape(text), html.escape(text, quote=False), text.encode().hex())
        for shift in range(3):  # base64 within that of a longer text; the ends depend on what is around
            encoded = base64.b64encode(b"\0" * shift + text.encode()).decode().rstrip("=")
            inner = encoded[-(-shift * 4 // 3) : -1]
            yield from (inner, inner.translate(str.maketrans("+/", "-_"))) if len(inner) >= 8 else ()


def _pairs(arguments: Sequence[str]) -> list[str]:
    """Return each word of a command line with the one before."""
    return [f" {before} {word}" for before, word in zip(["", *arguments], arguments, strict=False)]


def _in_data(value: Any, name: str = "") -> Iterator[str]:
    if isinstance(value, dict):
        for key, one in value.items():
            yield from _in_data(one, name if is_secret_name(name) else str(key))
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _in_data(one, name)
    elif isinstance(value, str):
        yield from [value] if _is_secret_value(name, value) else ()
        yield from (value[start:end] for start, end in _find(value))


def _find(text: str, is_code: bool | None = None) -> Iterator[tuple[int, int]]:
    """Yield from where to where there are secrets; without is_code, by the rules of text and of code."""
    for match in _FORMS.finditer(text):
        start, end = match.span(match.lastindex or 0)
        if end - start > _LONG_REFERENCE or not _REFERENCE.fullmatch(text[start:end]):
            yield start, end
    for match in _MIXED.finditer(text):
        kinds = ["a" if char.islower() else "A" if char.isupper() else "1" for char in match[0]]
        changes = sum(one != other for one, other in itertools.pairwise(kinds))
        if len(set(kinds)) == 3 and changes >= 0.4 * len(kinds):
            yield match.span()
    lost = [line.span() for line in _LONG_LINES.finditer(text) if _names_secret(text, *line.span())]
    yield from lost
    for start, end in lost:
        text = f"{text[:start]}{' ' * (end - start)}{text[end:]}"
    words = [(word, level) for word in _WORD.finditer(text) if (level := _level(text, word))]
    if words and is_code is not True:
        done = 0  # what is in a value is lost with it
        for word, level in words:
            if word.start() >= done:
                for span in _value_in_text(text, *word.span(), level, len(text)):
                    yield span
                    done = span[1]
    if words and is_code is not False:
        yield from _find_in_code(text, words)


def _names_secret(text: str, start: int, end: int) -> bool:
    return any(_level(text, word) >= _LIKELY for word in _WORD.finditer(text, start, end))


def _level(text: str, word: re.Match) -> int:
    level = _suspicion(word[0])
    # Alone, the word is common; not as a key or an option.
    before = text[word.start() - 1] if word.start() else "\n"
    after = text[word.end() : word.end() + 2].strip()
    is_key = before in "\n\"'-,{[&?" or after not in (":", "")
    return _LIKELY if level == _MAYBE and word[0].lower() in ("pass", "pat") and is_key else level


def _find_in_code(text: str, words: list[tuple[re.Match, int]]) -> Iterator[tuple[int, int]]:
    pieces = [match.span() for match in _PIECES.finditer(text)]
    masked = _PIECES.sub(lambda one: (" " if one[0][0] == "#" else "\x01") * len(one[0]), text)
    done = [0] * (_SURE + 1)  # for each level, up to where values were looked into
    for word, level in words:
        start, end = word.span()
        first, last = pieces[max(0, bisect(pieces, (start, len(text))) - 1)] if pieces else (0, 0)
        is_inside = first <= start < last
        is_short = start - first + last - end < 16  # but for quotes, there is nothing around
        is_whole = is_inside and is_short and not (text[first:start] + text[end:last]).strip("fFrRbBuU\"'-")
        if start < max(done[level:]):
            continue
        if is_inside and not is_whole:
            for span in _value_in_text(text, start, end, level, last):
                yield span
                done[level] = span[1]
        elif level > _CALLED or text[end : end + 1] == "(":
            found, done[level] = _value_in_code(text, masked, last if is_whole else end, level, is_whole)
            yield from found


def _value_in_code(
    text: str, masked: str, end: int, level: int, is_whole: bool
) -> tuple[list[tuple[int, int]], int]:
    """Return the strings in the value of a name, of SURE ones numbers, too; and up to where all were seen."""
    several = _TUPLE.match(masked, end)
    between = several or _CODE_BETWEEN.match(masked, end)
    if between is None or (not several and between[0].rstrip()[-1] == "," and not is_whole):
        return [], 0  # before the line is looked at, which takes longer
    line = _line_before(masked, end)
    is_target = re.fullmatch(r"[\w\s.,*\[\]\x01]*", line) is not None
    if several and not is_target:
        several, between = None, _CODE_BETWEEN.match(masked, end)
        if between is None or not is_whole:
            return [], 0
    ends = "\n;" if several or (is_target and "," in line) else "\n;,"
    depth, start, is_begun = int(between[0].rstrip()[-1] == "("), between.end(), False
    last = min(len(masked), start + _LONGEST)
    seen = max(start, last - _LONGEST // 2)  # what is further may go on after the bound
    for here in range(start, last):
        char = masked[here]
        depth += (char in "([{") - (char in ")]}")
        is_begun = is_begun or not char.isspace()
        is_end = depth == 0 and char in ends and masked[here - 1] != "\\"
        if is_end and char == "\n":  # in brackets, the value may be, or go on, in the next line
            is_end = is_begun and not _CONTINUED.match(masked, here)
        if depth < 0 or is_end:
            last = seen = here
            break
    found = []
    value = _LOOKED_UP.sub(lambda match: " " * len(match[0]), masked[start:last])
    for match in re.finditer("\x01+", value):
        first, last = start + match.start(), start + match.end()
        quoted = _QUOTE.match(text, first)
        first, last = (quoted.end(), last - len(quoted[1])) if quoted else (first, last)
        if _speaks(level, text[first:last]):
            found.append((first, last))
    if level == _SURE and re.search(r"\d", value):
        found.append((start, start + len(value)))
    return found, seen


def _line_before(text: str, place: int) -> str:
    """Return what is before a place in its line, at most as much as that of a line that is looked into."""
    bound = max(0, place - _LONG_LINE)
    return text[max(text.rfind("\n", bound, place) + 1, bound) : place]


def _value_in_text(text: str, start: int, end: int, level: int, limit: int) -> Iterator[tuple[int, int]]:
    """Yield where the value of a name is: a quoted one, or the rest of the line, or the lines below it."""
    before, limit = _line_before(text, start), min(limit, end + _LONGEST)
    if level == _CALLED or re.search(r":(?:param|type|raises?)\s+$", before):
        return
    between = _BETWEEN.match(text, end, limit)
    if before == "[" and level >= _LIKELY and (section := _SECTION.match(text, end, limit)):
        yield section.span(1)
    if between is None and before.endswith("<"):
        between = _MARKED.match(text, end, limit)
    if between is None and level >= _LIKELY and _DECLARED.search(before):
        between = _SPACES.match(text, end, limit)
    if between is None and level == _SURE:
        between = _SAID.match(text, end, limit) or (
            _ALONE.match(text, end, limit) if not before.strip() else None
        )
    if between is None:
        return
    first = _BLANKS.match(text, between.end()).end()  # type: ignore[union-attr]
    quoted = _QUOTE.match(text, first, limit)
    if level == _MAYBE:
        match = _RANDOM.match(text, quoted.end() if quoted else first, limit)
        yield from [match.span()] if match else ()
        return
    last = _value_end(text, first, len(before) - len(before.lstrip()), limit)
    if _speaks(level, text[first:last]):
        if quoted and text.endswith(quoted[1], quoted.end(), last):
            first, last = quoted.end(), last - len(quoted[1])
        yield first, last


def _value_end(text: str, start: int, indent: int, limit: int) -> int:
    end = start
    while quoted := _QUOTE.match(text, end, limit):
        closing = re.compile(rf"(?<!\\)(?:\\\\)*{re.escape(quoted[1])}").search(text, quoted.end(), limit)
        if closing is None:
            break
        if (joint := _JOINT.match(text, closing.end(), limit)) is None:
            return closing.end()
        end = joint.end()
    rest = _REST.search(text, end, limit)
    end = rest.end() if rest else limit
    if not text[start:end].strip(" \t|>+-([{"):  # the value is in the lines below, further to the right
        below = re.compile(rf"(?:\n[ \t]*(?=\n)|\n[ \t]{{{indent + 1},}}[^\n]*)*").match(text, end, limit)
        end = below.end() if below else end
    return end
