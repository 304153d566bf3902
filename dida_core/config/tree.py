"""A captured config as a table, and what differs between two of them."""

from typing import Any

from .keys import upgrade

MISSING = "(missing)"


def flatten(captured: dict[str, Any]) -> dict[str, Any]:
    """Return a captured config as one level of dotted keys, with objects as short text, for tables."""
    return {key: _as_text(value) for key, value in _leaves(captured).items()}


def difference(one: dict[str, Any], other: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """
    Return what differs between two captured configs.

    :return: {dotted key: (value in one, value in the other)} as flatten gives them; MISSING: there is none
    """
    first, second = _leaves(one), _leaves(other)
    pairs = {key: (first.get(key, MISSING), second.get(key, MISSING)) for key in first | second}
    # repr tells 1 from 1.0 and True; as text, a path and a string would be the same
    return {key: (_as_text(a), _as_text(b)) for key, (a, b) in pairs.items() if repr(a) != repr(b)}


def join(path: str, key: str) -> str:
    """Return the dotted key of an item."""
    return f"{path}.{key}" if path else key


def _leaves(captured: dict[str, Any]) -> dict[str, Any]:
    leaves: dict[str, Any] = {}

    def walk(value: Any, path: str) -> None:
        if isinstance(value, dict) and (value or not path) and not any(key.startswith("@") for key in value):
            for key, item in value.items():
                walk(item, join(path, key))
        else:
            leaves[path] = value

    walk(upgrade(captured["config"] if set(captured) == {"version", "config"} else captured), "")
    return leaves


def _as_text(value: Any) -> Any:
    try:
        return _text_of(value)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):  # nothing that we have written
        return str(value)


def _text_of(value: Any) -> Any:
    if isinstance(value, list):
        return f"[{_listed(value)}]"
    if not isinstance(value, dict):
        return value
    tag = next((key for key in value if key.startswith("@")), None)
    content: Any = value.get(tag)
    if tag == "@tuple":
        return f"({_listed(content)})"
    if tag == "@partial":
        pairs = [f"{key}={_as_text(item)}" for key, item in value["kwargs"].items()]
        return f"partial({_listed([content, *value['args'], *pairs])})"
    if tag == "@unrecorded":
        return f"(unrecorded: {content})"
    if tag and tag != "@dict":
        return content
    pairs = [f"{_as_text(key)}: {_as_text(item)}" for key, item in content or value.items()]
    return f"{{{', '.join(pairs)}}}"


def _listed(values: list[Any]) -> str:
    return ", ".join(str(_as_text(value)) for value in values)
