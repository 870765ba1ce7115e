"""The version of celbo."""

__version__ = "0.1.0"
