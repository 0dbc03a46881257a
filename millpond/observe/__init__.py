"""What the outside can see of a running server: logs now."""
