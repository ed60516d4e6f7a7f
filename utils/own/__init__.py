"""A user's own model and data, from files, for ``scripts/certify.py`` and its template."""
