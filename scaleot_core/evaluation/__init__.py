"""Evaluation by lm-evaluation-harness: its task definitions on our questions, its scoring of our models."""
