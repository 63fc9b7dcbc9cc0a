"""Files that are not on a local disk: downloads over HTTP, and the stores that fsspec opens (s3, gs, hf and others).

If the server fails or the connection breaks, a download is retried with growing pauses. The downloaded file must have
the length that the server announced.
"""

from __future__ import annotations

import re
import shutil
import time
from typing import IO, Any

from packspeed.data.errors import DataError, UsageError

DOWNLOADED = ("http://", "https://")


# These libraries log the traceback of an error that is raised as well.
QUIET_LOGGERS = ("fsspec", "s3fs", "gcsfs", "huggingface_hub")


COPY_BYTES = 2**20


TIMEOUT_S = 60.0


WAITS_S = (0.5, 1.0, 2.0, 4.0)


LONGEST_WAIT_S = 60.0


# HTTP status codes for which another attempt may succeed.
PASSING_ERRORS = (408, 425, 429, 500, 502, 503, 504)


def is_url(name: str) -> bool:
    """Return whether a name begins with a protocol, such as http:// or s3://."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", name) is not None


class Store:
    """One URL in a store that fsspec opens. All methods turn the errors of the store's library into DataError."""

    def __init__(self, url: str, files: Any, path: str):
        self.url, self._files, self._path = url, files, path

    def is_file(self) -> bool:
        """Return whether the URL is a file."""
        return bool(self._call(self._files.isfile, self._path))

    def find(self) -> list[str]:
        """Return the URLs of all files below the URL, sorted, without hidden ones."""
        root = self._path.rstrip("/")
        paths = self._call(self._files.find, self._path)
        return self._urls(path for path in paths if "/." not in path.removeprefix(root))

    def glob(self) -> list[str]:
        """Return the URLs of all files that match the URL as a glob, sorted. A matching folder counts as its files."""
        names = list[str]()
        for path, info in self._call(self._files.glob, self._path, detail=True).items():
            if info["type"] != "directory":
                names.append(path)
            elif "**" not in self._path:
                names += [file for file in self._call(self._files.find, path) if "/." not in file.removeprefix(path)]
        return self._urls(dict.fromkeys(names))

    def size(self) -> int:
        """Return the size of the file in bytes."""
        return int(self._call(self._files.info, self._path)["size"])

    def stamp(self) -> str:
        """Return a text that changes if the file changes, as far as the store can tell."""
        return str(self._call(self._files.ukey, self._path))

    def open(self) -> IO[bytes]:
        """Open the file for reading. The stream supports seek."""
        stream: IO[bytes] = self._call(self._files.open, self._path, "rb")
        return stream

    def head(self, url: str, size: int) -> bytes:
        """Return the first `size` bytes of another file in the same store."""
        return bytes(self._call(self._files.cat_file, self._files._strip_protocol(url), start=0, end=size))

    def _urls(self, paths: Any) -> list[str]:
        """Return the URLs of paths in the store, sorted."""
        return sorted(str(self._files.unstrip_protocol(path)) for path in paths)

    def _call(self, function: Any, *arguments: Any, **options: Any) -> Any:
        """Call a function of the store's library, and turn its errors into DataError."""
        try:
            return function(*arguments, **options)
        except Exception as error:  # each store's library raises its own classes of errors
            raise store_error(self.url, error) from error


def open_store(url: str) -> Store:
    """Open the store of a URL with fsspec.

    Raises UsageError if the protocol is unknown or its library is not installed, and DataError if the library fails.
    """
    import logging

    import fsspec

    for name in QUIET_LOGGERS:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        files, path = fsspec.core.url_to_fs(url)
    except (ValueError, ImportError) as error:
        raise UsageError(
            f"{url} cannot be opened: {_words(error)}. Check the URL, or install the library that fsspec needs for it."
        ) from error
    except Exception as error:  # missing credentials, for example
        raise store_error(url, error) from error
    return Store(url, files, path)


def store_error(url: str, error: Exception) -> DataError:
    """Return a DataError for an error of a store's library."""
    return DataError(
        f"{url} cannot be read ({type(error).__name__}: {_words(error)}). Check the URL, the credentials and the "
        f"network."
    )


def _words(error: object) -> str:
    """Return an error's text in one line of at most 300 characters."""
    return " ".join(str(error).split())[:300].rstrip(".")


def download(url: str, copy: IO[bytes]) -> None:
    """Download a URL and write its content to the open file `copy`. Raises DataError if all attempts fail."""
    for wait_s in (*WAITS_S, None):
        try:
            _fetch(url, copy)
            return
        except _Passing as error:
            if wait_s is None:
                raise DataError(f"{url} {error}, tried {len(WAITS_S) + 1} times. Try again later.") from error
            time.sleep(max(wait_s, error.wait_s))


class _Passing(Exception):
    """A failure after which another attempt may succeed. wait_s: how many seconds the server asks to wait first."""

    def __init__(self, message: str, wait_s: float = 0.0):
        super().__init__(message)
        self.wait_s = wait_s


def _fetch(url: str, copy: IO[bytes]) -> None:
    """Download a URL once, from the start. Raises _Passing if another attempt may succeed, otherwise DataError."""
    import http.client  # only here, because this and the next import take 40 ms (ssl, email)
    import urllib.request
    from urllib.parse import quote

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
        raise DataError(
            f"{url} arrives with the content encoding {encoding}, which was not requested. Download the file by other "
            f"means and give its path."
        )
    copy.seek(0)
