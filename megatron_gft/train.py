"""``python -m megatron_gft.train --config FILE [section.key=value ...]``, alone or under torchrun."""

import sys

if __name__ == "__main__":
    from megatron_gft.runtime import StopRequest

    stop = StopRequest()  # before what takes seconds to import
    from megatron_gft.commands.train import main

    code = main(stop=stop)
    stop.ended()
    sys.exit(code)
