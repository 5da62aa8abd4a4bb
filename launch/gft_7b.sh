''':'
# GFT of Qwen2.5-7B on one machine of 8 H100. Valid as bash and as the Python script that torchrun runs:
#   bash launch/gft_7b.sh [key=value ...]
#   torchrun [torchrun's flags] launch/gft_7b.sh [key=value ...]
#   sbatch launch/slurm.sbatch launch/gft_7b.sh [key=value ...]
# From the environment: NNODES, GPUS_PER_NODE, MASTER_ADDR, MASTER_PORT, NODE_RANK (or those of Kubernetes' PyTorchJob:
# WORLD_SIZE, RANK, PET_*), MAX_RESTARTS, LOG_DIR, PYTHON, CONFIG (files joined by ':', later ones win).
# Overlays: --config FILE. Start from the root of the repository.
root=$(cd "$(dirname "$0")/.." && pwd)
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" "$0" "$@"
: <<'# the end'
'''
if __name__ == "__main__":
    import pathlib
    import sys

    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
    from megatron_gft.runtime import StopRequest

    stop = StopRequest()  # before what takes seconds to import
    from megatron_gft.commands.launch import main

    code = main(__file__, recipe="examples/qwen2.5-7b/gpus-8.yaml", gpus=8, stop=stop)
    stop.ended()
    sys.exit(code)
# the end
