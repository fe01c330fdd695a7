"""Argument errors in the words of rf_kernels: who, which argument, what was expected, what came."""

from rf_kernels import ArgumentError


def expect(condition: bool, who: str, argument: str, expected: str, found: object) -> None:
    """Raise ``ArgumentError`` unless ``condition``."""
    if not condition:
        raise ArgumentError(f"{who}: argument `{argument}`: expected {expected}, found {found}")
