"""What is wrong with a request, in the shape that OpenAI's clients read."""

from __future__ import annotations

from fastapi.responses import JSONResponse

RETRY_AFTER = {"Retry-After": "1"}
"""Seconds after which a client may ask again."""


class RequestError(Exception):
    """A request that is refused.

    Args:
        status: HTTP status.
        message: What is wrong, and what to do.
        param: The field of the request that it is about.
        code: A word that programs can tell it by.
        headers: Headers of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = headers

    def response(self) -> JSONResponse:
        """The answer, as OpenAI has it."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return JSONResponse({"error": error}, self.status, self.headers)


def too_long(num_tokens: int, limit: int, param: str, place: str = "") -> RequestError:
    """Text that the model has no places for; ``place`` says which of several it is, e.g. ``".3"``."""
    message = f"{param}{place} has {num_tokens} tokens, but there is room for {limit}. Shorten it."
    return RequestError(413, message, param=param, code="context_length_exceeded")
