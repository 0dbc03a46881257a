"""The running batch's keys and values: rows, slots, the arena that holds them, and the solo lane. Imports mlx."""
