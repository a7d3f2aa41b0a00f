"""A local web page on which people say which of two passages fits a query better.

    GET  /TOKEN/                      page.html: asks for a name, then shows a pair after the other
    GET  /TOKEN/state?annotator=NAME  what NAME has done, and the next pair; else who is known
    POST /TOKEN/verdict               {"annotator", "pair", "turn", "choice", "unsure", "seconds"}

A verdict is in the journal, on the disk, before the page is told so. `turn` is how many answers of
this annotator to this pair the page knew of: one that is late, from a second tab or sent a second
time, is not written.

The token keeps other users of the machine and other sites out. It lies beside the journal, readable
by its owner alone, so that the address is the same when the server is started again.
"""

import base64
import hashlib
import hmac
import ipaddress
import json
import math
import os
import re
import secrets
import signal
import socket
import socketserver
import threading
import time
import unicodedata
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from rankpo_fast.errors import InputError
from rankpo_fast.judge.journal import Journal
from rankpo_fast.judge.people import CHOICES, Ended, Late, Questions
from rankpo_fast.paths import reason
from rankpo_fast.signals import not_ignored

PAGE = Path(__file__).with_name("page.html")
LONGEST_NAME = 64
LARGEST_BODY = 16 * 1024  # bytes; a verdict takes 300
IDLE_S = 60.0  # after which a connection is closed
LAST_REPLY_S = 5.0  # that the end waits for it
LONGEST_S = 1e6  # that a person looks at one pair


class Refusal(Exception):
    """A request that is not served; `status` is HTTP's."""

    def __init__(self, status: HTTPStatus, message: str):
        super().__init__(message)
        self.status = status


def _name(given: Any) -> str:
    """An annotator's, or Refusal."""
    name = unicodedata.normalize("NFC", given).strip() if isinstance(given, str) else ""
    if not (0 < len(name) <= LONGEST_NAME and name.isprintable()):
        raise Refusal(HTTPStatus.BAD_REQUEST,
                      f"A name has 1 to {LONGEST_NAME} printable characters.")  # fmt: skip
    return name


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, host: str, port: int, questions: Questions, token: str):
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.questions, self.token, self.host = questions, token, host
        html = PAGE.read_bytes()
        self.html, self.policy = html, _policy(html)
        self._replies, self._done = 0, threading.Condition()
        super().__init__((host, port), _Handler)

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # http.server would ask DNS for our own name

    @contextmanager
    def replying(self) -> Iterator[None]:
        with self._done:
            self._replies += 1
        try:
            yield
        finally:
            with self._done:
                self._replies -= 1
                self._done.notify_all()

    def finish_replies(self) -> None:
        """Wait for those under way, but not for a client that has stopped in the middle."""
        with self._done:
            self._done.wait_for(lambda: self._replies == 0, LAST_REPLY_S)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that goes away in the middle is no news."""


def _policy(html: bytes) -> str:
    """Content-Security-Policy: the page's own script and style by their hashes, and no other."""

    def of(tag: bytes) -> str:
        [inside] = re.findall(rb"<%s>(.*?)</%s>" % (tag, tag), html, re.DOTALL)
        return f"'sha256-{base64.b64encode(hashlib.sha256(inside).digest()).decode()}'"

    return (f"default-src 'none'; script-src {of(b'script')}; style-src {of(b'style')}; "
            f"connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
            f"frame-ancestors 'none'")  # fmt: skip


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "rankpo-fast", ""
    timeout = IDLE_S

    def do_GET(self) -> None:
        with self.server.replying():
            self._reply(self._get)

    def do_POST(self) -> None:
        with self.server.replying():
            self._reply(self._post)

    def log_message(self, format: str, *args: Any) -> None:
        """None: a line would hold the token."""

    def _get(self) -> bytes | dict[str, Any]:
        place, query = self._place()
        if place == "":
            return self.server.html
        if place != "state":
            raise Refusal(HTTPStatus.NOT_FOUND, "There is no such page.")
        given = parse_qs(query).get("annotator")
        if given is None:
            return {"annotators": self.server.questions.annotators()}
        return self.server.questions.state(_name(given[0]))

    def _post(self) -> dict[str, Any]:
        # The body is read before anything is refused: what is left of it would be the next request.
        body = self._body()
        if self._place()[0] != "verdict":
            raise Refusal(HTTPStatus.NOT_FOUND, "There is no such page.")
        origin, site = self.headers.get("Origin"), self.headers.get("Sec-Fetch-Site")
        foreign = origin is not None and urlsplit(origin).netloc != self.headers.get("Host")
        if foreign or site not in (None, "same-origin"):
            raise Refusal(HTTPStatus.FORBIDDEN, "Another site may not send verdicts.")
        if self.headers.get_content_type() != "application/json":  # others cross sites unasked
            raise Refusal(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "A verdict is application/json.")
        try:
            sent = json.loads(body)
        except (ValueError, RecursionError):
            sent = None
        if not isinstance(sent, dict) or not _is_verdict(sent):
            raise Refusal(HTTPStatus.BAD_REQUEST, "This is no verdict.")
        return self.server.questions.answer(
            _name(sent["annotator"]), sent["pair"], sent["turn"], sent["choice"], sent["unsure"],
            sent["seconds"],
        )  # fmt: skip

    def _body(self) -> bytes:
        length = self.headers.get("Content-Length", "")
        if not re.fullmatch(r"[0-9]{1,9}", length) or "Transfer-Encoding" in self.headers:
            self.close_connection = True
            raise Refusal(HTTPStatus.LENGTH_REQUIRED, "The length must be said.")
        if int(length) > LARGEST_BODY:
            self.close_connection = True
            raise Refusal(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "This is too long for a verdict.")
        return self.rfile.read(int(length))

    def _place(self) -> tuple[str, str]:
        """Path below the token, and query; Refusal without the token, or under a foreign name.

        A site may point its own name at this machine and so be of our origin: it is known by it.
        """
        try:
            host = urlsplit(f"//{self.headers.get('Host', '')}").hostname or ""
            path = urlsplit(self.path)
        except ValueError:
            raise Refusal(HTTPStatus.BAD_REQUEST, "This is no address.") from None
        if not _is_address(host) and host not in (
            "localhost", self.server.host.lower(), socket.gethostname().lower()
        ):  # fmt: skip
            raise Refusal(HTTPStatus.MISDIRECTED_REQUEST, "This server has another name.")
        token, slash, place = path.path.removeprefix("/").partition("/")
        if not hmac.compare_digest(token.encode(), self.server.token.encode()) or not slash:
            raise Refusal(HTTPStatus.NOT_FOUND, "There is no such page: the address in the "
                          "terminal is whole.")  # fmt: skip
        return place, path.query

    def _reply(self, make: Callable[[], bytes | dict[str, Any]]) -> None:
        status = HTTPStatus.OK
        try:
            content = make()
        except Refusal as refusal:
            status, content = refusal.status, {"error": str(refusal)}
        except Late as late:
            status, content = HTTPStatus.CONFLICT, {"error": str(late), "state": late.state}
        except Ended as end:
            status, content = HTTPStatus.SERVICE_UNAVAILABLE, {"error": str(end)}
        except OSError as error:
            status = HTTPStatus.INSUFFICIENT_STORAGE
            content = {"error": f"The verdict could not be saved: {reason(error)}."}
        html = isinstance(content, bytes)
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {
            "Content-Type": f"{'text/html' if html else 'application/json'}; charset=utf-8",
            "Content-Length": str(len(body)), "Cache-Control": "no-store",
            "Content-Security-Policy": self.server.policy, "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff", "Cross-Origin-Resource-Policy": "same-origin",
            "Cross-Origin-Opener-Policy": "same-origin",
            **({"Connection": "close"} if self.close_connection else {}),
        }.items():  # fmt: skip
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


def _is_verdict(sent: dict) -> bool:
    """Whether it has the fields of one, of their types; its name is looked at later."""
    turn: Any = sent.get("turn")
    seconds: Any = sent.get("seconds")
    return (
        isinstance(sent.get("pair"), str)
        and type(turn) is int
        and sent.get("choice") in CHOICES
        and isinstance(sent.get("unsure"), bool)
        and type(seconds) in (int, float)
        and math.isfinite(seconds)
        and 0 <= seconds <= LONGEST_S
        and "annotator" in sent
    )


def _is_address(host: str) -> bool:
    """Of a machine, in numbers: no site can make it its own, as it can a name."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


class PageServer:
    """A page that is being served; `close` it, or use it in a `with`.

    Attributes:
        url: its address, with the token: whoever has it can answer.
    """

    def __init__(self, server: _Server):
        self._server = server
        port = server.server_address[1]
        name = f"[{server.host}]" if ":" in server.host else server.host
        self.url = f"http://{name}:{port}/{server.token}/"
        self._thread = threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True)
        self._thread.start()

    def __enter__(self) -> "PageServer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def serve_until(self, annotators: int | None = None) -> bool:
        """Wait until so many annotators have judged all pairs (True), or for a signal to stop.

        Signals are taken in the main thread only, and their handlers put back.
        """
        ended: list[int] = []
        previous = {}
        if threading.current_thread() is threading.main_thread():
            for number in not_ignored():
                previous[number] = signal.signal(number, lambda number, _: ended.append(number))
        try:
            while not ended:
                if annotators is not None and self._server.questions.finished() >= annotators:
                    return True
                time.sleep(0.2)
            return False
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def close(self) -> None:
        """Serve no more, and write no more to the journal, which stays open."""
        self._server.questions.close()
        self._server.shutdown()
        self._thread.join()
        self._server.finish_replies()
        self._server.server_close()


def serve_page(
    pairs: Sequence[dict], journal: Journal, *, host: str = "127.0.0.1", port: int = 0,
    instructions: str = "",
) -> PageServer:  # fmt: skip
    """Start to serve pairs on a page; returns at once.

    Args:
        pairs: rows with "query", "passage1" and "passage2".
        journal: for the verdicts; those in it are not asked again.
        host: the address to listen at. Any other than this machine's own is warned of.
        port: 0: one that is free, another each time.
        instructions: what the annotators are told to look at; plain text.

    Raises InputError for pairs that cannot be shown, and an address that cannot be had.
    """
    questions = Questions(pairs, journal, instructions)
    if not (host == "localhost" or _is_address(host) and ipaddress.ip_address(host).is_loopback):
        warnings.warn(f"--host {host}: texts and verdicts go over the network unencrypted, and "
                      f"whoever has the address can answer", stacklevel=2)  # fmt: skip
    try:
        server = _Server(host, port, questions, _token(journal.path))
    except (OSError, OverflowError) as error:
        raise InputError(f"--port {port} of --host {host} cannot be served: "
                         f"{reason(error)}") from None  # fmt: skip
    return PageServer(server)


def _token(journal: Path) -> str:
    """Of the address: from the file beside the journal, made where there is none."""
    path = journal.with_name(f"{journal.name}.token")
    try:
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        token = path.read_text().strip()
        if path.stat().st_mode & 0o077:
            raise InputError(f"{path}: others can read it, and so could answer: delete it, or "
                             f"chmod 600") from None  # fmt: skip
        if not re.fullmatch(r"[\w-]{32,}", token, re.ASCII):
            raise InputError(f"{path}: holds no token: delete it") from None
        return token
    with os.fdopen(file, "w") as opened:
        token = secrets.token_urlsafe(24)
        opened.write(f"{token}\n")
    return token
