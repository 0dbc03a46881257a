"""The prefix cache: keys, planner, tree, RAM and SSD tiers. Knows bytes and sizes only; nothing here imports mlx."""
