"""Where models come from: hub downloads, local folders, GGUF files and the demo. Nothing here imports mlx."""
