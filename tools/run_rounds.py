import sys

from megatron_gft.commands.rounds import main

if __name__ == "__main__":
    sys.exit(main())
