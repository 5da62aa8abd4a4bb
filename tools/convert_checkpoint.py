import sys

from megatron_gft.commands.convert import main

if __name__ == "__main__":
    sys.exit(main())
