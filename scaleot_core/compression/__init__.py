"""TODO-DOC compression."""
