"""Whether plain containers from a file have the form that the code relies on."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError


class Form(BaseModel):
    """A mapping with exactly these keys (`extra="allow"`: at least these), each of its type."""

    model_config = ConfigDict(strict=True, extra="forbid", arbitrary_types_allowed=True)

    @classmethod
    def find_error(cls, value: Any) -> str | None:
        """Where `value` has another form, as one phrase, or None."""
        try:
            cls.model_validate(value)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            at = ".".join(map(str, first["loc"])) or "it"
            if first["type"] in ("missing", "extra_forbidden"):
                return f"{at} is {'missing' if first['type'] == 'missing' else 'not known'}"
            return f"{at} is a {type(first['input']).__name__} ({first['msg']})"
        return None
