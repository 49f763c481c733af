"""The three ways a run ends other than well; `jaxconv.launch` maps each to its exit status.

Every message is one line that names the thing, the value it has and what it may be.
"""


class Refused(Exception):
    """The input cannot be used (a config field, a checkpoint, a template). Exit status 2."""


class Failed(Exception):
    """The run could not go on for a reason outside its input (a full disk, say). Exit status 1."""


class Stopped(Exception):
    """The run was asked to stop, saved its state and can be resumed. Exit status 4."""
