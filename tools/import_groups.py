import sys

from megatron_gft.commands.import_groups import main

if __name__ == "__main__":
    sys.exit(main())
