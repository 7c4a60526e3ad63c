"""The Hugging Face Hub as a server: what its errors mean, when to try again; tokens never appear in what is told.

Which Hub, with which token and cache, is huggingface_hub's business: HF_ENDPOINT, HF_TOKEN or `hf auth login`, HF_HOME
and HF_HUB_OFFLINE mean here what they mean there.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from shoal.version import __version__

T = TypeVar("T")
Say = Callable[[str], None]

ATTEMPTS = 5
NO_BAR = 50 * 10**6  # bytes of a file that travels without a progress bar
LONGEST_WAIT = 300.0  # seconds; the Hub's limits are counted over five minutes
TEMPORARY = (408, 429, 500, 502, 503, 504)
_TOKEN = re.compile(r"hf_[A-Za-z0-9]{8,}|(?<=[Bb]earer )\S+")
_SIGNATURE = re.compile(r"(https?://[^\s?'\"]+)\?[^\s'\"]+")  # addresses of storage are signed by their query
_CLIENT_LOGS = ("huggingface_hub.utils._http", "huggingface_hub.file_download")


def open_api() -> Any:
    """huggingface_hub's client, with its settings from the environment."""
    from huggingface_hub import HfApi

    return HfApi(library_name="shoal", library_version=__version__)


def offline() -> bool:
    import huggingface_hub

    return bool(huggingface_hub.is_offline_mode())


def page(repo: str) -> str:
    """Address of a repository's page, or of any other page of the Hub."""
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{repo}"


def logged_in() -> bool:
    import huggingface_hub

    return huggingface_hub.get_token() is not None


def scrub(text: str) -> str:
    """One line without tokens and signatures of addresses, 300 characters at most."""
    import huggingface_hub

    with suppress(OSError, ValueError):
        token = huggingface_hub.get_token()
        if token:
            text = text.replace(token, "<token>")
    text = _SIGNATURE.sub(r"\1", _TOKEN.sub("<token>", text))
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0][:300] if lines else ""


def client_errors() -> tuple[type[BaseException], ...]:
    """What huggingface_hub may raise on a call: its own errors, httpx's, and the plain ones that it wraps them in."""
    from huggingface_hub import errors

    own = tuple(
        found
        for name in ("XetError", "XetDownloadError", "RevisionResolutionError")
        if isinstance(found := getattr(errors, name, None), type)
    )
    return (_http_error(), OSError, RuntimeError, ValueError, *own)


def status(error: BaseException) -> int | None:
    """HTTP status that an error of the client comes from, None where no answer came."""
    found = getattr(getattr(origin(error), "response", None), "status_code", None)
    return found if isinstance(found, int) else None


def origin(error: BaseException) -> BaseException:
    """The client's HTTP or token error behind its wrappers (it raises RuntimeError, ValueError and OSError from them)."""
    from huggingface_hub import errors

    known = (_http_error(), errors.OfflineModeIsEnabled, errors.LocalTokenNotFoundError)
    step: BaseException | None = error
    while step is not None:
        if isinstance(step, known):
            return step
        step = step.__cause__ or (None if step.__suppress_context__ else step.__context__)
    return error


def temporary(error: BaseException) -> bool:
    """Whether the same request may succeed a little later: no answer, a cut connection, 429, 5xx."""
    from huggingface_hub import errors

    found = origin(error)
    if isinstance(found, errors.HfHubHTTPError):
        return status(found) in TEMPORARY
    if isinstance(found, _http_error()):
        return type(found).__name__ not in ("UnsupportedProtocol", "InvalidURL", "TooManyRedirects")
    return isinstance(found, OSError) and "Consistency check failed" in str(found)


def retried(call: Callable[[], T], say: Say, attempts: int = ATTEMPTS) -> T:
    """What `call` returns, tried again while its error is temporary; waits 1, 2, 4, 8 s or as long as the Hub asks."""
    for attempt in range(1, attempts + 1):
        try:
            return call()
        except client_errors() as error:
            if attempt == attempts or not temporary(error):
                raise
            wait = _wait(error, attempt)
            say(f"{reason(error)}; trying again in {wait:.0f} s")
            time.sleep(wait)
    raise AssertionError("unreachable")


def reason(error: BaseException, repo: str = "") -> str:
    """What went wrong, in one line with what to do about it. repo: for the address where access is asked for."""
    from huggingface_hub import errors

    found = origin(error)
    known = logged_in_safely()
    if isinstance(found, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set; unset it to reach the Hub"
    if isinstance(found, errors.LocalTokenNotFoundError):
        return "you are not logged in; log in with `hf auth login`, or set HF_TOKEN"
    if isinstance(found, errors.GatedRepoError):
        way = "with this account" if known else "and log in with `hf auth login`"
        return f"gated; ask for access at {page(repo)} {way}"
    if isinstance(found, errors.RevisionNotFoundError):
        return "the repository has no such revision"
    if isinstance(found, errors.RepositoryNotFoundError):
        who = "your account may not see it" if known else "you are not logged in (`hf auth login`)"
        return f"no such repository on the Hub, or it is private and {who}"
    if isinstance(found, errors.RemoteEntryNotFoundError):
        return "the repository has no such file"
    code = status(found)
    if code == 401:
        return (
            f"the Hub does not accept your token (expired or revoked); make one at {page('settings/tokens')}"
            " and log in with `hf auth login`, or set HF_TOKEN"
        )
    if code == 403:
        return f"your account or token has no permission for this ({_message(found)}); see {page('settings/tokens')}"
    if code == 429:
        return "the Hub asks to slow down (429)"
    if code is not None and code >= 500:
        return f"the Hub has a problem of its own ({code})"
    if code is not None:
        return f"the Hub refuses ({code}): {_message(found)}"
    if isinstance(found, _http_error()):
        return f"the connection to {page('').rstrip('/')} failed or broke off"
    return scrub(str(found)) or type(found).__name__


def logged_in_safely() -> bool:
    with suppress(OSError, ValueError):
        return logged_in()
    return False


@contextmanager
def speaking(say: Say) -> Iterator[None]:
    """The client's warnings about requests that it repeats go to `say`, without the signed addresses in them."""
    heard = _Listener(say)
    loggers = [logging.getLogger(name) for name in _CLIENT_LOGS]
    for logger in loggers:
        logger.addFilter(heard)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(heard)


@contextmanager
def without_bars(wanted: bool = True) -> Iterator[None]:
    """No progress bars of the client, for files that are there before a bar is drawn; HF_HUB_DISABLE_PROGRESS_BARS rules."""
    from huggingface_hub import constants
    from huggingface_hub import utils as typed

    utils: Any = typed  # its progress bars are public but not in __all__

    if not wanted or constants.HF_HUB_DISABLE_PROGRESS_BARS is not None or utils.are_progress_bars_disabled():
        yield
        return
    utils.disable_progress_bars()
    try:
        yield
    finally:
        utils.enable_progress_bars()


class _Listener(logging.Filter):
    def __init__(self, say: Say) -> None:
        super().__init__()
        self.say = say
        self.cause = ""

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if "thrown while requesting" in text:
            answered = re.match(r"HTTP Error (\d+)", text)
            self.cause = f"the Hub answered {answered[1]}" if answered else "the connection broke off"
            return False
        if waiting := re.search(r"(?:Retrying in|Waiting) ([\d.]+)s", text):
            self.say(f"{self.cause or 'no good answer'}; trying again in {float(waiting[1]):.0f} s")
            return False
        if text.startswith("Error while downloading"):
            self.say("the connection broke off; going on where it did")
            return False
        return True


def _wait(error: BaseException, attempt: int) -> float:
    headers = getattr(getattr(origin(error), "response", None), "headers", {})
    asked = str(headers.get("Retry-After") or "")
    return min(float(asked) if asked.isdigit() else 2.0 ** (attempt - 1), LONGEST_WAIT)


def _message(error: BaseException) -> str:
    return scrub(getattr(error, "server_message", None) or str(error))


def _http_error() -> type[BaseException]:
    """httpx's base error: of httpx or httpx2, whichever the client is built on."""
    from huggingface_hub import errors

    found: type[BaseException] = errors.HfHubHTTPError.__mro__[1]
    return found
