"""What knows no language model: errors, files, progress, processes, devices and seeds."""
