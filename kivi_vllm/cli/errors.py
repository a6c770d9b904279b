"""Mistakes of use: shown in one line with their remedy, never as a traceback."""


class UserError(Exception):
    """Something that the user can mend.

    Args:
        message: what is wrong, with the value and the limit.
        remedy: what to do about it.
        status: exit status of the command line; 2 where the command line itself is at fault.
    """

    def __init__(self, message: str, remedy: str = "", status: int = 2) -> None:
        super().__init__(message)
        self.remedy = remedy
        self.status = status
