"""
E-mail about trainings, which never delays, fails or outlives one. The server comes from the environment:

    SMTP_HOST      the mail server, such as smtp.gmail.com
    SMTP_PORT      default: 587, with tls 465, with none 25
    SMTP_SECURITY  starttls (default), tls (encrypted from the first byte), none (a relay on this machine)
    SMTP_USER      the name to log in with; without one there is no login
    SMTP_PASSWORD  its password: from here alone, so that it gets into no config, record or log
    SMTP_SENDER    the address in From, if it is not SMTP_USER

Gmail accepts no ordinary password: switch on 2-step verification, make an app password (16 characters) at
https://myaccount.google.com/apppasswords, then

    export SMTP_HOST=smtp.gmail.com SMTP_USER=me@gmail.com
    read -rs SMTP_PASSWORD && export SMTP_PASSWORD  # typed unseen, and in no shell's history
"""

import contextlib
import email.policy
import io
import logging
import os
import queue
import re
import smtplib
import ssl
import threading
import traceback
from base64 import b64encode
from collections.abc import Iterable, Iterator
from email.message import EmailMessage
from email.utils import localtime, make_msgid
from typing import Any

from dida_core.errors import Problems, printable
from dida_core.report.listener import Listener, Result, RunView
from dida_core.training.setup import Setup

MAX_WAITING = 20
MAX_CHARACTERS = 100_000
RETRY_SECONDS = 2.0
_PORTS = {"starttls": "587", "tls": "465", "none": "25"}
_LASTING = (smtplib.SMTPAuthenticationError, smtplib.SMTPNotSupportedError, ssl.SSLCertVerificationError)
_log = logging.getLogger(__name__)


class NotificationError(Problems):
    """E-mail cannot be sent as it is set up."""

    about = "e-mail"


class SMTPNotifier:
    """
    Sends e-mail from a thread of its own. Call close, so that the last one gets sent.

    :param receivers: an address, several separated by commas, or a list of them; cc likewise
    :param sender: None: SMTP_SENDER, or SMTP_USER
    :param timeout_seconds: for each answer of the server
    :param ssl_context: for a certificate authority of your own; by default those of the system are trusted
    :raises NotificationError: with all problems of what was given, or of the environment
    """

    def __init__(
        self,
        receivers: str | Iterable[str],
        sender: str | None = None,
        cc: str | Iterable[str] = (),
        timeout_seconds: float = 10.0,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        self._receivers, self._cc = _addresses(receivers), _addresses(cc)
        self._host, self._user = os.environ.get("SMTP_HOST", ""), os.environ.get("SMTP_USER", "")
        self._security = os.environ.get("SMTP_SECURITY") or "starttls"
        self._port = os.environ.get("SMTP_PORT") or _PORTS.get(self._security, "")
        self._sender = sender or os.environ.get("SMTP_SENDER") or self._user
        self._timeout_seconds, self._ssl_context = timeout_seconds, ssl_context
        if problems := list(self._find_problems()):
            raise NotificationError(problems)
        self._queue: queue.Queue[EmailMessage | None] = queue.Queue()
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._send_all, name="e-mail", daemon=True)
        self._thread.start()

    def notify(self, message: str, subject: str = "Training", picture: bytes | None = None) -> None:
        """
        Have a mail sent, and return at once. Never raises: what goes wrong is logged.

        :param picture: a PNG to attach
        """
        try:
            if not self._thread.is_alive():  # nor is it in a forked process
                raise RuntimeError("the notifier is closed")
            if self._queue.qsize() >= MAX_WAITING:
                raise RuntimeError(f"{MAX_WAITING} others wait for {self._host}")
            self._queue.put(self._build(message, subject, picture))
        except Exception as error:
            self._complain(subject, error)

    def close(self, wait_seconds: float = 15.0) -> None:
        """Wait until all is sent, but no longer than that."""
        self._queue.put(None)
        self._thread.join(wait_seconds)
        self._is_over.set()
        if self._thread.is_alive():
            self._complain("all", f"{self._host}:{self._port} does not answer within {wait_seconds:g} s")

    def _build(self, message: str, subject: str, picture: bytes | None) -> EmailMessage:
        mail = EmailMessage(policy=email.policy.SMTP.clone(cte_type="7bit"))
        # EmailMessage decodes "=?...?=", which could hold a newline.
        mail["Subject"] = _one_line(self._clean(subject))[:200].replace("=?", "= ?")
        mail["From"], mail["To"] = self._sender, ", ".join(self._receivers)
        if self._cc:
            mail["Cc"] = ", ".join(self._cc)
        mail["Date"] = localtime()
        mail["Message-ID"] = make_msgid(domain=self._sender.rpartition("@")[2])  # the same for both tries
        mail["Auto-Submitted"] = "auto-generated"  # no out-of-office replies
        text = printable("\n".join(self._clean(message).splitlines()))
        mail.set_content(text[:MAX_CHARACTERS])
        if picture:
            mail.add_attachment(picture, "image", "png", filename="picture.png")
        return mail

    def _send_all(self) -> None:
        while (mail := self._queue.get()) is not None and not self._is_over.is_set():
            try:
                try:
                    self._send(mail)
                except OSError as error:  # as those of smtplib are
                    lasting = isinstance(error, _LASTING) or getattr(error, "smtp_code", 0) >= 500
                    if lasting or self._is_over.wait(RETRY_SECONDS):
                        raise
                    self._send(mail)
            except Exception as error:
                if not self._is_over.is_set():  # else close has reported it
                    self._complain(mail["Subject"], error)

    def _send(self, mail: EmailMessage) -> None:
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
                connection.login(self._user, _password())
            receivers = list(dict.fromkeys(self._receivers + self._cc))
            if refused := connection.sendmail(self._sender, receivers, mail.as_bytes()):
                self._complain(mail["Subject"], f"refused: {refused}")
            with contextlib.suppress(OSError):
                connection.putcmd("QUIT")  # without waiting for the reply: all is done

    def _complain(self, subject: str, reason: object) -> None:
        subject, text = (_one_line(self._clean(part)) for part in (subject, reason))
        _log.warning('Cannot send e-mail "%s": %s', subject, text)

    def _clean(self, text: object) -> str:
        """Return a text without the password, and without what no mail can hold."""
        cleaned, password = str(text), _password()
        if password:
            login = f"\0{self._user}\0{password}"  # as it is sent, which a server may repeat in its reply
            for secret in (login, password):
                cleaned = cleaned.replace(b64encode(secret.encode()).decode(), "***").replace(secret, "***")
        return re.sub(r"[\0\ud800-\udfff]", "?", cleaned)

    def _find_problems(self) -> Iterator[str]:
        if not self._receivers:
            yield "there is no receiver: give an address."
        for address in (*self._receivers, *self._cc, self._sender):
            if "@" not in address or address != _one_line(address).replace(" ", ""):
                yield f"{address!r} is no address: write it like me@example.org; the sender is SMTP_SENDER."
        if not self._host:
            yield "SMTP_HOST is not set: set it to the mail server."
        if self._security not in _PORTS:
            yield f"SMTP_SECURITY is {self._security!r}: set it to one of {', '.join(_PORTS)}."
        elif not self._port.isdecimal():
            yield f"SMTP_PORT is {self._port!r}: set it to a number."
        if self._user and (self._security == "none" or not _password()):
            yield "SMTP_USER is set: set SMTP_PASSWORD too, and SMTP_SECURITY to starttls or tls."


def _password() -> str:
    """Return the password. It is read when needed and never kept, so that nothing can show it."""
    return os.environ.get("SMTP_PASSWORD", "")


def _addresses(given: str | Iterable[str]) -> list[str]:
    return [str(address).strip() for address in (given.split(",") if isinstance(given, str) else given)]


def _one_line(text: str) -> str:
    return re.sub(r"[\s\x01-\x1f\x7f]+", " ", text)


class Mail(Listener):
    """Mails the start and the end of a run to NOTIFY. Where that is None, it does nothing."""

    def __init__(self) -> None:
        self._notifier: SMTPNotifier | None = None

    def check(self, setup: Setup) -> None:
        """Raise UserError if the environment does not say by which server to send."""
        if setup.config["NOTIFY"] is not None:
            self._notifier = SMTPNotifier(setup.config["NOTIFY"])

    def started(self, run: RunView) -> None:
        """Mail that a run starts or resumes."""
        since = f" after epoch {run.state.epoch}, step {run.state.step}" if run.state.step else ""
        what = f"{run.name} trains for {run.config['EPOCHS']} epochs on {run.setup.context.device}"
        self._notify(run, "started", [f"{what}{since}.", f"Log: {run.log_dir}"])

    def finished(self, run: RunView, result: Result) -> None:
        """Mail the results and the picture."""
        state = result.state
        what = f"{run.name}: {state.epoch} epochs in {state.seconds / 60:.0f} min, best {state.best_epoch}"
        results = [f"{name} {value:.4f}" for name, value in result.metrics.items() if name.count(".") == 1]
        picture = result.picture.read_bytes() if result.picture else None
        places = [f"Weights: {result.weights['best']}", f"Log: {result.log_dir}"]
        self._notify(run, "finished", [what, *results, *places], picture)

    def ended(self, run: RunView, status: str, error: BaseException) -> None:
        """Mail that a run ends without a result, with the reason and the learning curves."""
        what = f"{run.name}: {status} after epoch {run.state.epoch}, step {run.state.step}: {error}"
        lines = [what, f"To resume: python train.py --resume {run.name}"]
        if status == "failed":  # redacted before it is cut, so that no half of a secret is left
            lines.append(run.redact("".join(traceback.format_exception(error)))[-3000:])
        picture = io.BytesIO()
        if run.history and self._notifier:
            from dida_core.report.pictures import save_picture

            history = [run.history[epoch] for epoch in sorted(run.history)]
            with contextlib.suppress(Exception):  # the mail matters more
                save_picture(picture, run.name, history, run.monitored, None, [])
        self._notify(run, status, lines, picture.getvalue())

    def _notify(self, run: RunView, status: str, lines: list[str], picture: bytes | None = None) -> None:
        if self._notifier is not None:
            subject, text = f"{status}: {run.name}", "\n".join(lines)
            self._notifier.notify(run.redact(text), run.redact(subject), picture)
            if status != "started":
                self._notifier.close()
