"""Files that are not on a local disk: downloads over HTTP, and the stores that fsspec opens (s3, gs, hf, ...).

A download is retried with growing pauses if the server fails or breaks off. What arrives must have the length that the
server promised.
"""

from __future__ import annotations

import http.client
import logging
import re
import shutil
import time
from typing import IO, Any
from urllib.parse import quote

from packspeed.data.errors import DataError, UsageError

DOWNLOADED = ("http://", "https://")


# They log the traceback of an error that is raised and described too.
QUIET_LOGGERS = ("fsspec", "s3fs", "gcsfs", "huggingface_hub")


COPY_BYTES = 2**20


TIMEOUT_S = 60.0


WAITS_S = (0.5, 1.0, 2.0, 4.0)


LONGEST_WAIT_S = 60.0


# The server or a proxy may answer otherwise a moment later.
PASSING_ERRORS = (408, 425, 429, 500, 502, 503, 504)


def is_url(name: str) -> bool:
    """Whether a name has a protocol: http://, s3://, ..."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", name) is not None


class Store:
    """One URL in a store that fsspec opens. Errors of any store's library become DataError."""

    def __init__(self, url: str, files: Any, path: str):
        self.url, self._files, self._path = url, files, path

    def is_file(self) -> bool:
        """Whether the URL is a file."""
        return bool(self._call(self._files.isfile, self._path))

    def find(self) -> list[str]:
        """The URLs of all files below the URL, without hidden ones, sorted."""
        root = self._path.rstrip("/")
        paths = self._call(self._files.find, self._path)
        return self._urls(path for path in paths if "/." not in path.removeprefix(root))

    def glob(self) -> list[str]:
        """The URLs of all files that the URL's pattern matches, sorted; a folder that matches gives its files."""
        names = list[str]()
        for path, info in self._call(self._files.glob, self._path, detail=True).items():
            if info["type"] != "directory":
                names.append(path)
            elif "**" not in self._path:
                names += [file for file in self._call(self._files.find, path) if "/." not in file.removeprefix(path)]
        return self._urls(dict.fromkeys(names))

    def size(self) -> int:
        """The file's size in bytes."""
        return int(self._call(self._files.info, self._path)["size"])

    def stamp(self) -> str:
        """A key that changes with the file's content, as far as the store knows."""
        return str(self._call(self._files.ukey, self._path))

    def open(self) -> IO[bytes]:
        """Open the file for reading; the stream can seek."""
        stream: IO[bytes] = self._call(self._files.open, self._path, "rb")
        return stream

    def head(self, url: str, size: int) -> bytes:
        """The first bytes of another file in the store."""
        return bytes(self._call(self._files.cat_file, self._files._strip_protocol(url), start=0, end=size))

    def _urls(self, paths: Any) -> list[str]:
        return sorted(str(self._files.unstrip_protocol(path)) for path in paths)

    def _call(self, function: Any, *arguments: Any, **options: Any) -> Any:
        try:
            return function(*arguments, **options)
        except Exception as error:  # every store's library has errors of its own
            raise store_error(self.url, error) from error


def open_store(url: str) -> Store:
    """The store of a URL. UsageError if its protocol is unknown or its library is not installed."""
    import fsspec

    for name in QUIET_LOGGERS:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        files, path = fsspec.core.url_to_fs(url)
    except (ValueError, ImportError) as error:
        raise UsageError(f"{url} cannot be opened: {_words(error)}. Install the store's fsspec library.") from error
    except Exception as error:  # missing credentials, for example
        raise store_error(url, error) from error
    return Store(url, files, path)


def store_error(url: str, error: Exception) -> DataError:
    """The error of a store's library in one paragraph."""
    return DataError(
        f"{url} cannot be read ({type(error).__name__}: {_words(error)}). Check the URL, the credentials and the "
        f"network."
    )


def _words(error: object) -> str:
    return " ".join(str(error).split())[:300].rstrip(".")


def download(url: str, copy: IO[bytes]) -> None:
    """Write the content of a URL to `copy`. DataError if it does not arrive complete after several attempts."""
    for wait_s in (*WAITS_S, None):
        try:
            _fetch(url, copy)
            return
        except _Passing as error:
            if wait_s is None:
                raise DataError(f"{url} {error}, tried {len(WAITS_S) + 1} times. Try again later.") from error
            time.sleep(max(wait_s, error.wait_s))


class _Passing(Exception):
    """A failure that may be gone at the next attempt. `wait_s`: what the server asked for."""

    def __init__(self, message: str, wait_s: float = 0.0):
        super().__init__(message)
        self.wait_s = wait_s


def _fetch(url: str, copy: IO[bytes]) -> None:
    """Download once, from the start. _Passing for what is worth another attempt, DataError for the rest."""
    import urllib.request  # takes 40 ms (ssl, email), needed only for URLs

    copy.seek(0)
    copy.truncate()
    try:
        with urllib.request.urlopen(quote(url, safe="%/:=&?~#+!$,;'@()*[]"), timeout=TIMEOUT_S) as answer:
            shutil.copyfileobj(answer, copy, COPY_BYTES)
            expected, encoding = answer.headers.get("Content-Length"), answer.headers.get("Content-Encoding", "")
    except urllib.error.HTTPError as error:
        reason = f"cannot be read: the server answers {error.code} {error.reason}"
        if error.code not in PASSING_ERRORS:
            raise DataError(f"{url} {reason}. Check the URL.") from error
        asked = error.headers.get("Retry-After", "")
        raise _Passing(reason, min(LONGEST_WAIT_S, float(asked)) if asked.isdecimal() else 0.0) from error
    except http.client.IncompleteRead as error:
        raise _Passing(f"broke off after {copy.tell()} bytes") from error
    except (http.client.InvalidURL, ValueError) as error:
        raise DataError(f"{url} cannot be read: {_words(error)}. Check the URL.") from error
    except (OSError, http.client.HTTPException) as error:
        cause = error.reason if isinstance(error, urllib.error.URLError) else error
        raise _Passing(f"cannot be read: {_words(cause) or type(error).__name__}") from error
    if expected is not None and copy.tell() != int(expected):
        raise _Passing(f"broke off after {copy.tell()} of {expected} bytes")
    if encoding not in ("", "identity"):
        raise DataError(f"{url} arrives with the content encoding {encoding}, which was not asked for. Download it.")
    copy.seek(0)
