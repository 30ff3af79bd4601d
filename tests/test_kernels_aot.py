"""Ahead-of-time compilation of every kernel with the tiles it runs with, for sm_80 and sm_90, without a GPU.

One child process compiles (this file, run as a script) and prints a row per kernel; the tests read the rows. What is
asserted comes from the machine code: no stack and no local memory (spills) by `cuobjdump -res-usage` on the cubin,
shared memory below the card's limit, tensor-core and TMA instructions where the op is a matrix product.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from prm_search.triton_kernels import tiles

# Bytes of shared memory one program may take: A100 and H100. The tiles for sm_80 must also fit sm_86 and sm_89.
SHARED_LIMIT = {80: 101_376, 90: 232_448}
CARDS = {80: (8, 0), 90: (9, 0)}


# ------------------------------------------------------------------------------------------------- what to compile


def linear_cases(cc: int) -> list[dict[str, Any]]:
    """(kernel, tile, dtype, switches) as _linear_launch.py chooses them."""
    cases = []
    kinds = [(1, True, True), (1, False, True), (48, False, True)]  # (rows, no bias and no cap, half operands)
    kinds += [(2048, True, True), (2048, False, True), (2048, False, False)]
    for rows, plain, half in kinds:
        for kernel in ("split_kernel", "logit_gradient_kernel"):
            tile = tiles.matmul_tile(
                capability=CARDS[cc], rows=rows, half=half, tma=cc == 90, plain=plain, gradient="gradient" in kernel
            )
            cases.append(
                {"kernel": kernel, "tile": vars(tile), "half": half, "plain": plain, "even": True, "rows": rows}
            )
    # A depth or an address that TMA does not take: pointers on any card, with and without a tail.
    for even in (True, False):
        tile = tiles.matmul_tile(capability=CARDS[cc], rows=2048, half=True, tma=False, plain=False)
        cases.append(
            {"kernel": "split_kernel", "tile": vars(tile), "half": True, "plain": False, "even": even, "rows": 2048}
        )
    return cases


def attention_cases(cc: int) -> list[dict[str, Any]]:
    cases = []
    everything = {"cap": True, "window": True, "sinks": True, "partial": True, "mode": 0}
    plain = {"cap": False, "window": False, "sinks": False, "partial": False, "mode": 0}
    capped = {**plain, "cap": True, "sinks": True}
    passes = [{**plain, "partial": True, "mode": mode} for mode in (1, 2)]
    for dims, packed, kinds in [
        ((128, 128), 7, [{**plain, "partial": True}, everything, *passes]),  # decode
        ((128, 128), 56, [plain, capped]),
        ((128, 128), 448, [plain, capped, everything, *passes]),  # extend
        ((64, 64), 448, [everything]),
        ((80, 80), 448, [plain]),
        ((192, 128), 448, [plain]),  # MLA
        ((256, 256), 7, [everything]),
        ((256, 256), 448, [{**plain, "partial": True}, capped, everything]),
    ]:
        for kind in kinds:
            tile = tiles.attention_tile(capability=CARDS[cc], half=True, packed=packed, head_dim=max(dims))
            cases.append({"kernel": "attention_kernel", "tile": vars(tile), "dims": dims, "half": True, **kind})
    tile = tiles.attention_tile(capability=CARDS[cc], half=False, packed=448, head_dim=256)
    cases.append({"kernel": "attention_kernel", "tile": vars(tile), "dims": (256, 256), "half": False, **capped})
    return cases


def small_cases() -> list[dict[str, Any]]:
    names = ["merge_kernel", "attention_merge_kernel", "write_kv_kernel", "logsumexp_parts_kernel", "guide_kernel"]
    cases = [{"kernel": name, "half": True} for name in names]
    sampling = [("sample_parts_kernel", False), ("sample_pick_kernel", False), ("sample_pick_kernel", True)]
    return cases + [{"kernel": name, "half": False, "counters": counters} for name, counters in sampling]


def all_cases() -> list[dict[str, Any]]:
    """Each compilation once: numbers of rows that take one tile are one case."""
    cases: dict[str, dict[str, Any]] = {}
    for cc in SHARED_LIMIT:
        for case in linear_cases(cc) + attention_cases(cc) + small_cases():
            code = {name: value for name, value in case.items() if name != "rows"}
            cases.setdefault(json.dumps([cc, code]), {"cc": cc, **case})
    return list(cases.values())


# ----------------------------------------------------------------------------------------- the compiling process


def constants(case: dict[str, Any]) -> dict[str, Any]:
    """The constexpr arguments of a case's kernel."""
    name, tile = case["kernel"], case.get("tile", {})
    if name == "attention_kernel":
        dk, dv = case["dims"]
        return {
            "G": 7, "DK": dk, "DV": dv, "BDK": tiles.padded(dk), "BDV": tiles.padded(dv), "HAS_CAP": case["cap"],
            "HAS_WINDOW": case["window"], "HAS_SINKS": case["sinks"], "PARTIAL": case["partial"],
            "PASS": case["mode"], "PRECISION": "tf32" if case["half"] else "ieee", "BM": tile["m"], "BN": tile["n"],
        }  # fmt: skip
    if tile:
        switches = {"HAS_BIAS": not case["plain"], "HAS_CAP": not case["plain"], "EVEN_D": case["even"]}
        if name == "split_kernel":
            switches["RAW"] = case["plain"]
        return switches | {
            "TMA": tile["tma"], "PRECISION": "tf32" if case["half"] else "ieee", "BM": tile["m"], "BV": tile["v"],
            "BK": tile["k"],
        }  # fmt: skip
    return {
        "merge_kernel": {"BN": 128},
        "attention_merge_kernel": {"HAS_SINKS": True, "DV": 128, "BDV": 128, "BR": 8},
        "write_kv_kernel": {"DK": 128, "DV": 128, "BLOCK": 1024},
        "logsumexp_parts_kernel": {"BLOCK": 1024},
        "guide_kernel": {"SPLITS": 64, "BLOCK": 2048},
        "sample_parts_kernel": {"COLDEST": 1e-30, "BLOCK": 1024},
        "sample_pick_kernel": {"COUNTERS": case.get("counters"), "COLDEST": 1e-30, "SPLITS": 64, "BLOCK": 1024},
    }[name]


FLOATS = {"scale", "softcap", "factor", "sink_scale"}
FP32_POINTERS = {"part_ptr", "stat_ptr", "lse_ptr", "logprob_ptr", "grad_logprob_ptr", "grad_lse_ptr"}
FP32_POINTERS |= {"sink_ptr", "alpha_ptr", "temperature_ptr"}
INDEX_POINTERS = {"first_ptr", "table_ptr", "len_ptr", "start_ptr", "group_ptr", "prefix_ptr"}
INT64_POINTERS = {"target_ptr", "slot_ptr", "token_ptr"}


def argument_type(name: str, case: dict[str, Any]) -> str:
    if name in FLOATS:
        return "fp32"
    if name in FP32_POINTERS:
        return "*fp32"
    if name in INDEX_POINTERS:
        return "*i32"
    if name in INT64_POINTERS:
        return "*i64"
    if name == "draw_ptr":
        return "*i64" if case["counters"] else "*fp64"
    if name.endswith("_ptr"):
        return "*bf16" if case["half"] else "*fp32"
    return "i32"


def compile_case(case: dict[str, Any]) -> dict[str, Any]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from prm_search.triton_kernels import _jit_attention, _jit_linear, _jit_rows, _jit_sample

    name, tile = case["kernel"], case.get("tile", {})
    kernels = {**vars(_jit_rows), **vars(_jit_sample), **vars(_jit_attention), **vars(_jit_linear)}
    kernel = _jit_attention.merge_kernel if name == "attention_merge_kernel" else kernels[name]
    fixed = constants(case)
    signature = {
        argument: "constexpr" if argument in fixed else argument_type(argument, case) for argument in kernel.arg_names
    }
    # What a launch finds out by itself: addresses of operands and strides are multiples of 16, and so is an even depth.
    tables = INDEX_POINTERS | INT64_POINTERS | {"stride_table"}
    multiples = [a for a in kernel.arg_names if a.endswith("_ptr") or a.startswith("stride")]
    multiples = [a for a in multiples if a not in tables]
    multiples += ["D"] if "D" in kernel.arg_names and case.get("even", True) else []
    source = ASTSource(
        fn=kernel, signature=signature, constexprs=fixed,
        attrs={(kernel.arg_names.index(argument),): [["tt.divisibility", 16]] for argument in multiples},
    )  # fmt: skip
    options = {"num_warps": tile.get("warps", 4), "num_stages": tile.get("stages", 3)}
    compiled = triton.compile(source, target=GPUTarget("cuda", case["cc"], 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
        code = subprocess.run([tool, "-sass", cubin], capture_output=True, text=True, check=True).stdout
    ptx = compiled.asm["ptx"]
    return {
        **case,
        **{field.lower(): int(re.search(rf"{field}:(\d+)", usage).group(1)) for field in ("REG", "STACK", "LOCAL")},
        "shared": compiled.metadata.shared,
        "tma": "cp.async.bulk.tensor" in ptx,
        "async_copies": "cp.async.c" in ptx,
        "hgmma": len(re.findall(r"\bHGMMA\b", code)),
        "hmma": len(re.findall(r"\bHMMA\b", code)),
        "copies_in_flight": in_loops(compiled.asm["ttgir"], r"ttg\.async_wait .*num = (\d+)"),
        "products_in_flight": in_loops(compiled.asm["ttgir"], r"warp_group_dot_wait .*pendings = (\d+)"),
    }


def in_loops(ttgir: str, wait: str) -> list[int]:
    """How much each wait of this kind leaves under way, in loops that hold no other: 0 where nothing overlaps."""
    found: list[int] = []
    loops: list[tuple[int, list[int], bool]] = []  # indent, waits so far, whether another loop stands inside
    for line in ttgir.splitlines():
        indent = len(line) - len(line.lstrip())
        if loops and indent <= loops[-1][0] and line.lstrip().startswith("}"):
            _, waits, holds_another = loops.pop()
            found += [] if holds_another else waits
        if "scf.for" in line:
            if loops:
                loops[-1] = (*loops[-1][:2], True)
            loops.append((indent, [], False))
        if loops and (count := re.search(wait, line)):
            loops[-1][1].append(int(count.group(1)))
    return found


# ---------------------------------------------------------------------------------------------------------- tests


pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),  # about 150 compilations' seconds, however busy the machine is
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton"),
]


@pytest.fixture(scope="module")
def compiled() -> list[dict[str, Any]]:
    """Compiles once for the module, in a process without the interpreter."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_DEFAULT_FP_FUSION"] = "1"
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def described(row: dict[str, Any]) -> str:
    return json.dumps(row)


def test_every_case_was_compiled(compiled):
    assert len(compiled) == len(all_cases())
    assert {row["kernel"] for row in compiled} >= {"split_kernel", "logit_gradient_kernel"}
    assert all(row["reg"] > 0 for row in compiled)  # the parser read something


def test_nothing_spills(compiled):
    spilled = [described(row) for row in compiled if row["stack"] or row["local"]]
    assert not spilled, "\n".join(spilled)


def test_shared_memory_fits_the_card(compiled):
    too_much = [described(row) for row in compiled if row["shared"] > SHARED_LIMIT[row["cc"]]]
    assert not too_much, "\n".join(too_much)


def test_the_linear_kernels_use_wgmma_and_tma_on_hopper(compiled):
    rows = [row for row in compiled if row["cc"] == 90 and row.get("tile", {}).get("tma")]
    assert {row["kernel"] for row in rows} == {"split_kernel", "logit_gradient_kernel"}
    for row in rows:
        assert row["hgmma"], described(row)
        assert row["tma"], described(row)
        assert row["products_in_flight"] == [1], described(row)  # a product runs while the next operands arrive


def test_the_pointer_path_uses_tensor_cores_and_asynchronous_copies(compiled):
    rows = [row for row in compiled if "k" in row.get("tile", {}) and row["half"] and not row["tile"]["tma"]]
    assert rows
    for row in rows:
        assert row["hmma"] or row["hgmma"], described(row)
        if row["even"]:  # an odd depth has no copies of 16 bytes
            assert row["copies_in_flight"], described(row)
            assert min(row["copies_in_flight"]) >= 2, described(row)


def test_attention_uses_tensor_cores_and_loads_ahead(compiled):
    """In both loops, with and without masks: keys and values of later blocks arrive while this one is computed."""
    rows = [row for row in compiled if row["kernel"] == "attention_kernel" and row["half"]]
    assert rows
    for row in rows:
        wide_enough = row["cc"] == 90 and row["tile"]["m"] >= 64
        assert row["hgmma"] if wide_enough else row["hmma"], described(row)
        assert row["async_copies"], described(row)
        assert len(row["copies_in_flight"]) == (1 if row["window"] else 2), described(row)
        assert min(row["copies_in_flight"]) >= 2, described(row)


# Registers of a processor, threads of a warp; shared memory of a processor, and what each program takes beside its own.
REGISTERS, WARP = 65_536, 32
PROCESSOR_SHARED, PROGRAM_SHARED = {80: 167_936, 90: 233_472}, 1_024


def test_as_many_programs_fit_a_processor_as_the_schedules_count_on(compiled):
    rows = [row for row in compiled if row.get("tile")]
    for row in rows:
        resident, threads = row["tile"]["resident"], row["tile"]["warps"] * WARP
        allocated = -(-row["reg"] // 8) * 8  # by eight a thread
        assert resident * allocated * threads <= REGISTERS, described(row)
        assert resident * (row["shared"] + PROGRAM_SHARED) <= PROCESSOR_SHARED[row["cc"]], described(row)


def test_the_main_tiles_keep_their_registers(compiled):
    """The parts that decide speed, with the room that a new Triton may take: spills begin at 255."""
    most = {("split_kernel", 64): 176, ("logit_gradient_kernel", 128): 128}
    for row in compiled:
        if row["cc"] == 90 and row.get("plain") and row["half"] and row["tile"].get("tma"):
            assert row["reg"] <= most.get((row["kernel"], row["tile"]["m"]), 255), described(row)


if __name__ == "__main__":
    json.dump([compile_case(case) for case in all_cases()], sys.stdout)
