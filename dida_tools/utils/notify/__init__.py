"""E-mail about trainings."""

from .smtp import NotificationError, SMTPNotifier

__all__ = ["NotificationError", "SMTPNotifier"]
