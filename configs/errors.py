"""The ways a softrl command can end badly, each with its exit code. A message is one line."""


class InputError(Exception):
    """The user's input cannot be used: a config, a data file, a model. Exit code 2; nothing was started or written."""


class RunError(Exception):
    """A run failed while running: a wait passed its deadline, a process died, a number is not finite. Exit code 1."""


class Interrupted(RunError):
    """The user pressed Ctrl-C: nothing that was to follow is started."""
