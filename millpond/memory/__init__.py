"""What memory there is, what a model and its requests take of it, and who may have how much. Knows no mlx."""
