"""Breaks of row E9: whose prefixes are whose."""

from __future__ import annotations

from mutants import Break

BREAKS = [
    Break(
        name="E9-explain-unsalted",
        file="millpond/engine/prefixes.py",
        old="self._cache.query(tokens, salt)",
        new='self._cache.query(tokens, "")',
        by=("test_every_end_is_explained",),
    ),
    Break(
        name="E9-owners-alike",
        file="millpond/http/tenants.py",
        old='tenant.ljust(WIDTH, "\\0") + given',
        new='"owner".ljust(WIDTH, "\\0") + given',
        by=("test_no_two_owners_or_salts_have_one_salt",),
    ),
    Break(
        name="E9-salts-run-together",
        file="millpond/http/tenants.py",
        old='tenant.ljust(WIDTH, "\\0") + given',
        new="tenant + given",
        by=("test_no_client_can_give_an_owners_salt",),
    ),
    Break(
        name="E9-given-salt-wins",
        file="millpond/http/tenants.py",
        old=" if tenant else given",
        new=" if tenant and not given else given",
        by=("test_no_two_owners_or_salts_have_one_salt",),
    ),
    Break(
        name="E9-past-answers-for-all",
        file="millpond/speculate/lookup.py",
        old="self._past.of(request.cache_salt)",
        new='self._past.of(next(iter(self._past._indices), ""))',
        by=("test_past_answers_of_others_are_not_guessed_from",),
    ),
    Break(
        name="E9-first-key-decides",
        file="millpond/http/keys.py",
        old="return self._owners > 1",
        new="return len(self._given) > 1",
        by=("test_whose_prefixes_are_whose",),
    ),
]
