"""Whether plain containers from a file have the form that the code relies on."""

from __future__ import annotations

from typing import Any


def find_error(value: Any, form: Any, at: str = "") -> str | None:
    """Where `value` has another form, as one phrase, or None.

    form: a type (`object`: anything); `{str: form}` a mapping; `{"key": form, …}` exactly these keys, or at least these
    if `...` is one of them; `[form]` a list; a tuple of alternatives (None stands for itself).
    """
    if isinstance(form, tuple):
        tried = [find_error(value, one, at) for one in form]
        return None if None in tried else tried[-1]
    if form is None or isinstance(form, type):
        fits = value is None if form is None else isinstance(value, form) and (form is not int or type(value) is int)
        return (
            None
            if fits
            else f"{at or 'it'} is a {type(value).__name__}, not {'None' if form is None else form.__name__}"
        )
    if not isinstance(value, type(form)):
        return f"{at or 'it'} is a {type(value).__name__}, not a {type(form).__name__}"
    if isinstance(form, list):
        items = [(f"{at}[{index}]", item, form[0]) for index, item in enumerate(value)]
    elif str in form:
        if not all(isinstance(key, str) for key in value):
            return f"{at or 'it'} has keys that are no text"
        items = [(f"{at}.{key}".lstrip("."), item, form[str]) for key, item in value.items()]
    else:
        keys = [key for key in form if key is not ...]
        if differ := sorted(map(str, set(keys) - set(value) if ... in form else set(value) ^ set(keys))):
            return f"{at or 'it'} must have the keys {', '.join(keys)}; too many or too few: {', '.join(differ)[:200]}"
        items = [(f"{at}.{key}".lstrip("."), value[key], form[key]) for key in keys]
    return next((found for name, item, one in items if (found := find_error(item, one, name))), None)
