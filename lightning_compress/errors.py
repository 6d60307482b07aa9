"""The errors of this package that are neither a plain `ValueError` nor a plain `TypeError`."""


class CompressionError(RuntimeError):
    """A model or a run that cannot be compressed as asked."""


class ExportError(CompressionError):
    """An exported file that could not be written or is not a valid ONNX model."""


class ParityError(ExportError):
    """An exported file that does not compute what the trained model computes.

    The file and the trained weights have been kept when this is raised.
    """


class MissingExtraError(ImportError):
    """An optional dependency that is not installed; the message holds the line that installs it."""


class ArchiveError(CompressionError):
    """An archive of weights that is damaged, that is none, or that is of a newer version."""
