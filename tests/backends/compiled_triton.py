"""Compiles the Triton kernel for an H100, without one: prints what instructions it is made of, as JSON."""

from __future__ import annotations

import json
import re

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from recadam_torch.kernels.triton import BLOCK, CHUNK, _kernel

LIKE = ("theta", "grad", "m", "v", "anchor", "importance")
USUAL = dict.fromkeys(("weighs", "decays", "chance", "negates", "scaled", "guarded"), False)
CASES = {
    "float32": ({}, {}),
    "float32 decayed": ({}, {"decays": True}),
    "float32 weighed": ({}, {"weighs": True}),
    "float32 guarded": ({}, {"guarded": True, "scaled": True, "negates": True}),
    "bfloat16 by chance": ({"theta": "bf16", "grad": "bf16"}, {"chance": True}),
    "float16 and bfloat16": (
        {"theta": "fp16", "grad": "fp16", "m": "bf16", "v": "bf16", "anchor": "bf16"},
        {},
    ),
    "pull": ({}, {"steps": False}),
    "float64": (dict.fromkeys((*LIKE, "scalars"), "fp64"), {}),
}
WORDS = {
    "fma": r"\bfma\.",
    "sqrt": r"\bsqrt\.rn",
    "div": r"\bdiv\.rn",
    "inexact": r"\b(?:div\.full|\w+\.approx)",
    "wide loads": r"\bld\.global\.v[24]",
}


def compiled(types, flags):
    pointers = {f"{name}_like": f"*{types.get(name, 'fp32')}" for name in LIKE}
    signature = {
        "table_at": "*i64", "chunks_at": "*i32", "scalars_at": f"*{types.get('scalars', 'fp32')}",
        "keys_at": "*i64", "scale_at": "*fp32", "found_at": "*fp32", **pointers,
        **dict.fromkeys(("tensors", "programs", "stride"), "i32"),
    }  # fmt: skip
    known = {**USUAL, "steps": True, "pulls": True, "aligned": True, "chunk": CHUNK, "block": BLOCK, **flags}
    names = _kernel.arg_names
    source = ASTSource(
        fn=_kernel,
        signature={**signature, **dict.fromkeys(known, "constexpr")},
        constexprs={(names.index(name),): value for name, value in known.items()},
    )
    options = {"enable_fp_fusion": False, "num_warps": 8}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm


if __name__ == "__main__":
    found = {}
    for case, (types, flags) in CASES.items():
        asm = compiled(types, flags)
        found[case] = {name: len(re.findall(word, asm["ptx"])) for name, word in WORDS.items()}
        found[case]["bytes"] = len(asm["cubin"])
    print(json.dumps(found))
