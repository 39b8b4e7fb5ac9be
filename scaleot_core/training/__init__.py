"""TODO-DOC training."""
