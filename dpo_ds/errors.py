"""Whose fault it is: what a user can put right, a run that cannot go on, and (anything else) a bug of ours."""


class UserError(ValueError):
    """What the user can get wrong, with the remedy: one line, no traceback, exit code 2. Raised where it is seen."""


class RunStopped(RuntimeError):
    """A run that cannot go on, for a reason that a traceback would not show: one line, exit code 1."""
