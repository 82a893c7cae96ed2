"""What users see when something is wrong: what was given, what is needed, what to do."""


class VoroqError(ValueError):
    """Bad input. The message is one line a user can act on; the command line prints it and exits with 2."""


class FormatError(VoroqError):
    """A checkpoint that is truncated, inconsistent or hostile. Names the file or tensor and the problem."""
