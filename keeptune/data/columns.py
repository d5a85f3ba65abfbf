"""Tell what the columns of a row are for: text, labels, pictures and sound, or nothing that keeptune reads."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

# The names of the columns that a recipe gives, by what they hold.
Columns = Mapping[str, str | Sequence[str]]
# What a completion is called, by the value that stands in its column.
Labels = Mapping[str, str]

_ID = re.compile(
    r"|ids?|idx|index|key|uu?id|guid|row(id)?|hash|sha(1|256)?|md5|.*[_-]id|__index_level_\d+__|unnamed: \d+",
    re.IGNORECASE,
)
_ABOUT_THE_ROW = re.compile(
    r"|sources?|src|origin|category|ur[li]s?|link|file_?name|dataset(_name)?|subset|split|config|version"
    r"|lang(uage)?|locale|licen[sc]e|author|annotator|model(_name)?|generator|created(_at)?|updated_at|modified"
    r"|date|time|datetime|timestamp|topic|domain|type|kind|tags?|meta(data)?|info|difficulty"
    r"|task(_name|_type)?|template(_name|_type)?|length|num_tokens|n_tokens|token_count|num_turns|word_count",
    re.IGNORECASE,
)
_MEDIA = re.compile(
    r"(image|img|picture|photo|pixel_value|audio|video)s?([_-]?(path|file|file_?name|byte|base64|data|ur[il]))?s?",
    re.IGNORECASE,
)
_LABEL = re.compile(r"(.*[_-])?(label|class|category|target|intent|sentiment|stars|rating)s?", re.IGNORECASE)


def unread_columns(value: Mapping[str, Any], *, read: Collection[str], ignored: Collection[str] = ()) -> list[str]:
    """Return the columns that carry something, are not read, and are more than a note about the row such as an id."""
    others = (column for column in value if column not in read and column not in ignored)
    return [
        column
        for column in others
        if not (is_id(column) or _ABOUT_THE_ROW.fullmatch(column))
        # A picture that is not there is false; anything else that is false, such as "use this turn", says something.
        and (carries(value[column]) or (value[column] is False and not is_media(column)))
    ]


def is_id(column: str) -> bool:
    """Tell whether a column is called as one of names or numbers of rows is."""
    return bool(_ID.fullmatch(column))


def is_media(column: str) -> bool:
    """Tell whether a column is called as one of pictures, sound or films is."""
    return bool(_MEDIA.fullmatch(column))


def is_label(column: str) -> bool:
    """Tell whether a column is called as one of class labels is."""
    return bool(_LABEL.fullmatch(column))


def carries(value: Any) -> bool:
    """Tell whether a value holds anything: not null, false, NaN or empty, nor a list or object of such values alone."""
    if isinstance(value, Mapping):
        return any(map(carries, value.values()))
    if isinstance(value, list | tuple):
        return any(map(carries, value))
    return not (value is None or value is False or value == "" or (isinstance(value, float) and math.isnan(value)))


def label_key(value: Any) -> str | None:
    """Return the key under which a recipe's `labels` name a value: whole numbers and texts have one.

    True and false are 1 and 0, as are 1.0 and 0.0; texts lose the white space around them.
    """
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, bool | int) or (isinstance(value, float) and value.is_integer()):
        return str(int(value))
    return None
