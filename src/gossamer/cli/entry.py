"""The script's entry: everything else is imported where Ctrl-C already has its one line."""

import sys

__all__ = ["main"]


def main() -> int:
    """Run the command line; an interrupt while it is still loading is quiet too."""
    try:
        from gossamer.cli.main import main as run

        return run()
    except KeyboardInterrupt:
        print("\ngossamer: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
