"""The one exception that stands for a user's mistake."""


class UserError(ValueError):
    """Something the user gave (option, file, row, image, checkpoint) cannot be used.

    The message is one clear line that names the file, row or field and says what to do. The command line prints it
    without a traceback and exits with status 2.
    """
