"""The breaks, one module for each section of docs/conformance.md."""
