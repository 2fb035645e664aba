"""What follows the colon of a source string: a path, then `,name=value` for each option."""

import re
from collections.abc import Sequence
from pathlib import Path


def split_options(rest: str, names: Sequence[str]) -> tuple[str, dict[str, str]]:
    """Split `PATH,name=value,...`.

    Args:
      rest: What follows the first colon. Only the named options are cut off, from the end: a path
        may hold commas.
      names: The options that the source has.

    Returns:
      `(path, options)`.

    Raises:
      ValueError: If an option comes twice.
    """
    options: dict[str, str] = {}
    option = re.compile(rf"(.*),({'|'.join(names)})=([^,]*)", re.DOTALL)
    while match := option.fullmatch(rest):
        rest, name, value = match.groups()
        if name in options:
            raise ValueError(f"source: option {name} is given twice")
        options[name] = value
    return rest, options


def existing_path(rest: str, data_dir: str | None, usage: str) -> Path:
    """Return the path that a source string names.

    Args:
      rest: The path; a relative one starts from `data_dir`.
      data_dir: Folder, or None for the working directory.
      usage: How the source string is written, for the messages.

    Returns:
      A path of something that exists.

    Raises:
      ValueError: If there is no path.
      FileNotFoundError: If nothing is there.
    """
    if not rest:
        raise ValueError(f"source: the path is missing, expected {usage}")
    path = Path(data_dir or "", rest)
    if not path.exists():
        raise FileNotFoundError(f"source: there is no {path}; expected {usage}")
    return path
