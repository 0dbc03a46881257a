"""Whose cached prefixes a request may find: the salt under which the engine knows it.

With several owners of keys each has prefixes of its own, and ``cache_salt`` separates further within them. The salt is
all that keeps prefixes, what is explained of them, and past answers apart, so this is the one place that makes one for
a client. ``millpond doctor`` makes some for an engine of its own, to find nothing in the cache.
"""

from __future__ import annotations

from starlette.requests import Request as HttpRequest

from millpond.http.context import context_of
from millpond.http.generation_request import LONGEST_SALT, GenerationRequest
from millpond.types import Salt

WIDTH = LONGEST_SALT + 1
"""Characters that an owner's part has: no salt that a client may give is as long, so none can be taken for it."""


def salt_of(http: HttpRequest, asked: GenerationRequest) -> Salt:
    """For the owner of the request's key, and the ``cache_salt`` that it gives."""
    return salted(context_of(http.scope).tenant, asked.cache_salt)


def salted(tenant: str, given: str) -> Salt:
    """Different for different tenants or given salts. Without a tenant it is what was given."""
    return Salt(tenant.ljust(WIDTH, "\0") + given if tenant else given)
