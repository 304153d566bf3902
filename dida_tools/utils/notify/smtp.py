"""
Contains e-mail about trainings, which never delays, fails or outlives one.

What is not given as an argument comes from the environment:

    SMTP_HOST      the mail server, such as smtp.gmail.com
    SMTP_PORT      if not set: 587, with tls 465, with none 25
    SMTP_SECURITY  starttls (if not set), tls (encrypted from the first byte), or none (for a relay on this machine)
    SMTP_USER      the name to log in with; without one there is no login
    SMTP_PASSWORD  its password; never an argument, so that it gets into no config, record or log
    SMTP_SENDER    the address in From, if it is not SMTP_USER

Gmail takes no ordinary password: switch on 2-step verification for the account, make an app password (16 characters) at
https://myaccount.google.com/apppasswords, then

    export SMTP_HOST=smtp.gmail.com SMTP_PORT=587 SMTP_USER=me@gmail.com
    read -rs SMTP_PASSWORD && export SMTP_PASSWORD  # typed unseen, and in no shell's history
"""

import contextlib
import email.policy
import os
import re
import smtplib
import ssl
import threading
from base64 import b64encode
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, wait
from datetime import datetime
from email.message import EmailMessage
from email.utils import localtime, make_msgid
from html import escape
from pathlib import Path
from typing import Any, NamedTuple, Self

from ...config.errors import UserError

NUM_WAITING = 20
MAX_CHARACTERS = 100_000
MAX_PICTURE_BYTES = 5_000_000
_TIMEOUTS_PER_TRY = 6
_PORTS = {"starttls": "587", "tls": "465", "none": "25"}
_ADDRESS = re.compile(r"[\w.!#$%&'*+/=^`{|}~-]+@[\w.-]+", re.ASCII)
_HOST = re.compile(r"[\w.-]+|[\da-f:]*:[\da-f:.]*", re.ASCII)
_HINTS = {
    smtplib.SMTPAuthenticationError: "check SMTP_USER and SMTP_PASSWORD (Gmail wants an app password)",
    smtplib.SMTPResponseException: "the reply of the server says why",
    smtplib.SMTPRecipientsRefused: "check the addresses",
    ssl.SSLCertVerificationError: "check SMTP_HOST, or give an ssl_context that trusts your own authority",
    Exception: "check SMTP_HOST, SMTP_PORT, SMTP_SECURITY and the network",
}
_Replies = dict[str, tuple[int, bytes]]  # by receiver


class NotificationError(UserError):
    """E-mail cannot be sent as it is set up."""


class _Mail(NamedTuple):
    message: str
    subject: str
    html: str | None
    picture: bytes | None
    time: datetime


class SMTPNotifier:
    """
    Sends e-mail from a thread of its own. Use it in a with statement, or call close, so that the last mail gets sent.

    :param receivers: an address, several separated by commas, or a list of them; cc likewise
    :param sender: SMTP_SENDER if None, as are host, port, security and user the variables of their names
    :param timeout_seconds: for each answer of the server; a whole try may take six times as long
    :param retry_seconds: the pauses before further tries, after failures that may pass
    :param ssl_context: for a certificate authority of your own; by default those of the system are trusted
    :param redact: takes secrets out of all that is sent or said; SMTP_PASSWORD is taken out anyway
    :param say: gets a sentence about each mail that was not sent; called from the thread, too
    :raises NotificationError: with all problems of what was given
    """

    def __init__(
        self,
        receivers: str | Iterable[str],
        sender: str | None = None,
        cc: str | Iterable[str] = (),
        *,
        host: str | None = None,
        port: int | None = None,
        security: str | None = None,
        user: str | None = None,
        timeout_seconds: float = 10.0,
        retry_seconds: Sequence[float] = (1.0, 4.0),
        ssl_context: ssl.SSLContext | None = None,
        redact: Callable[[str], str] = str,
        say: Callable[[str], Any] = print,
    ) -> None:
        self._receivers, self._cc = _addresses(receivers), _addresses(cc)
        self._host, self._user = _setting(host, "SMTP_HOST"), _setting(user, "SMTP_USER")
        self._sender = _setting(sender, "SMTP_SENDER") or self._user
        self._security = _setting(security, "SMTP_SECURITY") or "starttls"
        self._port = _setting(port, "SMTP_PORT") or _PORTS.get(self._security, "587")
        self._timeout_seconds, self._retry_seconds = timeout_seconds, tuple(retry_seconds)
        self._ssl_context, self._redact, self._print = ssl_context, redact, say
        if problems := self._find_problems():
            listed = (
                problems[0]
                if len(problems) == 1
                else "\n" + "\n".join(f"  - {problem}" for problem in problems)
            )
            raise NotificationError(
                f"e-mail has {len(problems)} problem{'s' * (len(problems) > 1)}: {listed}"
            )
        self._server = f"{self._host}:{self._port}"
        self._process_id = os.getpid()
        self._changed = threading.Condition()
        self._waiting: deque[_Mail] = deque(maxlen=NUM_WAITING)  # drops the oldest
        self._is_sending = self._is_closed = self._has_said_full = False
        self._given_up = threading.Event()
        threading.Thread(target=self._run, name="e-mail", daemon=True).start()

    def __repr__(self) -> str:
        return f"SMTPNotifier({self._receivers}, {self._sender!r}, {self._cc}, host={self._host!r}, port={self._port})"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def check(self) -> None:
        """
        Connects and logs in within the timeout, without sending anything.

        :raises NotificationError: if that fails
        """
        try:
            _call_within(self._timeout_seconds, self._send_once)
            return
        except Exception as error:
            reason = self._clean(_explain(error))
        # Out of the handler, so that this error does not lead to the frames of smtplib, which know the password.
        raise NotificationError(f"{self._server} would send no e-mail: {reason}.")

    def notify(
        self,
        message: str,
        subject: str = "Training",
        picture: str | os.PathLike | bytes | None = None,
        html: str | None = None,
    ) -> None:
        """
        Has a mail sent, and returns at once. Never raises: what goes wrong is said.

        :param message: the text; of more than 100,000 characters, only the beginning and the end are sent
        :param picture: a PNG file, or its bytes, shown below the text
        :param html: to be shown in place of the text where possible
        """
        if (
            os.getpid() != self._process_id
        ):  # where there is no thread, and perhaps nobody who gives the lock back
            self._say_unsent(subject, "notify in the process that made the notifier")
            return
        mail = _Mail(message, subject, html, self._read_picture(picture), localtime())
        with self._changed:
            is_closed, is_full = self._is_closed, len(self._waiting) == NUM_WAITING
            if not is_closed:
                self._waiting.append(mail)
                self._changed.notify_all()
        if is_closed:
            self._say_unsent(subject, "notify before the notifier is closed")
        elif is_full and not self._has_said_full:
            self._has_said_full = True
            self._say(
                f"{NUM_WAITING} e-mails wait for {self._server}: the oldest are left out, so notify less often."
            )

    def close(self, wait_seconds: float = 15.0) -> None:
        """Waits until all is sent, but no longer than that, and says how much was not. Again: nothing."""
        if os.getpid() != self._process_id or self._is_closed:
            return
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._waiting and not self._is_sending, wait_seconds)
            num_unsent = len(self._waiting) + self._is_sending
            self._waiting.clear()
            self._given_up.set()
        if num_unsent:
            self._say(
                f"{num_unsent} e-mail(s) could not be sent in {wait_seconds:g} s: does {self._server} answer?"
            )

    def _run(self) -> None:
        while True:
            with self._changed:
                self._is_sending = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._waiting or self._is_closed)
                if not self._waiting:
                    return
                mail = self._waiting.popleft()
                self._is_sending = True
            try:
                refused = self._send(self._build(mail))
            except Exception as error:
                if not self._given_up.is_set():  # else close has said it
                    self._say_unsent(mail.subject, f"{self._server}: {_explain(error)}")
            else:
                for reply in _list_replies(refused):
                    self._say(
                        f'e-mail "{self._one_line(mail.subject)}" was not sent to {reply}: check the address.'
                    )

    def _send(self, message: bytes) -> _Replies:
        """Sends it, with several tries, and returns the replies for those receivers who were refused."""
        for pause_seconds in (*self._retry_seconds, None):
            try:
                return _call_within(_TIMEOUTS_PER_TRY * self._timeout_seconds, self._send_once, message)
            except Exception as error:
                if pause_seconds is None or not _may_pass(error) or self._given_up.wait(pause_seconds):
                    raise
        raise AssertionError("the last try returns or raises")

    def _send_once(self, message: bytes | None = None) -> _Replies:
        context = self._ssl_context or ssl.create_default_context()
        # Without a name, smtplib would ask the network for that of this machine, however long it takes.
        options: dict[str, Any] = {"local_hostname": "[127.0.0.1]", "timeout": self._timeout_seconds}
        kind: type[smtplib.SMTP] = smtplib.SMTP
        if self._security == "tls":
            kind, options = smtplib.SMTP_SSL, options | {"context": context}
        with contextlib.closing(kind(self._host, int(self._port), **options)) as connection:
            if self._security == "starttls":
                connection.starttls(context=context)  # raises unless the server confirms it
            if self._user:
                connection.ehlo_or_helo_if_needed()
                if "PLAIN" in connection.esmtp_features.get("auth", "").split():
                    # Or else smtplib would try a wrong password once more with each method of the server.
                    connection.esmtp_features["auth"] = "PLAIN"
                connection.login(self._user, _password())
            receivers = list(dict.fromkeys(self._receivers + self._cc))
            refused = connection.sendmail(self._sender, receivers, message) if message else {}
            with contextlib.suppress(OSError):
                connection.putcmd("QUIT")  # without waiting for the reply: all is done
            return refused

    def _build(self, mail: _Mail) -> bytes:
        text = self._clean(mail.message)
        if (num_left_out := len(text) - MAX_CHARACTERS) > 0:
            half = MAX_CHARACTERS // 2
            text = f"{text[:half]}\n[... {num_left_out} characters are left out ...]\n{text[-half:]}"
        html = self._clean(mail.html or "")
        if not html or len(html) > MAX_CHARACTERS:
            html = f'<pre style="white-space: pre-wrap">{escape(text)}</pre>'
        message = EmailMessage(policy=email.policy.SMTP.clone(cte_type="7bit"))
        # EmailMessage decodes "=?...?=", and some versions of it then write a newline that was encoded there.
        message["Subject"] = self._one_line(mail.subject).replace("=?", "= ?")
        message["From"], message["To"] = self._sender, ", ".join(self._receivers)
        if self._cc:
            message["Cc"] = ", ".join(self._cc)
        message["Date"] = mail.time
        domain = self._sender.rpartition("@")[2]
        message["Message-ID"] = make_msgid(
            domain=domain
        )  # one for all tries, so that doubles can be recognized
        message["Auto-Submitted"] = "auto-generated"  # no out-of-office replies
        picture_id = make_msgid(domain=domain)
        if mail.picture:
            html += f'<p><img src="cid:{picture_id[1:-1]}" alt="picture"></p>'
        message.set_content(text)
        message.add_alternative(html, subtype="html")
        if mail.picture:
            html_part = list(message.iter_parts())[1]
            html_part.add_related(
                mail.picture, "image", "png", cid=picture_id, filename="p.png", disposition="inline"
            )
        return message.as_bytes()

    def _read_picture(self, picture: str | os.PathLike | bytes | None) -> bytes | None:
        try:
            content = picture if picture is None or isinstance(picture, bytes) else Path(picture).read_bytes()
            if content is not None and (content[:4] != b"\x89PNG" or len(content) > MAX_PICTURE_BYTES):
                raise ValueError(f"{len(content)} bytes are no PNG of at most {MAX_PICTURE_BYTES}")
            return content
        except Exception as error:
            self._say(f"the e-mail goes without its picture: {error}.")
            return None

    def _say_unsent(self, subject: str, reason: str) -> None:
        self._say(f'e-mail "{self._one_line(subject)}" was not sent: {reason}.')

    def _say(self, text: str) -> None:
        with contextlib.suppress(Exception):  # such as that of a closed terminal
            self._print(self._one_line(text, 1000))

    def _one_line(self, text: str, max_characters: int = 200) -> str:
        return re.sub(r"[\s\x01-\x1f\x7f]+", " ", self._clean(text))[:max_characters]

    def _clean(self, text: str) -> str:
        """The text without secrets, and without what no mail can hold."""
        try:
            text = str(self._redact(str(text)))
        except Exception as error:
            text = f"[left out, since redact fails with {type(error).__name__}]"
        if password := _password():
            login = f"\0{self._user}\0{password}"  # as it is sent, which a server may repeat in its reply
            for secret in (
                b64encode(login.encode()).decode(),
                b64encode(password.encode()).decode(),
                password,
            ):
                text = text.replace(secret, "***").replace(escape(secret), "***")
        return re.sub(r"[\0\ud800-\udfff]", "?", text)

    def _find_problems(self) -> list[str]:
        strange = [address for address in self._receivers + self._cc if not _ADDRESS.fullmatch(address)]
        port_is_fine = re.fullmatch("[0-9]{1,5}", self._port) and 0 < int(self._port) < 2**16
        seconds = (self._timeout_seconds, *self._retry_seconds)
        user, has_password = self._user, bool(_password())
        problems = {
            "there is no receiver: give an address": not self._receivers,
            f"{strange} should be addresses: write them like me@example.org": strange,
            f"the sender is {self._sender!r}: set SMTP_SENDER to an address": not _ADDRESS.fullmatch(
                self._sender
            ),
            f"the host is {self._host!r}: set SMTP_HOST to a name": not _HOST.fullmatch(self._host),
            f"the port is {self._port!r}: set SMTP_PORT to a number from 1 to 65535": not port_is_fine,
            f"the security is {self._security!r}: take one of {', '.join(_PORTS)}": self._security
            not in _PORTS,
            "SMTP_SECURITY is none, but SMTP_USER would log in: set starttls or tls": user
            and self._security == "none",
            "SMTP_USER is set, but SMTP_PASSWORD is not: set both or none": user and not has_password,
            "SMTP_PASSWORD is set, but SMTP_USER is not: set both or none": has_password and not user,
            "SMTP_USER, SMTP_PASSWORD: only ASCII characters can be sent": not (user + _password()).isascii(),
            f"the seconds are {seconds}: take numbers above 0": not all(
                0 < number < 1e6 for number in seconds
            ),
        }
        return [problem for problem, is_there in problems.items() if is_there]


def _call_within(seconds: float, function: Callable[..., Any], *arguments: Any) -> Any:
    """
    Calls it in a thread, which is left alone after some seconds.

    Nothing else ends the wait for a name service, or for a server that sends a byte at a time, with each of which the
    timeout of smtplib begins anew.
    """
    outcome: Future[Any] = Future()

    def call() -> None:
        try:
            outcome.set_result(function(*arguments))
        except Exception as error:
            outcome.set_exception(error)

    threading.Thread(target=call, name="e-mail connection", daemon=True).start()
    if not wait([outcome], seconds).done:
        # None of the errors that are followed by another try: this one may succeed yet.
        raise NotificationError(f"it has not answered in full after {seconds:g} s")
    return outcome.result()


def _setting(value: Any, name: str) -> str:
    return str(os.environ.get(name, "") if value is None else value).strip()


def _password() -> str:
    """Read when needed and never kept, so that nothing can show it."""
    return os.environ.get("SMTP_PASSWORD", "")


def _addresses(given: str | Iterable[str]) -> list[str]:
    return [str(address).strip() for address in (given.split(",") if isinstance(given, str) else given)]


def _may_pass(error: Exception) -> bool:
    """Whether another try makes sense."""
    if isinstance(error, smtplib.SMTPRecipientsRefused):
        return any(code < 500 for code, _ in error.recipients.values())
    if isinstance(error, smtplib.SMTPResponseException):
        return error.smtp_code < 500
    if isinstance(error, smtplib.SMTPException):
        return isinstance(error, smtplib.SMTPServerDisconnected)
    return isinstance(error, OSError) and not isinstance(error, ssl.SSLCertVerificationError)


def _explain(error: Exception) -> str:
    """The reason and the next step."""
    reason = str(error) or type(error).__name__
    if isinstance(error, smtplib.SMTPRecipientsRefused):
        reason = ", ".join(_list_replies(error.recipients))
    elif isinstance(error, smtplib.SMTPResponseException):
        reason = _show_reply(error.smtp_code, error.smtp_error)
    return f"{reason}; {next(hint for kind, hint in _HINTS.items() if isinstance(error, kind))}"


def _list_replies(refused: _Replies) -> list[str]:
    return [f"{address} ({_show_reply(*reply)})" for address, reply in refused.items()]


def _show_reply(code: int, text: bytes | str) -> str:
    return f"{code} {text.decode(errors='replace') if isinstance(text, bytes) else text}"
