"""TODO-DOC tuning."""
