"""What a run is asked to do: frozen dataclasses, read from TOML and `--set`."""
