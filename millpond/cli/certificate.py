"""The certificate that HTTPS is served with, and its exchange while connections are open.

A listener keeps the context it was made with. Loading other files into that one would leave it with half a pair when
they do not fit; so it only passes every handshake on to the context that is current, which is replaced as a whole.
"""

from __future__ import annotations

import ssl
from pathlib import Path


class BadCertificate(Exception):  # noqa: N818 - it names what is wrong
    """Files that cannot be used; the message is for the user."""


class Certificate:
    """A certificate chain and its key, read from PEM files."""

    def __init__(self, chain: Path, key: Path) -> None:
        """Raises BadCertificate."""
        self._chain = chain
        self._key = key
        self._current = self.read()
        self.context = self.read()
        """For the listener."""
        self.context.sni_callback = self._hand_over

    def read(self) -> ssl.SSLContext:
        """What the files say now, for ``use``. Raises BadCertificate."""
        for setting, path in (("tls_certificate", self._chain), ("tls_key", self._key)):
            try:
                path.open("rb").close()
            except OSError as error:
                raise BadCertificate(f"{setting}: {path} cannot be read: {error.strerror}") from error
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            context.load_cert_chain(self._chain, self._key, self._no_password)
        except ssl.SSLError as error:
            pair = f"tls_certificate, tls_key: {self._chain} and {self._key}"
            if error.reason == "KEY_VALUES_MISMATCH":
                raise BadCertificate(f"{pair}: the key is not that of the certificate") from error
            raise BadCertificate(f"{pair}: must be PEM files of a certificate chain and of its key") from error
        return context

    def use(self, context: ssl.SSLContext) -> None:
        """For all handshakes from now on."""
        self._current = context

    def _hand_over(self, connection: ssl.SSLObject, _name: str | None, _context: ssl.SSLContext) -> None:
        connection.context = self._current

    def _no_password(self) -> str:
        raise BadCertificate(f"tls_key: {self._key} has a password, and nobody is there to type it; take it off")
