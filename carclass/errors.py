"""The one family of errors that a user can cause and mend."""


class UserError(ValueError):
    """A mistake in what the user gave: the message says what is wrong, where, and what to do.

    Jobs print it as one paragraph and exit with status 2; anything else keeps its traceback.
    """
