"""Contains the base of all errors that a user can mend: scripts print their message without a traceback."""


class UserError(ValueError):
    """Something that the user gave cannot be used. The message names it, what is allowed, and what to do."""
