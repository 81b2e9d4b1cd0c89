"""Types of arguments that several commands have."""

import argparse


def domain_text(value: str) -> tuple[str, str]:
    """`DOMAIN=FILE` as a pair."""
    domain, _, file = value.partition("=")
    if not domain or not file:
        raise argparse.ArgumentTypeError(f"{value!r} is not DOMAIN=FILE")
    return domain, file


def domain_files(pairs: list[tuple[str, str]]) -> dict[str, list[str]]:
    """Domain -> its files."""
    return {domain: [file for name, file in pairs if name == domain] for domain, _ in pairs}
