"""TODO-DOC exchange."""
