"""Whether plain containers from a file have the form that the code relies on."""

from __future__ import annotations

from typing import Any


def mismatch(value: Any, form: Any, at: str = "") -> str | None:
    """Where `value` has another form, as one phrase, or None.

    form: a type (`object`: anything); `{str: form}` a mapping; `{"key": form, …}` exactly these keys; `[form]` a list;
    a tuple of alternatives (None stands for itself).
    """
    if isinstance(form, tuple):
        tried = [mismatch(value, one, at) for one in form]
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
    elif set(value) != set(form):
        differ = sorted(map(str, set(value) ^ set(form)))
        return f"{at or 'it'} must have the keys {', '.join(form)}; too many or too few: {', '.join(differ)[:200]}"
    else:
        items = [(f"{at}.{key}".lstrip("."), value[key], form[key]) for key in form]
    return next((found for name, item, one in items if (found := mismatch(item, one, name))), None)
