"""What was found out with the pipeline, and what runs it again."""
