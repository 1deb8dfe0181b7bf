"""Errors of the algorithm library. They carry facts as attributes and know nothing of HTTP or job queues."""


class DuQuantError(Exception):
    """Something went wrong in duquant."""

    def __init__(self, message: str | None = None, **facts: object) -> None:
        super().__init__(message or (type(self).__doc__ or "").strip())
        self.facts = facts


class ConfigError(DuQuantError, ValueError):
    """A recipe field has a value that is not allowed."""


class ShapeError(DuQuantError, ValueError):
    """A tensor has the wrong shape."""


class UnsupportedModelError(DuQuantError):
    """This model architecture is not supported."""


class SourceError(DuQuantError):
    """The source checkpoint is missing, truncated, in an unsafe format, or holds non-finite values."""


class CalibrationError(DuQuantError):
    """Calibration met data it cannot use: too little text, or non-finite values."""


class ScratchError(CalibrationError):
    """A scratch file of this run is missing or broken; the next try makes it again."""


class ArtifactError(DuQuantError):
    """The artifact does not match its manifest."""


class EvaluationError(DuQuantError):
    """An evaluation task or its data cannot be used."""


class KernelError(DuQuantError):
    """A kernel's result is not the reference's."""


class KernelUnavailableError(DuQuantError):
    """No kernel backend can run this operation here."""
