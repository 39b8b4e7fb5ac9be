"""TODO-DOC reporting."""
