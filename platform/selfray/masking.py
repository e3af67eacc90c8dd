"""Hides credentials in every text that leaves the process. Imports nothing of selfray, so that
early errors stay fast."""

import os
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote

HIDDEN = "***"
_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/+[^\s'\"<>`]*")
_DATABASE = re.compile(r"(postgres|mysql|mariadb|mssql|oracle|redis|mongodb|cockroach)")
_SECRET_KEY = re.compile(
    r"(pass|pwd|secret|token|credential|signature|api_?key|access_?key|private|odbc_connect"
    r"|^auth$|^key$|^sig$|^user$)",
    re.IGNORECASE,
)
_PAIR = re.compile(r"([?&;#]|^)([^=&;?#]+)=([^&;#]*)")
_SPOKEN = re.compile(r"\b(password|passwd|pwd|secret)=([^\s'\"&;]+)", re.IGNORECASE)
_SECRET_VARIABLES = (
    "MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_PASSWORD", "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN", "RAY_AUTH_TOKEN",
)  # fmt: skip


def masked(text: str) -> str:
    """Replace the credentials in a text by ***.

    It hides, in any URI, all that stands before the @ (user names too, since they may be tokens)
    and the values of secret keys after the ?; `password=...` anywhere; and the values of secret
    environment variables.
    """
    text = _URI.sub(lambda match: _masked_uri(match[0]), text)
    text = _SPOKEN.sub(rf"\1={HIDDEN}", text)
    for name in _SECRET_VARIABLES:
        value = os.environ.get(name, "")
        if len(value) >= 8:  # a shorter one may occur inside ordinary words
            text = text.replace(value, HIDDEN)
    return text


def masked_json(value: Any) -> Any:
    """A JSON value with all texts in it masked."""
    if isinstance(value, str):
        return masked(value)
    if isinstance(value, Mapping):
        return {key: masked_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [masked_json(item) for item in value]
    return value


def _masked_uri(uri: str) -> str:
    scheme, slashes, rest = re.split(r"(:/+)", uri, maxsplit=1)
    end = end_of_credentials(scheme, rest)
    shown = f"{HIDDEN}@{rest[end:]}" if end else rest
    place, mark, query = shown.partition("?")
    if mark:
        query = _PAIR.sub(_masked_pair, query)
    return f"{scheme}{slashes}{place}{mark}{query}"


def end_of_credentials(scheme: str, rest: str) -> int:
    """The index in `rest` of the host after user:password@; 0 if there are no credentials.

    A password may contain / and @, though they should be encoded; a path may contain an @ too.
    """
    authority = rest.partition("/")[0]
    ends_with_query = re.search(r"\?[\w.-]+=[^?]*$", rest)
    place = rest[: ends_with_query.start()] if ends_with_query else rest
    in_authority = "@" in authority
    # user:pass/word@host: a colon before the first slash may be part of user:password.
    in_password = ":" in authority or _DATABASE.match(scheme) is not None
    if authority and in_password and "@" in place:
        return place.rindex("@") + 1
    return authority.rindex("@") + 1 if in_authority else 0


def _masked_pair(match: re.Match[str]) -> str:
    before, key, value = match.groups()
    return f"{before}{key}={HIDDEN if value and _SECRET_KEY.search(unquote(key)) else value}"
