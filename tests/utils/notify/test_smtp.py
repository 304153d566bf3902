import asyncio
import contextlib
import email
import email.policy
import io
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from email.message import EmailMessage
from html import escape
from pathlib import Path
from typing import Any

import pytest
import trustme
from aiosmtpd.smtp import SMTP, AuthResult
from PIL import Image

from dida_tools.config.errors import UserError
from dida_tools.utils.notify import NotificationError, SMTPNotifier
from dida_tools.utils.notify import smtp as module

ROOT = Path(__file__).parents[3]
USER, PASSWORD = "me@example.org", "abcd-'&-efgh ijkl"
RECEIVER = "you@example.org"
pytestmark = pytest.mark.filterwarnings("ignore:Requiring AUTH")
posix = pytest.mark.skipif(os.name != "posix", reason="needs fork or SIGKILL")


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HOST", "PORT", "SECURITY", "USER", "SENDER"):
        monkeypatch.delenv(f"SMTP_{name}", raising=False)
    monkeypatch.setenv("SMTP_PASSWORD", PASSWORD)


@pytest.fixture
def no_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SMTP_PASSWORD")


def png(size: int = 2) -> bytes:
    file = io.BytesIO()
    Image.effect_noise((size, size), 50).save(file, "PNG")
    return file.getvalue()


def wait_until(condition: Callable[[], Any], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it has not happened"
        time.sleep(0.01)


def content(mail: EmailMessage, kind: str = "plain") -> str:
    part = mail.get_body((kind,))
    assert part is not None
    return str(part.get_content()).replace("\r\n", "\n")


# -------------------------------------------------------------------------------------------------------------- servers


class Authority:
    """A certificate authority, with a server certificate for localhost."""

    def __init__(self) -> None:
        authority = trustme.CA()
        self.server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert("localhost").configure_cert(self.server)
        self.client = ssl.create_default_context()
        authority.configure_trust(self.client)


@pytest.fixture(scope="session")
def authority() -> Authority:
    return Authority()


class Server:
    """A mail server that records what it gets, and replies to each mail with the next of the replies."""

    def __init__(
        self, context: ssl.SSLContext | None, security: str, replies: list[str], refused: dict[str, str]
    ):
        self.replies, self.refused = replies, refused
        self.mails: list[EmailMessage] = []
        self.contents: list[bytes] = []
        self.receivers: list[list[str]] = []
        self.logins: list[tuple[str, str]] = []
        self.num_connections = self.num_tries = 0
        options: dict[str, Any] = {"hostname": "localhost"}
        if security != "none":
            options |= {
                "authenticator": self._log_in,
                "auth_required": True,
                "auth_require_tls": security == "starttls",
            }
        if security == "starttls":
            options |= {"tls_context": context, "require_starttls": True}

        def connect() -> SMTP:
            self.num_connections += 1
            return SMTP(self, **options)

        self._loop = asyncio.new_event_loop()
        self._loop.set_exception_handler(lambda *_: None)  # refused handshakes
        encryption = context if security == "tls" else None
        server = self._loop.run_until_complete(
            self._loop.create_server(connect, "127.0.0.1", 0, ssl=encryption)
        )
        self.port: int = server.sockets[0].getsockname()[1]
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)

    def _log_in(self, _server: Any, _session: Any, _envelope: Any, _mechanism: str, data: Any) -> AuthResult:
        self.logins.append((data.login.decode(), data.password.decode()))
        return AuthResult(success=self.logins[-1] == (USER, PASSWORD), handled=False)

    async def handle_RCPT(
        self, _server: Any, _session: Any, envelope: Any, address: str, _options: Any
    ) -> str:
        if address in self.refused:
            return self.refused[address]
        envelope.rcpt_tos.append(address)
        return "250 OK"

    async def handle_DATA(self, server: Any, _session: Any, envelope: Any) -> str:
        self.num_tries += 1
        reply = self.replies.pop(0) if self.replies else "250 OK"
        if reply == "disconnect":
            server.transport.abort()
        elif reply == "slow":
            await asyncio.sleep(0.3)
        elif not reply.startswith("250"):
            return reply
        if reply != "disconnect":
            self.receivers.append(envelope.rcpt_tos)
            self.contents.append(envelope.content)
            self.mails.append(email.message_from_bytes(envelope.content, policy=email.policy.default))  # type: ignore
        return "250 OK"


@pytest.fixture
def serve(authority: Authority) -> Iterator[Callable[..., Server]]:
    with contextlib.ExitStack() as stack:

        def start(
            security: str = "starttls",
            replies: list[str] | None = None,
            refused: dict[str, str] | None = None,
            context: ssl.SSLContext = authority.server,
        ) -> Server:
            server = Server(context, security, replies or [], refused or {})
            stack.callback(server.stop)
            return server

        yield start


class Talk:
    """A bare server: each connection is answered by a function, and all bytes that arrive are recorded."""

    def __init__(self, answer: Callable[["Talk", socket.socket], None]) -> None:
        self.received = b""
        self.connections: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**16)  # no large mail fits in
        self.port: int = self._listener.getsockname()[1]
        self._answer = answer
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection = self._listener.accept()[0]
                self.connections.append(connection)
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError):
            self._answer(self, connection)

    def read_line(self, connection: socket.socket) -> bytes:
        line = b""
        while not line.endswith(b"\n"):
            byte = connection.recv(1)
            if not byte:
                raise ConnectionError
            line += byte
            self.received += byte
        return line

    def stop(self) -> None:
        for opened in (self._listener, *self.connections):
            opened.close()


@pytest.fixture
def talk() -> Iterator[Callable[..., Talk]]:
    with contextlib.ExitStack() as stack:

        def start(answer: Callable[[Talk, socket.socket], None]) -> Talk:
            server = Talk(answer)
            stack.callback(server.stop)
            return server

        yield start


def answer_nothing(_talk: Talk, _connection: socket.socket) -> None:
    """A black hole: it accepts, and that is all."""


def answer_bytewise(_talk: Talk, connection: socket.socket) -> None:
    while True:
        connection.sendall(b"2")
        time.sleep(0.05)


def converse(replies: dict[bytes, bytes]) -> Callable[[Talk, socket.socket], None]:
    """Replies by the first four letters of a command, and disconnects after a reply that begins with !."""

    def answer(talk: Talk, connection: socket.socket) -> None:
        connection.sendall(b"220 hello\r\n")
        while True:
            reply = replies.get(talk.read_line(connection)[:4].upper(), b"250 OK\r\n")
            connection.sendall(reply.lstrip(b"!"))
            if reply.startswith(b"!"):
                connection.close()
                return

    return answer


@pytest.fixture
def make(authority: Authority) -> Iterator[Callable[..., tuple[SMTPNotifier, list[str]]]]:
    """A notifier for a server of this test, and what it says."""
    made = []

    def start(port: int, receivers: Any = RECEIVER, **options: Any) -> tuple[SMTPNotifier, list[str]]:
        said: list[str] = []
        defaults: dict[str, Any] = {
            "host": "localhost",
            "user": USER,
            "ssl_context": authority.client,
            "timeout_seconds": 5.0,
            "retry_seconds": (0.01, 0.01),
            "say": said.append,
        }
        notifier = SMTPNotifier(receivers, port=port, **(defaults | options))
        made.append(notifier)
        return notifier, said

    yield start
    for notifier in made:
        notifier.close(0)


PLAIN: dict[str, Any] = {"security": "none", "user": "", "sender": USER}

# -------------------------------------------------------------------------------------------------------- what is sent


@pytest.mark.parametrize("security", ["starttls", "tls"])
def test_a_mail_arrives_whole(serve, make, security, tmp_path):
    server = serve(security)
    (tmp_path / "loss.png").write_bytes(png())
    notifier, said = make(
        server.port, ["a@example.org", "b@example.org"], cc="c@example.org", security=security
    )
    notifier.notify("Lösung: 1 < 2\n.\nend", "run 7 is finished", picture=tmp_path / "loss.png")
    notifier.close()
    assert said == []
    [mail] = server.mails
    assert mail["Subject"] == "run 7 is finished"
    assert (mail["From"], mail["To"], mail["Cc"]) == (USER, "a@example.org, b@example.org", "c@example.org")
    assert mail["Date"].datetime is not None
    assert mail["Message-ID"].endswith("@example.org>")
    assert server.receivers == [["a@example.org", "b@example.org", "c@example.org"]]
    assert server.logins == [(USER, PASSWORD)]
    text, related = mail.iter_parts()
    assert text.get_content_type() == "text/plain"
    assert content(mail) == "Lösung: 1 < 2\n.\nend\n"
    html, picture = related.iter_parts()
    assert html.get_content_type() == "text/html"
    assert "Lösung: 1 &lt; 2" in html.get_content()
    assert f'src="cid:{picture["Content-ID"][1:-1]}"' in html.get_content()
    assert (picture.get_content_type(), picture.get_content_disposition()) == ("image/png", "inline")
    assert picture.get_content() == (tmp_path / "loss.png").read_bytes()


def test_html_and_picture_bytes(serve, make):
    server, picture = serve(), png(50)
    notifier, said = make(server.port)
    notifier.notify("text", html="<b>bold</b>", picture=picture)
    notifier.notify("text", html="<b>" + "x" * 200_000)
    notifier.close()
    assert said == []
    html, shown = list(server.mails[0].iter_parts())[1].iter_parts()
    assert html.get_content().startswith("<b>bold</b><p><img ")
    assert shown.get_content() == picture
    assert ">text</pre>" in content(server.mails[1], "html")


def test_a_picture_that_cannot_be_used_is_left_out(serve, make, tmp_path):
    server = serve()
    notifier, said = make(server.port)
    (tmp_path / "key.png").write_text("no PNG")
    too_large = png() + bytes(module.MAX_PICTURE_BYTES)
    pictures = [tmp_path / "missing.png", tmp_path, tmp_path / "key.png", b"", 7, "\0", too_large]
    for picture in pictures:
        notifier.notify("text", picture=picture)
    notifier.close()
    assert len(server.mails) == len(said) == len(pictures)
    assert all(sentence.startswith("the e-mail goes without its picture: ") for sentence in said)
    assert "missing.png" in said[0]
    assert "key.png" not in str(server.mails[2])
    assert all(mail.get_content_type() == "multipart/alternative" for mail in server.mails)


SUBJECTS = {
    "a\nBcc: evil@example.org": "a Bcc: evil@example.org",
    "a\r\n\r\nbody": "a body",
    "a\rb\x0bc\x0cd\x1ce\x85f\u2028g\u2029h\0i": "a b c d e f g h?i",
    "=?utf-8?q?a=0ABcc:_evil=40example.org?=": "= ?utf-8?q?a=0ABcc:_evil=40example.org?=",
    "=?utf-8?b?YQpCY2M6IGV2aWxAZXhhbXBsZS5vcmc=?=": "= ?utf-8?b?YQpCY2M6IGV2aWxAZXhhbXBsZS5vcmc= ?=",
    "=\0?utf-8?q?a=0ABcc:_evil?=": "= ??utf-8?q?a=0ABcc:_evil?=",
    "\ud800 Straße 日本語 🙂": "? Straße 日本語 🙂",
    "": "",
    "x" * 5000: "x" * 200,
    "日" * 5000: "日" * 200,
}


def test_no_subject_breaks_a_mail_or_adds_headers(serve, make):
    server = serve()
    notifier, said = make(server.port)
    for subject in SUBJECTS:
        notifier.notify("text", subject)
    notifier.close()
    assert said == []
    assert [str(mail["Subject"]).strip() for mail in server.mails] == list(SUBJECTS.values())
    for mail, receivers in zip(server.mails, server.receivers, strict=True):
        assert receivers == [RECEIVER]
        assert "Bcc" not in mail
        assert content(mail) == "text\n"


def test_messages_of_all_sorts_arrive(serve, make):
    server = serve()
    notifier, said = make(server.port)
    texts = ["", ".", "..\n.\n", "x" * 5000, "ä" * 5000, "Straße"]
    texts += ["1 %\r2 %\r", "\x1b[31mred\x1b[0m", "\0\ud800", "From me"]
    for text in texts:
        notifier.notify(text)
    notifier.notify("a" * 500_000 + "b" * 500_000)
    notifier.notify(ValueError("7"))
    notifier.close()
    assert said == []
    *texts_sent, long, error = [content(mail) for mail in server.mails]
    expected = [text.replace("\r", "\n").replace("\0\ud800", "??") for text in texts]
    assert [text.rstrip("\n") for text in texts_sent] == [text.rstrip("\n") for text in expected]
    assert long.startswith("aaa")
    assert "[... 900000 characters are left out ...]" in long
    assert len(long) < 101_000
    assert long.endswith("bbb\n")
    assert error == "7\n"
    for sent in server.contents:
        assert max(map(len, sent.split(b"\r\n"))) <= 998
        assert sent.isascii()


def test_receivers_separated_by_commas_and_each_but_once(serve, make):
    server = serve()
    notifier, _ = make(server.port, "a@example.org, b@example.org", cc=("b@example.org",))
    notifier.notify("text")
    notifier.close()
    assert server.receivers == [["a@example.org", "b@example.org"]]


# -------------------------------------------------------------------------------------------------------------- secrets


def test_secrets_are_neither_sent_nor_said(serve, make):
    server = serve(replies=["250 OK", f"554 5.7.1 key-123 {PASSWORD}\r\n"])
    notifier, said = make(server.port, redact=lambda text: text.replace("key-123", "KEY"))
    try:
        raise ValueError(f"key-123 {PASSWORD}")
    except ValueError as error:
        notifier.notify(
            f"{error!r} {error}",
            f"key-123 {PASSWORD} is wrong",
            html=f"<b>key-123 {PASSWORD} {escape(PASSWORD)}</b>",
        )
    notifier.notify("text", f"key-123 {PASSWORD}")
    notifier.close()
    notifier.notify("text", f"key-123 {PASSWORD}")
    [mail] = server.mails
    assert mail["Subject"] == "KEY *** is wrong"
    contents = [content(mail, kind) for kind in ("plain", "html")]
    everything = [mail.as_string(), *contents, *said, repr(notifier), str(vars(notifier))]
    for secret in ("key-123", PASSWORD, "efgh"):
        assert not [text for text in everything if secret in text]
    assert len(said) == 2
    assert "554 5.7.1 KEY ***" in said[0]


def test_the_default_html_is_redacted_before_it_is_escaped(serve, make):
    server = serve()
    notifier, _ = make(server.port, redact=lambda text: text.replace("k<&>y", "KEY"))
    notifier.notify("the k<&>y")
    notifier.close()
    assert ">the KEY</pre>" in content(server.mails[0], "html")


def test_a_failing_redact_lets_nothing_through(serve, make):
    server = serve()

    def fail(_text: str) -> str:
        raise KeyError("key-123")

    notifier, said = make(server.port, redact=fail)
    notifier.notify("key-123", "key-123", html="key-123", picture="key-123")
    notifier.close()
    assert len(server.mails) == len(said) == 1
    assert "key-123" not in server.mails[0].as_string() + said[0]
    assert "redact fails with KeyError" in server.mails[0]["Subject"]


def test_a_server_that_repeats_the_login_in_its_reply(talk, make, authority):
    def answer(self: Talk, connection: socket.socket) -> None:
        with authority.server.wrap_socket(connection, server_side=True) as encrypted:
            encrypted.sendall(b"220 hello\r\n")
            self.read_line(encrypted)
            encrypted.sendall(b"250-hello\r\n250 AUTH LOGIN PLAIN\r\n")
            command = self.read_line(encrypted).strip()
            # As Gmail does, it disconnects after a wrong password, which must not look like a network's failure.
            encrypted.sendall(b"535 5.7.8 %s %s\r\n" % (command, b64encode(PASSWORD.encode())))

    server = talk(answer)
    notifier, said = make(server.port, security="tls")
    notifier.notify("text")
    notifier.close()
    assert len(server.connections) == 1
    assert server.received.count(b"AUTH") == 1
    [sentence] = said
    assert "535 5.7.8 AUTH PLAIN *** ***; check SMTP_USER and SMTP_PASSWORD" in sentence


# ------------------------------------------------------------------------------------------------------------- security


@pytest.mark.parametrize("security", ["starttls", "tls"])
@pytest.mark.parametrize("problem", ["unknown authority", "system authorities", "other host"])
def test_a_wrong_certificate_is_refused_before_the_login(serve, make, security, problem):
    server = serve(security, **({"context": Authority().server} if problem == "unknown authority" else {}))
    if problem == "other host":
        notifier, said = make(server.port, security=security, host="127.0.0.1")
    elif problem == "system authorities":
        notifier, said = make(server.port, security=security, ssl_context=None)
    else:
        notifier, said = make(server.port, security=security)
    with pytest.raises(NotificationError, match="certificate verify failed") as raised:
        notifier.check()
    assert raised.value.__context__ is None
    num_connections = server.num_connections
    notifier.notify("text")
    notifier.close()
    assert server.logins == server.mails == []
    assert server.num_connections == num_connections + 1
    [sentence] = said
    assert f":{server.port}: " in sentence
    assert "certificate verify failed" in sentence
    assert "check SMTP_HOST" in sentence


def test_a_wrong_password_is_said_and_not_repeated(serve, make, monkeypatch):
    server = serve()
    monkeypatch.setenv("SMTP_PASSWORD", "wrong-password")
    notifier, said = make(server.port)
    notifier.notify("text", "run 7")
    notifier.close()
    assert server.logins == [(USER, "wrong-password")]
    [sentence] = said
    assert sentence.startswith(f'e-mail "run 7" was not sent: localhost:{server.port}: 535 ')
    assert sentence.endswith("; check SMTP_USER and SMTP_PASSWORD (Gmail wants an app password).")
    with pytest.raises(
        UserError, match=r"would send no e-mail: 535 .* check SMTP_USER and SMTP_PASSWORD"
    ) as raised:
        notifier.check()
    assert "wrong-password" not in str(raised.value)
    assert raised.value.__context__ is None


def test_check_is_silent_where_all_is_well(serve, make):
    server = serve()
    notifier, said = make(server.port)
    notifier.check()
    assert server.logins == [(USER, PASSWORD)]
    assert said == server.mails == []


@pytest.mark.parametrize(
    ("features", "starttls"),
    [
        (b"250-hello\r\n250 AUTH PLAIN LOGIN\r\n", b"502 no\r\n"),
        (b"250-hello\r\n250-STARTTLS\r\n250 AUTH PLAIN LOGIN\r\n", b"502 no\r\n"),
        (b"250-hello\r\n250-STARTTLS\r\n250 AUTH PLAIN LOGIN\r\n", b"454 not now\r\n"),
        (b"250-hello\r\n250-STARTTLS\r\n250 AUTH PLAIN LOGIN\r\n", b"250 as you like\r\n"),
        (b"250-hello\r\n250-STARTTLS\r\n250 AUTH PLAIN LOGIN\r\n", b"!220 go\r\n"),
    ],
)
def test_without_starttls_no_password_is_sent(talk, make, features, starttls):
    server = talk(converse({b"EHLO": features, b"STAR": starttls}))
    notifier, said = make(server.port)
    notifier.notify("text")
    notifier.close()
    assert len(said) == 1
    assert b"AUTH" not in server.received
    assert b"MAIL" not in server.received
    assert b64encode(PASSWORD.encode()) not in server.received


def test_what_is_injected_behind_starttls_is_not_taken_for_the_servers(talk, make):
    injected = b"220 go\r\n250-hello\r\n250 AUTH PLAIN\r\n235 welcome\r\n"
    server = talk(converse({b"EHLO": b"250-hello\r\n250 STARTTLS\r\n", b"STAR": injected}))
    notifier, said = make(server.port, timeout_seconds=0.5, retry_seconds=())
    notifier.notify("text")
    notifier.close()
    assert len(said) == 1
    assert b"AUTH" not in server.received


def test_without_encryption_no_password_is_taken(serve):
    server = serve("none")
    with pytest.raises(
        NotificationError, match="SMTP_SECURITY is none, but SMTP_USER would log in: set starttls"
    ):
        SMTPNotifier(RECEIVER, host="localhost", port=server.port, security="none", user=USER)
    assert server.num_connections == 0


@pytest.mark.usefixtures("no_password")
def test_a_relay_on_this_machine_needs_no_password(serve, make):
    server = serve("none")
    notifier, said = make(server.port, **PLAIN)
    notifier.notify("text")
    notifier.close()
    assert said == []
    assert server.mails[0]["From"] == USER


# ------------------------------------------------------------------------------------------------------------- delivery


@pytest.mark.parametrize(
    "failures", [["451 later", "452 full"], ["disconnect"], ["disconnect", "421 closing"]]
)
def test_failures_that_may_pass_are_tried_again(serve, make, failures):
    server = serve(replies=[*failures, "250 OK"])
    notifier, said = make(server.port)
    notifier.notify("text")
    notifier.close()
    assert said == []
    assert len(server.mails) == 1
    assert server.num_tries == len(failures) + 1


def test_after_three_tries_it_is_said_once(serve, make):
    server = serve(replies=["451 later"] * 3)
    notifier, said = make(server.port)
    notifier.notify("lost", "run 7")
    notifier.notify("arrives")
    notifier.close()
    assert said == [
        f'e-mail "run 7" was not sent: localhost:{server.port}: 451 later; the reply of the server says why.'
    ]
    assert server.num_tries == 4
    assert len(server.mails) == 1


def test_failures_that_do_not_pass_are_not_tried_again(serve, make):
    server = serve(replies=["554 5.7.1 spam"])
    notifier, said = make(server.port)
    notifier.notify("text")
    notifier.close()
    assert server.num_tries == 1
    assert len(said) == 1
    assert "554 5.7.1 spam" in said[0]


def test_refused_receivers_are_said(serve, make):
    server = serve(refused={"b@example.org": "550 no such user"})
    notifier, said = make(server.port, ["a@example.org", "b@example.org"])
    notifier.notify("text", "run 7")
    notifier.close()
    assert server.receivers == [["a@example.org"]]
    assert said == ['e-mail "run 7" was not sent to b@example.org (550 no such user): check the address.']


@pytest.mark.parametrize(("reply", "num_tries"), [("550 no such user", 1), ("450 later", 3)])
def test_when_all_receivers_are_refused(serve, make, reply, num_tries):
    server = serve(refused={RECEIVER: reply})
    notifier, said = make(server.port)
    notifier.notify("text")
    notifier.close()
    assert server.num_connections == num_tries
    assert len(said) == 1
    assert f"{RECEIVER} ({reply})" in said[0]


def test_nobody_listens(make):
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    notifier, said = make(port)
    notifier.notify("text")
    with pytest.raises(NotificationError, match=r"refused.*; check SMTP_HOST, SMTP_PORT"):
        notifier.check()
    notifier.close()
    assert len(said) == 1
    assert "refused" in said[0].lower()


@pytest.mark.parametrize("security", ["starttls", "tls"])
def test_a_black_hole_delays_nothing(talk, make, security):
    server = talk(answer_nothing)
    notifier, said = make(server.port, security=security, timeout_seconds=60.0)
    start = time.monotonic()
    for _ in range(5):
        notifier.notify("text", picture=png())
    assert time.monotonic() - start < 5
    wait_until(lambda: server.connections)
    notifier.close(0.2)
    assert time.monotonic() - start < 20
    assert said == [f"5 e-mail(s) could not be sent in 0.2 s: does localhost:{server.port} answer?"]


@pytest.mark.parametrize("answer", [answer_nothing, answer_bytewise])
def test_a_server_that_holds_on_is_left(talk, make, answer):
    server = talk(answer)
    notifier, said = make(server.port, timeout_seconds=0.4, retry_seconds=())
    start = time.monotonic()
    with pytest.raises(NotificationError, match="would send no e-mail"):
        notifier.check()
    notifier.notify("text")
    notifier.close(60)
    assert time.monotonic() - start < 30
    [sentence] = said
    assert (
        ("timed out" in sentence)
        if answer is answer_nothing
        else ("not answered in full after 2.4 s" in sentence)
    )


def test_a_full_queue_drops_the_oldest_and_says_so_once(talk, make):
    server = talk(answer_nothing)
    notifier, said = make(server.port, timeout_seconds=60.0)
    start = time.monotonic()
    notifier.notify("text")
    wait_until(lambda: server.connections)
    for number in range(500):
        notifier.notify("text", f"number {number}")
    assert time.monotonic() - start < 20
    assert [mail.subject for mail in notifier._waiting] == [f"number {number}" for number in range(480, 500)]
    assert len(said) == 1
    assert said[0].startswith("20 e-mails wait for localhost")
    notifier.close(0)
    assert said[1].startswith("21 e-mail(s) could not be sent in 0 s")


def test_close_waits_for_all_then_does_nothing(serve, make):
    server = serve(replies=["slow"] * 3)
    notifier, said = make(server.port)
    with notifier as entered:
        assert entered is notifier
        for number in range(3):
            notifier.notify("text", str(number))
    assert [mail["Subject"] for mail in server.mails] == ["0", "1", "2"]
    notifier.close()
    assert said == []
    notifier.notify("text", "run 7")
    assert said == ['e-mail "run 7" was not sent: notify before the notifier is closed.']
    wait_until(lambda: not [thread for thread in threading.enumerate() if thread.name == "e-mail"])


def test_what_is_left_after_close_is_not_tried_again(serve, make):
    server = serve(replies=["451 later"] * 9)
    notifier, said = make(server.port, retry_seconds=(60.0, 60.0))
    notifier.notify("text")
    notifier.notify("text")
    wait_until(lambda: server.num_tries)
    notifier.close(0)
    wait_until(lambda: not [thread for thread in threading.enumerate() if thread.name == "e-mail"])
    assert server.num_tries == 1
    assert len(said) == 1
    assert said[0].startswith("2 e-mail(s)")


def test_a_say_that_fails_does_no_harm(serve, make):
    server = serve(replies=["554 no"])

    def fail(_text: str) -> None:
        raise BrokenPipeError

    notifier, _ = make(server.port, say=fail)
    notifier.notify("text")
    notifier.notify("text", picture="missing.png")
    notifier.close()
    notifier.notify("text")
    assert len(server.mails) == 1


def test_by_default_it_is_printed(serve, make, capsys):
    server = serve(replies=["554 no"])
    notifier, _ = make(server.port, say=print)
    notifier.notify("text")
    notifier.close()
    assert capsys.readouterr().out.count("554 no") == 1


# ------------------------------------------------------------------------------------------------------------ processes

SCRIPT = """
import os, sys
from dida_tools.utils.notify import SMTPNotifier
notifier = SMTPNotifier("you@example.org", "me@example.org", host="127.0.0.1", port=int(sys.argv[1]), security="none",
                        timeout_seconds=60.0)
"""


def run_script(port: int, lines: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", SCRIPT + lines, str(port)]
    return subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


@pytest.mark.usefixtures("no_password")
def test_the_end_of_the_interpreter_is_not_held_up(talk):
    server = talk(answer_nothing)
    lines = "for _ in range(9): notifier.notify('text')\nimport time; time.sleep(0.5)"
    with run_script(server.port, lines) as process:
        output, _ = process.communicate(timeout=30)
    assert process.returncode == 0, output
    assert output == ""
    assert len(server.connections) == 1


@pytest.mark.usefixtures("no_password")
def test_the_end_of_the_interpreter_is_not_held_up_by_a_check(talk):
    server = talk(answer_bytewise)
    lines = """
notifier._timeout_seconds = 0.3
try:
    notifier.check()
except ValueError as error:
    print(error)
"""
    with run_script(server.port, lines) as process:
        output, _ = process.communicate(timeout=30)
    assert process.returncode == 0, output
    assert "not answered in full after 0.3 s" in output


@posix
@pytest.mark.usefixtures("no_password")
def test_kill_9_while_sending(talk):
    is_sending, is_over = threading.Event(), threading.Event()

    def answer(self: Talk, connection: socket.socket) -> None:
        connection.sendall(b"220 hello\r\n")
        while self.read_line(connection)[:4].upper() != b"DATA":
            connection.sendall(b"250 OK\r\n")
        connection.sendall(b"354 go\r\n")
        self.received = connection.recv(1000)
        is_sending.set()
        time.sleep(0.5)  # the process waits for the rest to be taken
        while chunk := connection.recv(2**16):
            self.received += chunk
            time.sleep(0.001)
        is_over.set()

    server = talk(answer)
    lines = "notifier.notify('text', picture=b'\\x89PNG' + os.urandom(4_500_000))\nnotifier.close(60)"
    with run_script(server.port, lines) as process:
        assert is_sending.wait(20)
        start = time.monotonic()
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait(20) == -signal.SIGKILL
        assert time.monotonic() - start < 10
    assert is_over.wait(20)
    assert server.received.startswith(b"Subject: Training\r\n")
    assert b"\r\n.\r\n" not in server.received


@posix
@pytest.mark.usefixtures("no_password")
def test_a_forked_process_sends_nothing(serve):
    server = serve("none", replies=["slow"] * 3)
    lines = """
for number in range(3):
    notifier.notify("text", f"parent {number}")
child = os.fork()
if child == 0:
    notifier.notify("text", "child")
    notifier.close()
    sys.stdout.flush()
    os._exit(0)
os.waitpid(child, 0)
notifier.close(60)
"""
    with run_script(server.port, lines) as process:
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert [mail["Subject"] for mail in server.mails] == ["parent 0", "parent 1", "parent 2"]
    assert 'e-mail "child" was not sent: notify in the process that made the notifier.' in output


# --------------------------------------------------------------------------------------------------------- construction


def test_settings_come_from_the_environment(monkeypatch, serve, authority):
    server = serve()
    for name, value in {"HOST": "localhost", "PORT": str(server.port), "USER": USER}.items():
        monkeypatch.setenv(f"SMTP_{name}", value)
    monkeypatch.setenv("SMTP_SENDER", "trainings@example.org")
    with SMTPNotifier(RECEIVER, ssl_context=authority.client) as notifier:
        notifier.notify("text")
    assert server.mails[0]["From"] == "trainings@example.org"
    assert server.logins == [(USER, PASSWORD)]


@pytest.mark.parametrize(("security", "port"), [("", 587), ("starttls", 587), ("tls", 465)])
def test_ports(monkeypatch, security, port):
    monkeypatch.setenv("SMTP_SECURITY", security)
    notifier = SMTPNotifier(RECEIVER, host="localhost", user=USER)
    assert repr(notifier) == f"SMTPNotifier(['{RECEIVER}'], '{USER}', [], host='localhost', port={port})"
    notifier.close()


def test_all_problems_at_once():
    threads = threading.active_count()
    with pytest.raises(NotificationError) as raised:
        SMTPNotifier(
            ["me", "Me <me@example.org>"], "a@b\nBcc: c", cc="x@y@z", host="a b", port=0, security="ssl"
        )
    assert isinstance(raised.value, UserError)
    heading, *problems = str(raised.value).splitlines()
    assert heading == "e-mail has 6 problems: "
    expected = ["'x@y@z'] should be addresses", "sender", "host", "'0'", "'ssl'", "SMTP_USER is not"]
    assert len(problems) == len(expected)
    assert all(part in problem for part, problem in zip(expected, problems, strict=True))
    assert PASSWORD not in str(raised.value)
    assert threading.active_count() == threads


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"receivers": []}, "no receiver"),
        ({"receivers": ""}, "should be addresses"),
        ({"receivers": "=?utf-8?q?a=0ABcc?=@example.org"}, "should be addresses"),
        ({"host": None}, "the host is '': set SMTP_HOST"),
        ({"host": "smtp.gmail.com:587"}, "set SMTP_HOST"),
        ({"port": "x"}, "set SMTP_PORT to a number from 1 to 65535"),
        ({"port": 65536}, "set SMTP_PORT"),
        ({"user": "apikey"}, "the sender is 'apikey': set SMTP_SENDER"),
        ({"user": "mé", "sender": USER}, "only ASCII"),
        ({"timeout_seconds": 0}, "take numbers above 0"),
        ({"timeout_seconds": float("nan")}, "take numbers above 0"),
        ({"retry_seconds": [-1]}, "take numbers above 0"),
    ],
)
def test_each_problem(options, problem):
    with pytest.raises(NotificationError, match="e-mail has 1 problem: ") as raised:
        SMTPNotifier(**({"receivers": RECEIVER, "host": "localhost", "user": USER} | options))
    assert problem in str(raised.value)


def test_a_user_without_password(monkeypatch):
    monkeypatch.setenv("SMTP_PASSWORD", "")
    with pytest.raises(NotificationError, match="SMTP_USER is set, but SMTP_PASSWORD is not"):
        SMTPNotifier(RECEIVER, host="localhost", user=USER)
