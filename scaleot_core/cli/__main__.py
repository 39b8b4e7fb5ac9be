"""Run the command line as `python -m scaleot_core.cli`."""

from scaleot_core.cli import main

if __name__ == "__main__":
    main()
