''':'
# GFT of Llama-3.1-70B on 64 H100 (8 machines of 8). Valid as bash and as the Python script that torchrun runs:
#   bash launch/gft_70b.sh [key=value ...]  on every machine; set NNODES and MASTER_ADDR
#   torchrun [torchrun's flags] launch/gft_70b.sh [key=value ...]
#   sbatch launch/slurm.sbatch launch/gft_70b.sh [key=value ...]
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

    code = main(__file__, recipe="examples/llama3.1-70b/gpus-64.yaml", gpus=64, stop=stop)
    stop.ended()
    sys.exit(code)
# the end
