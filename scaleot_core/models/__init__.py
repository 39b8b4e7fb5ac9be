"""What we ask of any causal language model: where its layers are, its weights, its hidden states and losses."""
