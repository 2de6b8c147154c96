"""What was probably meant by a name that does not exist."""

import difflib
from collections.abc import Iterable

_SHOWN = 40


def near_names(name: str, choices: Iterable[str]) -> list[str]:
    """The names among `choices` that `name` may be a slip of, the nearest first; case counts for nothing."""
    spellings: dict[str, str] = {}
    for choice in choices:
        spellings.setdefault(choice.lower(), choice)
    given = name.lower()
    near = difflib.get_close_matches(given, spellings, n=3, cutoff=0.65)
    begun = [
        one
        for one in spellings
        if one and (given.startswith(one) or one.startswith(given)) and min(len(given), len(one)) > 2
    ]
    return [spellings[one] for one in dict.fromkeys([*near, *begun])][:3]


def suggestion(name: str, choices: Iterable[str]) -> str:
    """A clause for an error message: the near names among `choices`, or all of them where none is near."""
    choices = sorted(choices)
    near = near_names(name, choices)
    if near:
        return f"did you mean {' or '.join(near)}?"
    more = f" and {len(choices) - _SHOWN} more" if len(choices) > _SHOWN else ""
    return f"there are {', '.join(choices[:_SHOWN]) or 'none'}{more}"
