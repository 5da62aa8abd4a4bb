# NCCL, allocator and thread settings of every training process, each with its reason. What is set already wins.
# Read by megatron_gft/commands/launch.py for all ways of starting; may also be sourced by hand.
default() { [ -n "${!1+set}" ] || export "$1=$2"; }

# Megatron-Core hides tensor-parallel communication by the order in which it queues kernels; a single hardware queue
# keeps that order (Hopper and older).
default CUDA_DEVICE_MAX_CONNECTIONS 1

# Packs differ in length from step to step; segments that grow instead of fixed blocks keep fragmentation low.
default PYTORCH_ALLOC_CONF expandable_segments:True

# One CPU thread a process: the ranks of a machine share its cores.
default OMP_NUM_THREADS 1

# Threads of the tokenizers library do not survive a fork.
default TOKENIZERS_PARALLELISM false

# NVLink SHARP reserves device memory for each communicator, and a 3D layout has many.
default NCCL_NVLS_ENABLE 0

# NCCL reports what is wrong and nothing else.
default NCCL_DEBUG WARN

# Ride out a flapping link: about 17 s (4 us * 2^22) before a retry fails, instead of 4 s.
default NCCL_IB_TIMEOUT 22

# A failed or late collective ends its process with an error instead of leaving it waiting.
default TORCH_NCCL_ASYNC_ERROR_HANDLING 1

# Keep the last collectives of every rank and write them out on a timeout: they show which rank was missing.
default TORCH_FR_BUFFER_SIZE 2000
default TORCH_NCCL_DUMP_ON_TIMEOUT 1

# Depends on the site, so not set here: NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME (interface for bootstrap and gloo),
# NCCL_IB_HCA (adapters to use), NCCL_IB_GID_INDEX (RoCE).
