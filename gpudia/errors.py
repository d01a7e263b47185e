"""Exceptions and warnings, and when to raise which.

===================  =========================================================================================
Raise                when
===================  =========================================================================================
`InputError`         an argument breaks a rule: wrong shape, dtype, range, mixed backends. A programming error;
                     it is never caught inside the library.
`ConfigError`        a setting (TOML, command line, `RunConfig`) breaks a rule. Names the key and the value.
`FrameError`         one file or frame cannot be used (unreadable, no image, all masked, ...). The job turns it
                     into a row with ``status = failed`` and this reason, and goes on.
`RegistrationError`  one frame could not be aligned (a `FrameError`).
`OutputError`        the output cannot be written (disk full, permission lost). Ends the run, which can be resumed.
`BackendError`       the backend that was asked for cannot run. Says why, and what to do.
===================  =========================================================================================

Messages have the form ``<name> must be <rule>, got <value>`` where that fits, and name the file where there is one.
A numerical failure of one image of a stack is no exception at all: it is a status (see `gpudia.flags.FRAME_FLAGS`).
"""

from gpudia.messages import printable

__all__ = [
    "BackendError",
    "BackendWarning",
    "ConfigError",
    "DataWarning",
    "FrameError",
    "GpudiaError",
    "GpudiaWarning",
    "InputError",
    "OutputError",
    "RegistrationError",
]


class GpudiaError(Exception):
    """Base of every exception that this library raises on purpose."""


class InputError(GpudiaError, ValueError):
    """An argument breaks a rule; the message names argument, rule and value."""


class ConfigError(GpudiaError, ValueError):
    """A setting breaks a rule; the message names the key, the rule and the value."""


class FrameError(GpudiaError):
    """One frame cannot be used.

    Parameters
    ----------
    reason : str
        What rule was broken and what was found, without the file name; made `printable`.
    path : str or path-like, optional
        The file; put before the reason in the message.
    """

    def __init__(self, reason: object, path: object = None) -> None:
        self.reason = printable(reason)
        self.path = None if path is None else str(path)
        super().__init__(self.reason if path is None else f"{printable(path)}: {self.reason}")

    def __reduce__(self) -> tuple[type, tuple[str, str | None]]:
        return type(self), (self.reason, self.path)


class RegistrationError(FrameError):
    """One frame cannot be aligned with the reference."""


class OutputError(GpudiaError, OSError):
    """The output cannot be written: disk full, permission lost. What is finished is kept; the run can be resumed."""


class BackendError(GpudiaError, RuntimeError):
    """The backend that was asked for cannot run here; the message says why and what to do."""


class GpudiaWarning(UserWarning):
    """Base of the warnings of this library."""


class DataWarning(GpudiaWarning):
    """The data are usable but something in them is doubtful (gain, WCS, saturation, ...)."""


class BackendWarning(GpudiaWarning):
    """The backend works with a restriction (less memory than asked for, for example)."""
