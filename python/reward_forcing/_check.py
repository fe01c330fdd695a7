"""Argument errors in the words of rf_kernels: who, which argument, what was expected, what came."""

import importlib

from rf_kernels import ArgumentError


def expect(condition: bool, who: str, argument: str, expected: str, found: object) -> None:
    """Raise ``ArgumentError`` unless ``condition``."""
    if not condition:
        raise ArgumentError(f"{who}: argument `{argument}`: expected {expected}, found {found}")


def installed(name: str, who: str, extra: str):
    """A package of one of the extras."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ArgumentError(f"{who}: needs {name} (pip install 'rf-kernels[{extra}]'): {error}") from error
