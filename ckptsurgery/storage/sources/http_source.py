"""Files behind `http://` and `https://`, by range requests of the standard library's client."""

from __future__ import annotations

import base64
import http.client
import re
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from functools import lru_cache
from http.client import HTTPMessage
from typing import IO

from ...errors import CheckpointError, Diagnostic
from .byte_source import changed
from .remote import FIRST, Facts, Interrupted, RemoteSource

__all__ = ["HttpSource"]

_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)", re.IGNORECASE)
_BUSY = (408, 425, 429, 500, 502, 503, 504)
_BLOCK = 1 << 20
_TIMEOUT = 60  # seconds without a byte
_AS_THEY_ARE = "%/:=&?~#+!$,;'@()*[]"
"""Characters of an address that have a meaning; all others are quoted, spaces and letters with accents among them."""


class HttpSource(RemoteSource):
    """A file behind `http://` or `https://`.

    Args:
        name: the address, or what errors call it.
        headers: of every request, such as an authorisation.
        url: the address, where the name is another.
    """

    def __init__(self, name: str, headers: Mapping[str, str] | None = None, url: str | None = None) -> None:
        self._headers = {"User-Agent": "ckptsurgery", "Accept-Encoding": "identity", **(headers or {})}
        if url is None:  # a password in the address is sent, and not shown
            name, authorisation = _without_password(name)
            self._headers |= authorisation
        self.url = urllib.parse.quote(url or name, safe=_AS_THEY_ARE)
        super().__init__(name)

    def beside(self, name: str) -> HttpSource:
        """Return a file in the same folder, or below it."""
        names = [urllib.parse.urljoin(whole, urllib.parse.quote(name)) for whole in (self.name, self.url)]
        return HttpSource(names[0], self._headers, names[1])

    def probe(self) -> tuple[Facts, bytes]:
        """Ask for the first bytes; the answer says how many there are, and which file it is."""
        with self._answer(0, FIRST) as answer:
            whole = answer.status == 200 and _is_short(answer)
            if answer.status == 416:  # an empty file has no first byte
                return Facts(0, (None, 0)), b""
            facts = Facts(int(answer.headers["Content-Length"]), (None, 0)) if whole else self._facts(answer, 0)
            try:
                first = answer.read()  # a server may send fewer bytes than it was asked for
            except (OSError, http.client.HTTPException) as error:
                raise Interrupted(str(error)) from error
        self.fetched += len(first)
        return facts, first

    def stream(self, offset: int, nbytes: int) -> Iterator[bytes]:
        """Yield bytes as they come."""
        with self._answer(offset, nbytes) as answer:
            if answer.status == 416 or self._facts(answer, offset) != Facts(self.size, self.identity):
                raise changed(self.name)
            left = nbytes
            try:
                while left and (block := answer.read(min(_BLOCK, left))):
                    yield block
                    left -= len(block)
            except (OSError, http.client.HTTPException) as error:
                raise Interrupted(str(error)) from error

    def _answer(self, offset: int, nbytes: int) -> http.client.HTTPResponse:
        request = urllib.request.Request(
            self.url, headers={**self._headers, "Range": f"bytes={offset}-{offset + nbytes - 1}"}
        )
        try:
            answer: http.client.HTTPResponse = _opener().open(request, timeout=_TIMEOUT)
        except urllib.error.HTTPError as error:
            if error.code == 416:
                return error  # type: ignore[return-value]
            error.close()
            raise self._refusal(error) from error
        except (OSError, http.client.HTTPException) as error:
            raise Interrupted(str(getattr(error, "reason", error))) from error
        coding = answer.headers.get("Content-Encoding") or "identity"
        if coding != "identity":  # a part of compressed bytes is not a part of the file
            answer.close()
            raise self._unranged(f"the server of {self.name!r} compresses what it sends ({coding}), unasked")
        return answer

    def _refusal(self, error: urllib.error.HTTPError) -> Exception:
        if error.code in _BUSY:
            wait = error.headers.get("Retry-After") or ""
            return Interrupted(f"the server answered {error.code} {error.reason}", int(wait) if wait.isdecimal() else 0)
        if error.code in (404, 410):
            text, help = f"there is no file at {self.name!r}", "check the address"
            return CheckpointError(Diagnostic("missing-file", text, self.name, help=help))
        if 300 <= error.code < 400:
            text = f"{self.name!r} leads on to an address that cannot be followed: {error.reason.splitlines()[0]}"
            help = "open the address itself that a browser downloads the file from"
            return CheckpointError(Diagnostic("download-failed", text, self.name, help=help))
        text = f"the server refused {self.name!r}: {error.code} {error.reason}"
        help = "check the address, and whether it needs a token or a signature that has expired"
        return CheckpointError(Diagnostic("permission-denied", text, self.name, help=help))

    def _facts(self, answer: http.client.HTTPResponse, offset: int) -> Facts:
        found = _CONTENT_RANGE.fullmatch(answer.headers.get("Content-Range", ""))
        if answer.status != 206 or found is None or int(found[1]) != offset:
            raise self._unranged(f"the server of {self.name!r} does not send parts of files")
        mark = answer.headers.get("ETag") or answer.headers.get("Last-Modified")
        return Facts(int(found[3]), (mark, int(found[3])))

    def _unranged(self, text: str) -> CheckpointError:
        """An error whose remedy is to download the file as a whole."""
        name = self.name.partition("?")[0].rstrip("/").rpartition("/")[2] or "new.bin"
        help = f"import torch; torch.hub.download_url_to_file({self.url!r}, {name!r})"
        return CheckpointError(Diagnostic("download-failed", text, self.name, help=help))


def _without_password(address: str) -> tuple[str, dict[str, str]]:
    """An address without the user and the password before its host, and the header that has them instead."""
    parts = urllib.parse.urlsplit(address)
    user, mark, host = parts.netloc.rpartition("@")
    if not mark:
        return address, {}
    told = base64.b64encode(urllib.parse.unquote(user).encode()).decode()
    return parts._replace(netloc=host).geturl(), {"Authorization": f"Basic {told}"}


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows a redirection in the web; the authorisation is not sent to another host, nor from `https` to `http`."""

    def redirect_request(
        self, request: urllib.request.Request, file: IO[bytes], code: int, text: str, headers: HTTPMessage, url: str
    ) -> urllib.request.Request | None:
        made = super().redirect_request(request, file, code, text, headers, url)
        if made is None:
            return None
        if made.type not in ("http", "https"):  # urllib would go on to ftp
            raise urllib.error.HTTPError(request.full_url, code, f"{text}, to {url}", headers, file)
        if made.host != request.host or (request.type, made.type) == ("https", "http"):
            made.remove_header("Authorization")
        return made


@lru_cache(1)
def _opener() -> urllib.request.OpenerDirector:
    return urllib.request.build_opener(_Redirects)


def _is_short(answer: http.client.HTTPResponse) -> bool:
    """Whether an answer is a whole file that is no longer than a first request: parts of it are never asked for."""
    length = answer.headers.get("Content-Length", "")
    return length.isdigit() and int(length) <= FIRST
