"""Breaks of row F10: what other users of the machine can see or plant."""

from __future__ import annotations

from mutants import Break

BREAKS = [
    Break(
        name="F10-wide-folders-stay",
        file="millpond/prefix/disk/pool.py",
        old="            self.files.narrow(self.folder)\n",
        new="            pass\n",
        by=("test_a_wide_folder_of_ours_is_narrowed",),
    ),
    Break(
        name="F10-narrows-what-others-use",
        file="millpond/prefix/disk/pool.py",
        old="if all(map(_OURS.fullmatch, self.files.names(self.folder))):",
        new="if self.files.names(self.folder) is not None:",
        by=("test_a_wide_folder_that_others_use_is_warned_of",),
    ),
    Break(
        name="F10-links-followed",
        file="millpond/prefix/disk/files.py",
        old="os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW",
        new="os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_TRUNC",
        by=("test_planted_links_are_not_followed",),
    ),
    Break(
        name="F10-models-for-everybody",
        file="millpond/hub/cache.py",
        old="path.mkdir(mode=0o700, exist_ok=True)",
        new="path.mkdir(exist_ok=True)",
        by=("test_what_is_made_is_private_and_whole",),
    ),
]
