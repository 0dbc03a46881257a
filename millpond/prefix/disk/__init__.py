"""The SSD tier: block files, their index, and the threads that do all file work."""
