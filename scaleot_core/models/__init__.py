"""TODO-DOC models."""
