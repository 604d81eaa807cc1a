"""Errors of the Hub, each as one line that says what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

TRANSPORT_ERROR: Any = next(base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError")
"""httpx's own; the package's name differs between versions of the Hub's client."""


def check_id(repo_id: str | Path) -> str:
    """Raise ValueError if this is no Hub id."""
    text = str(repo_id)
    if "/" not in text or text.count("/") > 1:
        raise ValueError(f"{text!r} is neither a folder nor a Hub id of the form 'org/name'.")
    validate_repo_id(text)
    return text


@contextmanager
def translate_hub_errors(name: str) -> Iterator[None]:
    """Turn what the Hub's client raises into one line that says what to do.

    Args:
        name: The repository.

    Raises:
        PermissionError: For 401 and 403.
        FileNotFoundError: If there is no such repository or revision, or it cannot be reached offline.
        ConnectionError: For a broken connection.
        OSError: For what else the Hub refuses.
    """
    try:
        yield
    except RevisionNotFoundError as error:
        raise FileNotFoundError(f"{name} has no such revision: {first_line(error)}") from error
    except GatedRepoError as error:
        raise PermissionError(
            f"{name} is gated: accept its terms on its page, then log in with `hf auth login`."
        ) from error
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"There is no folder {name}, and no repository of that name that this token can see: if it is private, log "
            "in with `hf auth login`."
        ) from error
    except LocalEntryNotFoundError as error:
        raise FileNotFoundError(f"{name} is not in the cache, and was not found: {first_line(error)}") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status == 401:
            raise PermissionError(f"The Hub does not accept the token: {first_line(error)}") from error
        if status == 403:
            raise PermissionError(
                f"The token may not write to {name}. Use one with write permission there: `hf auth login`."
            ) from error
        if status == 412:
            raise OSError(f"{name} was changed by somebody else in the meantime. Push again.") from error
        raise OSError(f"The Hub refused ({status}) for {name}: {first_line(error)}") from error
    except (TRANSPORT_ERROR, RuntimeError) as error:
        cause = error.__cause__ if isinstance(error, RuntimeError) else error  # the client wraps those of an upload
        if not isinstance(cause, TRANSPORT_ERROR):
            raise
        raise ConnectionError(
            f"The connection to the Hub broke ({type(cause).__name__}). {name} holds what it held, or all of the push. "
            "Try again."
        ) from error


def is_unreachable(error: BaseException | None) -> bool:
    """True if an error, or what it came from, is that the Hub could not be reached."""
    if error is None or isinstance(error, (ConnectionError, TRANSPORT_ERROR, LocalEntryNotFoundError)):
        return error is not None
    return is_unreachable(error.__cause__ or error.__context__)


def first_line(error: BaseException) -> str:
    """First line of what an error says; its type if it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
