"""Every architecture of mlx-lm, built small and served: ``make coverage`` writes docs/models.md from what it finds."""
