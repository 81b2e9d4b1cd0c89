"""Types of arguments that several commands have."""

import argparse


def add_device_argument(parser: argparse.ArgumentParser) -> None:
    """`--device`, for `evaluation.load_model`."""
    parser.add_argument(
        "--device",
        metavar="NAME",
        help="such as cpu or cuda:1 (default: the machine's accelerator, or the CPU where it has none)",
    )


def domain_text(value: str) -> tuple[str, str]:
    """`DOMAIN=FILE` as a pair."""
    domain, _, file = value.partition("=")
    if not domain or not file:
        raise argparse.ArgumentTypeError(f"{value!r} is not DOMAIN=FILE")
    return domain, file


def domain_files(pairs: list[tuple[str, str]]) -> dict[str, list[str]]:
    """Domain -> its files."""
    return {domain: [file for name, file in pairs if name == domain] for domain, _ in pairs}
