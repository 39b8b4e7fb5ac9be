"""Run the command line as `python -m scaleot_core.cli`."""

from scaleot_core.cli import main

main()
