"""The one exception that is the user's to mend."""


class UserError(ValueError):
    """A mistake the user can mend; the command line prints it as one line and exits with code 2.

    The message says what is wrong, where, what was expected, what was found, and what to do.
    """
