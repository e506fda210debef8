"""Code of the command-line scripts in `src/`."""
