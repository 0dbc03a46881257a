"""How the front end starts an engine, alone or as a group of ranks, here or over ssh. Nothing here imports mlx."""
