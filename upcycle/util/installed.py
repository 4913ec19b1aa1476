"""Versions of other packages."""

from importlib import metadata


def installed_version(package: str) -> str | None:
    """The version of a package in this environment, which is not imported; None if it has none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
