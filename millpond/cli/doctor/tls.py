"""The TLS certificate and its key: readable, a pair, and such that a client would accept them.

A handshake between two ends in this process tells what no single call of the standard library does: whether the
certificate has expired, and when it will.
"""

from __future__ import annotations

import ssl
import time
from collections.abc import Iterator
from pathlib import Path

from millpond.cli.doctor.finding import Finding, fail, ok, warn
from millpond.config import ServeConfig

EXPIRES_SOON_SECONDS = 14 * 86400
CERT_HAS_EXPIRED = 10  # x509_vfy.h


class _Passphrase(Exception):  # noqa: N818 - what was asked for
    pass


def findings(config: ServeConfig) -> Iterator[Finding]:
    """Nothing without a certificate."""
    certificate, key = config.tls_certificate, config.tls_key
    if certificate is None or key is None:
        return
    unreadable = [
        finding for finding in (_readable("tls_certificate", certificate), _readable("tls_key", key)) if finding
    ]
    yield from unreadable or [_pair(certificate, key)]


def _readable(setting: str, path: Path) -> Finding | None:
    try:
        path.read_bytes()
    except OSError as error:
        return fail(
            "TLS", f"{setting}: {path} cannot be read: {error.strerror}", "give a PEM file that this account may read"
        )
    return None


def _pair(certificate: Path, key: Path) -> Finding:
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        server.load_cert_chain(certificate, key, _refused)
    except _Passphrase:
        remedy = f"take it off: openssl pkey -in {key} -out NEW_KEY, and chmod 600 NEW_KEY"
        return fail("TLS", f"{key} has a passphrase, which nobody can type into a server", remedy)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            remedy = "give the key that the certificate was made with"
            return fail("TLS", f"{key} is not the key of {certificate}", remedy)
        remedy = "both must be PEM files: the certificate with its chain, and its private key"
        return fail("TLS", f"{certificate} and {key} cannot be used: {error.reason or 'no PEM files'}", remedy)
    return _accepted(server, certificate)


def _refused() -> str:
    raise _Passphrase


def _accepted(server: ssl.SSLContext, certificate: Path) -> Finding:
    renew = "have it renewed; millpond reads the files again on SIGHUP"
    try:
        expires = _expires(server, certificate)
    except ssl.SSLCertVerificationError as error:
        state = fail if error.verify_code == CERT_HAS_EXPIRED else warn
        return state("TLS", f"{certificate}: clients will refuse it: {error.verify_message}", renew)
    except ssl.SSLError as error:
        return warn("TLS", f"{certificate}: a handshake fails: {error.reason or error}", "have another one made")
    day = time.strftime("%Y-%m-%d", time.gmtime(expires))
    if expires - time.time() < EXPIRES_SOON_SECONDS:
        return warn("TLS", f"{certificate} expires on {day}", renew)
    return ok("TLS", f"{certificate} and its key, until {day}")


def _expires(server: ssl.SSLContext, certificate: Path) -> float:
    """When the certificate expires, in seconds of the epoch. Raises ssl.SSLError."""
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # whoever signed it: that is for the client to trust
    client.load_verify_locations(certificate)
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [client.wrap_bio(to_client, to_server), server.wrap_bio(to_server, to_client, server_side=True)]
    waiting = list(ends)
    while waiting:
        for end in tuple(waiting):
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
            waiting.remove(end)
    found = ends[0].getpeercert() or {}
    return ssl.cert_time_to_seconds(str(found["notAfter"]))
