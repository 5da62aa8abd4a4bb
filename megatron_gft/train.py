"""``python -m megatron_gft.train --config FILE [section.key=value ...]``, alone or under torchrun."""

import sys

from megatron_gft.commands.train import main

if __name__ == "__main__":
    sys.exit(main())
