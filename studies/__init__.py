"""Questions that are asked of the pipeline, a module and a make target each."""
