"""What the settings of ``millpond serve`` name: models, keys, certificates, looked for before anything is started."""

from __future__ import annotations

from typing import TYPE_CHECKING

from millpond.cli.certificate import BadCertificate, Certificate
from millpond.config import ServeConfig
from millpond.http.keys import BadKeys, Keys

if TYPE_CHECKING:
    from millpond.hub.source import ResolvedModel


class StartError(Exception):
    """The server cannot start; the message is for the user."""


def find_model(name: str) -> ResolvedModel:
    """The model on this machine, fetched if need be. Raises StartError."""
    from millpond.hub.errors import SourceError
    from millpond.hub.progress import TerminalProgress
    from millpond.hub.source import resolve

    try:
        return resolve(name, TerminalProgress())
    except SourceError as error:
        raise StartError(str(error)) from error


def find_draft(config: ServeConfig) -> str:
    """The folder of the draft model; empty where none is given. Raises StartError."""
    if not config.draft_model:
        return ""
    try:
        return str(find_model(config.draft_model).path)
    except StartError as error:
        raise StartError(f"--draft-model {config.draft_model}: {error}") from error


def read_keys(config: ServeConfig) -> Keys:
    """The API keys. Raises StartError."""
    try:
        return Keys(config.api_key, config.api_key_file)
    except BadKeys as error:
        raise StartError(str(error)) from error


def read_certificate(config: ServeConfig) -> Certificate | None:
    """What HTTPS is served with, if it is. Raises StartError."""
    if config.tls_certificate is None or config.tls_key is None:
        return None
    try:
        return Certificate(config.tls_certificate, config.tls_key)
    except BadCertificate as error:
        raise StartError(str(error)) from error
