"""A captured config as a table, and what differs between two of them."""

from typing import Any

MISSING = "(missing)"


def flatten(config: dict[str, Any]) -> dict[str, Any]:
    """A captured config as one level of dotted keys, with objects as short text, for tables."""
    return {key: _as_text(value) for key, value in _leaves(config).items()}


def difference(one: dict[str, Any], other: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """
    Return what differs between two captured configs.

    :return: {dotted key: (value in one, value in the other)}, as flatten gives them, MISSING where there is none
    """
    first, second = _leaves(one), _leaves(other)
    keys = [*first, *(key for key in second if key not in first)]
    pairs = {key: (first.get(key, MISSING), second.get(key, MISSING)) for key in keys}
    # repr tells 1 from 1.0 and True; as text, a path and a string would be the same
    return {key: (_as_text(a), _as_text(b)) for key, (a, b) in pairs.items() if repr(a) != repr(b)}


def _leaves(config: dict[str, Any]) -> dict[str, Any]:
    """The captured values by dotted key."""
    captured = config["config"] if set(config) == {"version", "config"} else config
    leaves: dict[str, Any] = {}

    def walk(value: Any, path: str) -> None:
        if isinstance(value, dict) and (value or not path) and not any(key.startswith("@") for key in value):
            for key, item in value.items():
                walk(item, join(path, key))
        else:
            leaves[path] = value

    walk(captured, "")
    return leaves


def join(path: str, key: str) -> str:
    """Return the dotted key of an item."""
    return f"{path}.{key}" if path else key


def _as_text(value: Any) -> Any:
    if isinstance(value, list):
        return "[" + ", ".join(str(_as_text(item)) for item in value) + "]"
    if not isinstance(value, dict):
        return value
    if not value:
        return "{}"
    if "@partial" in value:
        arguments = [str(_as_text(item)) for item in value["args"]]
        arguments += [f"{key}={_as_text(item)}" for key, item in value["kwargs"].items()]
        return f"partial({', '.join([_as_text(value['@partial']), *arguments])})"
    if "@dict" in value:
        return "{" + ", ".join(f"{_as_text(k)}: {_as_text(v)}" for k, v in value["@dict"]) + "}"
    if "@tuple" in value:
        return "(" + ", ".join(str(_as_text(item)) for item in value["@tuple"]) + ")"
    if "@unrecorded" in value:
        return f"(unrecorded: {value['@unrecorded']})"
    tags = [key for key in value if key.startswith("@")]
    return value[tags[0]] if tags else "{" + ", ".join(f"{k}: {_as_text(v)}" for k, v in value.items()) + "}"
