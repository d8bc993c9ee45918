"""subjax: studies of subliminal learning, from teacher to report."""

__version__ = "0.1.0"
