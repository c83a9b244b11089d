"""Programs that run from a checkout; each answers `python -m tools.NAME --help`."""
