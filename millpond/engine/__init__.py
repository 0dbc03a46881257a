"""The engine process: one thread owns MLX and runs the loop; two small threads serve the socket."""
