"""Mails arrive at a real server, over TLS, without secrets; whatever a server does, nothing is held up."""

import asyncio
import contextlib
import email
import email.policy
import io
import logging
import socket
import socketserver
import ssl
import subprocess
import sys
import threading
import time
from base64 import b64encode
from email.message import EmailMessage
from typing import Any

import pytest
import trustme
from aiosmtpd.smtp import SMTP, AuthResult
from dida_core.errors import UserError
from PIL import Image

from dida_tools.utils.notify import NotificationError, SMTPNotifier
from dida_tools.utils.notify import smtp as module

from tests.helpers import PACKAGE, ROOT, Child

USER, PASSWORD = "me@example.org", "abcd-'&-efgh ijkl"
RECEIVER = "you@example.org"
pytestmark = pytest.mark.filterwarnings("ignore:Requiring AUTH")


def make_authority() -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """A new certificate authority: contexts of a server for localhost, and of clients that trust it."""
    authority, client = trustme.CA(), ssl.create_default_context()
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(server)
    authority.configure_trust(client)
    return server, client


class Server:
    """A mail server that keeps what it gets, and replies to each mail with the next of the replies."""

    def __init__(self, context: ssl.SSLContext, security: str, replies: list[str]) -> None:
        self.replies = replies
        self.mails: list[EmailMessage] = []
        self.receivers: list[list[str]] = []
        self.logins: list[tuple[str, str]] = []
        self.num_tries = 0
        options: dict[str, Any] = {"hostname": "localhost"}
        if security != "none":
            options |= {"authenticator": self._log_in, "auth_required": True}
            options["auth_require_tls"] = security == "starttls"
        if security == "starttls":
            options |= {"tls_context": context, "require_starttls": True}
        self._loop = asyncio.new_event_loop()
        self._loop.set_exception_handler(lambda *_: None)  # refused handshakes
        encryption = context if security == "tls" else None
        listening = self._loop.create_server(lambda: SMTP(self, **options), "127.0.0.1", 0, ssl=encryption)
        self.port: int = self._loop.run_until_complete(listening).sockets[0].getsockname()[1]
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)

    def _log_in(self, _server: Any, _session: Any, _envelope: Any, _mechanism: str, data: Any) -> AuthResult:
        self.logins.append((data.login.decode(), data.password.decode()))
        return AuthResult(success=self.logins[-1] == (USER, PASSWORD), handled=False)

    async def handle_RCPT(self, _server: Any, _session: Any, envelope: Any, address: str, _: Any) -> str:
        if address.startswith("nobody@"):
            return "550 no such user"
        envelope.rcpt_tos.append(address)
        return "250 OK"

    async def handle_DATA(self, server: Any, _session: Any, envelope: Any) -> str:
        self.num_tries += 1
        reply = self.replies.pop(0) if self.replies else "250 OK"
        if reply == "disconnect":
            server.transport.abort()
        elif reply.startswith("250"):
            assert envelope.content.isascii() and max(map(len, envelope.content.split(b"\r\n"))) <= 998
            self.receivers.append(envelope.rcpt_tos)
            mail: Any = email.message_from_bytes(envelope.content, policy=email.policy.default)
            self.mails.append(mail)
        return reply


@pytest.fixture(scope="session")
def contexts():
    return make_authority()


@pytest.fixture
def point_to(monkeypatch):
    """Names a server in the environment."""

    def point(port: int, security: str = "starttls", host: str = "localhost") -> None:
        is_open = security == "none"
        settings = {"HOST": host, "PORT": str(port), "SECURITY": security, "SENDER": USER * is_open}
        settings |= {"USER": USER * (not is_open), "PASSWORD": PASSWORD * (not is_open)}
        for name, value in settings.items():
            monkeypatch.setenv(f"SMTP_{name}", value)

    monkeypatch.setattr(module, "RETRY_SECONDS", 0.01)
    return point


@pytest.fixture
def serve(contexts, point_to):
    """Starts a server."""
    with contextlib.ExitStack() as stack:

        def start(security: str = "starttls", *replies: str, context: Any = None, **about: str) -> Server:
            server = Server(context or contexts[0], security, list(replies))
            stack.callback(server.stop)
            point_to(server.port, security, **about)
            return server

        yield start


@pytest.fixture
def talk(contexts, point_to):
    """A crude server that answers lines by their first letters, or never in full; the lines that it gets."""
    with contextlib.ExitStack() as stack:

        def start(security: str, answers: dict | bytes, encrypted: bool = False) -> list[bytes]:
            lines: list[bytes] = []

            class Handler(socketserver.BaseRequestHandler):
                def handle(self) -> None:
                    connection = self.request
                    if encrypted:
                        connection = contexts[0].wrap_socket(connection, server_side=True)
                    with contextlib.suppress(OSError):
                        while not isinstance(answers, dict):
                            connection.sendall(answers)
                            time.sleep(0.05)
                        connection.sendall(b"220 hi\r\n")
                        for line in connection.makefile("rb"):
                            lines.append(line)
                            answer = answers.get(line[:4], b"250 OK\r\n")
                            connection.sendall(answer.replace(b"%", line.strip()))

            server = stack.enter_context(socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler))
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
            stack.callback(server.shutdown)
            point_to(server.server_address[1], security)
            return lines

        yield start


@pytest.fixture
def send(contexts, caplog):
    """Sends mails, each given as the arguments of notify; what is logged."""

    def act(*mails: tuple, receivers: Any = RECEIVER, wait: float = 20.0, **options: Any) -> list[str]:
        notifier = SMTPNotifier(receivers, **({"ssl_context": contexts[1], "timeout_seconds": 5.0} | options))
        for mail in mails or [("text", "run 7")]:
            notifier.notify(*mail)
        notifier.close(wait)
        assert PASSWORD not in caplog.text and PASSWORD not in str(vars(notifier))
        return [record.getMessage() for record in caplog.records if record.name == module.__name__]

    caplog.set_level(logging.WARNING)
    return act


def png(size: int = 2) -> bytes:
    file = io.BytesIO()
    Image.effect_noise((size, size), 50).save(file, "PNG")
    return file.getvalue()


def content(mail: EmailMessage) -> str:
    part: Any = mail.get_body(("plain",))
    return str(part.get_content()).replace("\r\n", "\n")


# ------------------------------------------------------------------------------------------- what is sent


@pytest.mark.parametrize("security", ["starttls", "tls", "none"])
def test_a_mail_arrives_intact(serve, send, security):
    server, picture = serve(security), png(50)
    mail = ("Lösung: 1 < 2\n.\nend", "run 7 is finished", picture)
    receivers = "a@example.org, b@example.org,b@example.org"
    assert send(mail, receivers=receivers, cc=["c@example.org"]) == []
    [mail] = server.mails
    assert mail["Subject"] == "run 7 is finished" and mail["Date"].datetime is not None
    assert (mail["From"], mail["Cc"], mail["To"][:17]) == (USER, "c@example.org", "a@example.org, b@")
    assert mail["Message-ID"].endswith("@example.org>")
    assert [set(one) for one in server.receivers] == [{"a@example.org", "b@example.org", "c@example.org"}]
    assert server.logins == ([] if security == "none" else [(USER, PASSWORD)])
    assert content(mail) == "Lösung: 1 < 2\n.\nend\n"
    [attached] = mail.iter_attachments()
    assert (attached.get_content_type(), attached.get_content()) == ("image/png", picture)


SUBJECTS = {
    "a\r\n\r\nBcc: evil@example.org": "a Bcc: evil@example.org",
    "a\rb\x0bc\x0cd\x1ce\x85f\u2028g\u2029h\0i": "a b c d e f g h?i",
    "=?utf-8?q?a=0ABcc:_evil=40example.org?=": "= ?utf-8?q?a=0ABcc:_evil=40example.org?=",
    "=\0?utf-8?q?a=0ABcc:_evil?=": "= ??utf-8?q?a=0ABcc:_evil?=",
    "\ud800 Straße 日本語 🙂": "? Straße 日本語 🙂",
    "日" * 5000: "日" * 200,
}
TEXTS = ["", ".", "..\n.\n", "x" * 5000, "ä" * 5000, "1 %\r2 %", "\x1b[31mred", "\0\ud800", "a" * 10**6]


def test_no_subject_and_no_text_breaks_a_mail_or_adds_headers(serve, send):
    server = serve()
    assert send(*(("text", subject) for subject in SUBJECTS)) == send(*((text,) for text in TEXTS)) == []
    assert [mail["Subject"] for mail in server.mails[: len(SUBJECTS)]] == list(SUBJECTS.values())
    shown = [text.replace("\r", "\n").replace("\x1b", r"\x1b") for text in TEXTS]
    expected = [text.replace("\0\ud800", "??")[:100_000] for text in shown]
    found = [content(mail).rstrip("\n") for mail in server.mails[len(SUBJECTS) :]]
    assert found == [text.rstrip("\n") for text in expected]
    assert not any("Bcc" in mail for mail in server.mails)
    assert set(map(tuple, server.receivers)) == {(RECEIVER,)}


# -------------------------------------------------------------------------------------- secrets and TLS


def test_the_password_is_neither_sent_nor_logged(serve, talk, send):
    server = serve("starttls", "250 OK", f"554 {PASSWORD}")
    [line] = send((f"{PASSWORD} is wrong", f"run of {PASSWORD}"), ("text", f"run of {PASSWORD}"))
    [mail] = server.mails
    assert (content(mail), mail["Subject"]) == ("*** is wrong\n", "run of ***")
    assert line.startswith('Cannot send e-mail "run of ***": (554') and line.endswith('"***")')
    # A server may repeat the login in its reply; a wrong password is not tried again.
    replies = {b"ehlo": b"250-hi\r\n250 AUTH PLAIN\r\n", b"AUTH": b"535 5.7.8 % no\r\n"}
    lines = talk("tls", replies, encrypted=True)
    reply = send()[-1]
    assert "535" in reply and "AUTH PLAIN ***" in reply
    assert sum(line.startswith(b"AUTH") for line in lines) == 1


@pytest.mark.parametrize(
    ("security", "problem"),
    [("starttls", "unknown authority"), ("tls", "unknown authority"), ("starttls", "system authorities"),
     ("tls", "other host"), ("starttls", "other host")],
)  # fmt: skip
def test_a_wrong_certificate_is_refused_before_the_login(serve, send, security, problem):
    context = make_authority()[0] if problem == "unknown authority" else None
    server = serve(security, context=context, **({"host": "127.0.0.1"} if problem == "other host" else {}))
    [line] = send(**({"ssl_context": None} if problem == "system authorities" else {}))
    assert server.logins == server.mails == []
    assert 'Cannot send e-mail "run 7"' in line and "certificate verify failed" in line


FEATURES = b"250-hi\r\n250-STARTTLS\r\n250 AUTH PLAIN LOGIN\r\n"
REPLIES = [b"502 no\r\n", b"454 not now\r\n", b"250 as you like\r\n"]
REPLIES += [b"220 go\r\n250-hi\r\n250 AUTH PLAIN\r\n235 welcome\r\n"]  # injected


def test_without_starttls_no_password_is_sent(talk, send):
    cases = [(FEATURES.replace(b"250-STARTTLS\r\n", b""), REPLIES[0]), *((FEATURES, one) for one in REPLIES)]
    for number, (features, starttls) in enumerate(cases, start=1):
        lines = talk("starttls", {b"ehlo": features, b"STAR": starttls})
        assert len(send(timeout_seconds=0.5)) == number
        received = b"".join(lines)
        assert not any(word in received for word in (b"AUTH", b"MAIL", b64encode(PASSWORD.encode())))


# ---------------------------------------------------------------------------------------------- delivery


@pytest.mark.parametrize(
    ("replies", "told"),
    [(["451 later"], None), (["451 later", "452 full"], "452"), (["disconnect", "421 closing"], "421")],
)
def test_each_mail_is_tried_twice(serve, send, replies, told):
    server = serve("starttls", *replies)
    lines = send(("lost", "run 7"), ("arrives", "run 8"))
    assert server.num_tries == 3
    assert [mail["Subject"] for mail in server.mails] == (["run 8"] if told else ["run 7", "run 8"])
    assert len(lines) == bool(told) and (not told or ("run 7" in lines[0] and told in lines[0]))


def test_refused_receivers_are_reported(serve, send):
    server = serve()
    [line] = send(receivers=["a@example.org", "nobody@example.org"])
    assert server.receivers == [["a@example.org"]]
    assert 'Cannot send e-mail "run 7"' in line and "nobody@example.org" in line and "no such user" in line


@pytest.mark.parametrize("answer, security", [(b"", "tls"), (b"2", "starttls")], ids=["silent", "slow"])
def test_a_server_that_does_not_answer_holds_nobody_up(talk, send, answer, security):
    talk(security, answer)
    start = time.monotonic()
    lines = send(*[("text", "run", png())] * (module.MAX_WAITING + 9), wait=0.3, timeout_seconds=60.0)
    assert time.monotonic() - start < 15
    assert 8 <= sum("others wait" in line for line in lines) <= 9
    assert "does not answer within 0.3 s" in lines[-1]


def test_what_cannot_be_sent_is_logged_and_nothing_is_raised(point_to, contexts, caplog):
    with socket.create_server(("127.0.0.1", 0)) as unused:
        point_to(unused.getsockname()[1])
    notifier = SMTPNotifier(RECEIVER, ssl_context=contexts[1])
    notifier.notify("text", "nobody listens")
    notifier.notify("text", "odd picture", 7)  # type: ignore[arg-type]
    notifier.close()
    notifier.close()
    notifier.notify("text", "closed")
    lines = "\n".join(caplog.messages)
    assert len(caplog.messages) == 3 and "refused" in lines and '"closed": the notifier is closed' in lines
    assert not notifier._thread.is_alive()


def test_a_forked_process_sends_nothing(serve, contexts, tmp_path):
    server = serve()
    notifier = SMTPNotifier(RECEIVER, ssl_context=contexts[1])

    def work() -> None:
        logging.basicConfig(force=True)
        notifier.notify("text", "child")
        notifier.close()

    child = Child(work, tmp_path / "output.txt")
    assert child.wait() and child.code == 0 and "the notifier is closed" in child.said()
    notifier.notify("text", "parent")
    notifier.close()
    assert [mail["Subject"] for mail in server.mails] == ["parent"]


@pytest.mark.slow  # imports torch in another process
def test_the_end_of_the_interpreter_is_not_held_up(talk):
    talk("none", b"")
    code = f"from {PACKAGE}.utils.notify import SMTPNotifier\nnotifier = SMTPNotifier('a@b.c')\n"
    code += "for _ in range(9): notifier.notify('text')\nimport time; time.sleep(0.3)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, b"")


# ------------------------------------------------------------------------------------------ construction


@pytest.mark.parametrize(
    ("receivers", "variables", "told"),
    [
        ([], {}, "there is no receiver"),
        ("", {}, "'' is no address"),
        ("me", {}, "'me' is no address: write it like me@example.org"),
        (["a@b\nBcc: c@d.e"], {}, "is no address"),
        (RECEIVER, {"HOST": ""}, "SMTP_HOST is not set"),
        (RECEIVER, {"PORT": "x"}, "SMTP_PORT is 'x': set it to a number"),
        (RECEIVER, {"SECURITY": "ssl"}, "SMTP_SECURITY is 'ssl': set it to one of starttls, tls, none"),
        (RECEIVER, {"SENDER": "apikey"}, "'apikey' is no address"),
        (RECEIVER, {"PASSWORD": ""}, "SMTP_USER is set: set SMTP_PASSWORD too"),
        (RECEIVER, {"SECURITY": "none"}, "SMTP_USER is set: .*SMTP_SECURITY to starttls or tls"),
    ],
)
def test_each_problem_is_found_before_anything_is_sent(point_to, monkeypatch, receivers, variables, told):
    point_to(1)
    for name, value in variables.items():
        monkeypatch.setenv(f"SMTP_{name}", value)
    threads = threading.active_count()
    with pytest.raises(NotificationError, match=f"e-mail has 1 problem: .*{told}") as raised:
        SMTPNotifier(receivers)
    assert isinstance(raised.value, UserError) and PASSWORD not in str(raised.value)
    for name in ("HOST", "USER", "SENDER"):
        monkeypatch.delenv(f"SMTP_{name}", raising=False)
    with pytest.raises(NotificationError, match="problems: "):  # all are reported at once
        SMTPNotifier("me")
    assert threading.active_count() == threads


def test_ports_by_default(point_to, monkeypatch):
    connected: list[int] = []
    for name in ("SMTP", "SMTP_SSL"):
        monkeypatch.setattr(module.smtplib, name, lambda host, port, **_: connected.append(port))
    for security in ("", "tls", "none"):
        point_to(1, security)
        monkeypatch.delenv("SMTP_PORT")
        monkeypatch.setenv("SMTP_SENDER", USER)
        monkeypatch.setenv("SMTP_USER", "")
        notifier = SMTPNotifier(RECEIVER)
        notifier.notify("text")
        notifier.close()
    assert list(dict.fromkeys(connected)) == [587, 465, 25]
