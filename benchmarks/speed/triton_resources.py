"""What the Triton kernels ask of a GPU, by the compiler: `python -m benchmarks.speed.triton_resources`.

It compiles every kernel ahead of time for sm_80 and sm_90, without a GPU. Registers and shared memory bound how many
programs share a multiprocessor; they are not timings.
"""

import argparse
import csv
import datetime
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from typing import Any

import torch  # noqa: F401  (before triton: it loads the libraries that triton links to)
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks import records
from rsd_loss import _triton

ARCHES = (80, 90)
DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
# Each kernel with the switches that change its code.
KERNELS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("_moments", {}),
    ("_standardise", {"max_parts": 0}),
    ("_standardise", {"max_parts": _triton._PARTS}),
    ("_columns", {"tall": True}),
    ("_columns", {"tall": False}),
    ("_gradient", {}),
)
# How the launcher specialises the arguments: contiguous inputs whose widths are multiples of 16; inputs of any width
# and strides; a single feature. The integers 1 become constants, and the multiples of 16 are marked as such.
LAYOUTS: dict[str, tuple[frozenset[str], bool]] = {
    "aligned": (frozenset({"s_col", "t_col", "upstream_stride"}), True),
    "any": (frozenset(), False),
    "one feature": (frozenset({"features", "s_col", "t_col", "upstream_stride"}), False),
}
_FLOAT32 = {"moments_ptr", "stats_ptr", "losses_ptr", "d_ptr", "off_ptr", "upstream_ptr"}


def compile_kernel(name: str, switches: dict[str, Any], arch: int, dtype: str, layout: str = "aligned") -> Any:
    """The compiled kernel, as Triton would make it for embeddings of this dtype on this architecture."""
    kernel = getattr(_triton, name)
    ones, aligned = LAYOUTS[layout]
    constants: dict[str, Any] = {"block_r": _triton._BLOCK_R, "block_c": _triton._BLOCK_C, **switches}
    constants |= {p.name: 1 for p in kernel.params if p.name in ones}
    signature: dict[str, str] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, name_ in enumerate(kernel.arg_names):
        if name_ in constants:
            signature[name_] = "constexpr"
        elif name_.endswith("_ptr"):
            signature[name_] = "*fp32" if name_ in _FLOAT32 else f"*{DTYPES[dtype]}"
        else:
            signature[name_] = "fp32" if name_ in ("eps", "eps_norm", "kappa") else "i32"
        if signature[name_].startswith("*") or (signature[name_] == "i32" and (aligned or name_ == "chunk")):
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32))


def resources(compiled: Any) -> dict[str, int]:
    """Registers per thread, shared memory per program and bytes of stack per thread, which here are all spills."""
    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    cuobjdump = str(bundled) if bundled.exists() else shutil.which("cuobjdump")
    if cuobjdump is None:
        raise RuntimeError("cuobjdump not found, neither in triton nor on PATH")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        command = [cuobjdump, "--dump-resource-usage", str(path)]
        log = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", log)}
    return {
        "registers": found["REG"],
        "shared_bytes": int(compiled.metadata.shared),
        "spill_bytes": found["STACK"] + found["LOCAL"],
    }


def table() -> Iterator[dict[str, Any]]:
    """One row per kernel, layout, architecture and dtype."""
    for (name, switches), layout, arch, dtype in product(KERNELS, ("aligned", "any"), ARCHES, DTYPES):
        compiled = compile_kernel(name, switches, arch, dtype, layout)
        yield {
            "kernel": name.removeprefix("_") + "".join(f" {k}={v}" for k, v in switches.items()),
            "layout": layout,
            "arch": f"sm_{arch}",
            "dtype": dtype,
            "num_warps": compiled.metadata.num_warps,
            "block_r": _triton._BLOCK_R,
            "block_c": _triton._BLOCK_C,
            **resources(compiled),
            "triton": triton.__version__,
            "date": datetime.date.today().isoformat(),
        }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed.triton_resources",
        description="Registers, shared memory and spills of every Triton kernel, as CSV. Compiles for sm_80 and sm_90 "
        "without a GPU, in about half a minute, or seconds where Triton has them cached.",
    )
    parser.add_argument("--csv", type=records.output, metavar="PATH", help="write there and not to the terminal")
    args = parser.parse_args(argv)
    if not isinstance(_triton._moments, triton.JITFunction):
        parser.error("TRITON_INTERPRET replaces the compiler, and this asks the compiler: unset it")
    rows = list(table())
    if args.csv:
        args.csv.parent.mkdir(parents=True, exist_ok=True)
    with args.csv.open("w", newline="") if args.csv else nullcontext(sys.stdout) as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
