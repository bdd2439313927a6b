"""Messages of a chat, from the forms in which data sets hold them."""

from typing import Any

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_SHOWN_KEYS = 20


class UnusableError(Exception):
    """A row has no text that can be used; the message says why."""


def messages_of(value: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Turns of a chat as templates take them, from `role` and `content`, or from `from` and `value` (ShareGPT)."""
    messages = []
    for number, turn in enumerate(value, 1):
        if "role" in turn and "content" in turn:
            role, content = turn["role"], turn["content"]
        elif "from" in turn and "value" in turn:
            role, content = _ROLES.get(str(turn["from"])), turn["value"]
            if role is None:
                raise UnusableError(f"its turn {number} is from {str(turn['from'])[:40]!r}; known are {sorted(_ROLES)}")
        else:
            raise UnusableError(
                f"its turn {number} has neither role and content nor from and value; found {shown_keys(turn)}"
            )
        if isinstance(content, list):
            if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
                raise UnusableError(f"its turn {number} holds parts that are no text")
            content = "".join(part["text"] for part in content)
        if not isinstance(role, str):
            raise UnusableError(f"its turn {number} has a role that is {kind_of_value(role)}")
        if not isinstance(content, str) and not (content is None and turn.get("tool_calls")):
            raise UnusableError(f"its turn {number} has content that is {kind_of_value(content)}, not text")
        others = {k: v for k, v in turn.items() if v is not None and k not in ("role", "content", "from", "value")}
        messages.append({**others, "role": role, "content": content})
    return messages


def kind_of_value(value: Any) -> str:
    """A JSON value's kind, in words."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, list):
        return "a list of numbers" if value and all(isinstance(v, int) for v in value) else "a list"
    kinds = {dict: "an object", int: "a number", float: "a number", str: "text"}
    return kinds.get(type(value), f"of type {type(value).__name__}")


def shown_keys(keys: Any) -> list[str]:
    """Keys of a row for a message: sorted, each cut to 40 characters, the first ones of many."""
    found = sorted(str(key)[:40] for key in keys)
    return found if len(found) <= _SHOWN_KEYS else [*found[:_SHOWN_KEYS], "..."]
