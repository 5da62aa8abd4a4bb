"""The head's Triton kernels compiled for an H100 or H200 (sm_90): registers, spills, width of loads. Needs no GPU."""

import re
import subprocess
import tempfile
from typing import Any

TYPES = {"labels": "*i64", "out": "*fp32", "top": "*fp32", "factor": "*fp32", "label_gradient": "*fp32"}


def kernels() -> dict[str, Any]:
    """Per kernel and dtype of the logits: registers a thread, bytes spilled, instructions that load and store.

    Pointers and sizes are taken as divisible by 16, as those of a padded vocabulary are.
    Goals: no spills, and 16-byte loads of the logits (``ld.global.v4.b32``).
    """
    from megatron_gft import row_kernels

    found = {}
    for dtype in ("bf16", "fp32"):
        for entropy in (False, True):
            constants = {"ENTROPY": entropy, "BLOCK": row_kernels.STATISTICS_BLOCK}
            name = f"statistics {dtype}{' entropy' if entropy else ''}"
            found[name] = _compile(row_kernels.statistics_kernel, dtype, constants, row_kernels.WARPS)
        constants = {"BLOCK": row_kernels.GRADIENT_BLOCK}
        found[f"gradient {dtype}"] = _compile(row_kernels.gradient_kernel, dtype, constants, row_kernels.WARPS)
    return found


def _compile(kernel: Any, dtype: str, constants: dict[str, Any], warps: int) -> dict[str, Any]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = [name for name in kernel.arg_names if name not in constants]
    types = {"logits": f"*{dtype}"} | {name: TYPES.get(name, "i32") for name in names if name != "logits"}
    divisible = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in names if name != "rows"}
    source = ASTSource(kernel, types | dict.fromkeys(constants, "constexpr"), constants, divisible)
    code = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps}).asm
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    ptx = code["ptx"]
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),  # type: ignore[index]
        "spilled_bytes": sum(int(count) for count in re.findall(r"(?:STACK|LOCAL):(\d+)", usage)),
        "loads": sorted(set(re.findall(r"ld\.global[\w.]*", ptx))),
        "stores": sorted(set(re.findall(r"st\.global[\w.]*", ptx))),
        "triton": triton.__version__,
    }
