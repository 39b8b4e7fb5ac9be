"""TODO-DOC evaluation."""
