"""The version, in one place: packaging and the C++ build read it from here."""

__version__ = "0.1.0"
