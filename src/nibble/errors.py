"""Everything nibble raises on purpose.

One tree, so that a program can catch `NibbleError` and a person reads one line. A message says
three things: what was given, what is allowed, what to do. The command line prints it and exits with
`exit_code`; no traceback is shown unless `--debug` is given. A bug is never wrapped in these: it
keeps its traceback.

    NibbleError
    |- ConfigError       a recipe or a command line that cannot be meant (exit 2)
    |- PlanError         the run cannot fit the budget it names
    |- WeightError       a checkpoint that is missing, damaged, of an unknown family or shape
    |- DataError         a data set that is missing, malformed or would train nothing
    |- PlacementError    a device, memory or process that is not there or gave up
    |    `- PeerError     another process of the run ended it: what this one says is not the cause
    |- CheckpointError   a run folder that cannot be written, read or resumed
    |- ExportError       an export that is further from the trained model than its bound
    `- TrainingError     the run itself went wrong: a loss that is not finite
"""


class NibbleError(Exception):
    """Base of all errors that nibble raises on purpose."""

    exit_code = 1


class ConfigError(NibbleError):
    """A recipe, option or command line is malformed, contradictory or would have no effect."""

    exit_code = 2


class PlanError(NibbleError):
    """The plan does not fit the budget, or a model's shape cannot be planned."""


class WeightError(NibbleError):
    """A checkpoint is missing, truncated, of an unknown family, or does not fit the model."""


class DataError(NibbleError):
    """A data set is missing, malformed, empty, or leaves nothing to train on."""


class PlacementError(NibbleError):
    """A device is absent, out of memory, or a process of the run has died."""


class PeerError(PlacementError):
    """Another process of the run has failed, vanished or did not come in time."""


class CheckpointError(NibbleError):
    """A run folder or checkpoint cannot be written, read, or does not match the recipe."""


class ExportError(NibbleError):
    """The exported model differs from the trained one by more than the bound."""


class TrainingError(NibbleError):
    """Training cannot go on: the loss or a gradient is not finite."""


class NibbleWarning(UserWarning):
    """What a person should know although the run goes on."""
