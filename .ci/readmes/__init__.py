"""Keeps the READMEs true: finds commands that would fail, and flags, settings, files and names that do not exist."""
