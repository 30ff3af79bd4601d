"""Ahead-of-time compilation of every kernel with the tiles it runs with, for sm_80 and sm_90, without a GPU.

One child process compiles (this file, run as a script) and prints a row per kernel; the tests read the rows. What is
asserted comes from the machine code: no stack and no local memory (spills) by `cuobjdump -res-usage` on the cubin,
registers, shared memory below the card's limit, tensor-core and TMA instructions where the op is a matrix product, and
that loads overlap with compute: what each wait in a loop leaves under way.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from prm_search.triton_kernels import _rows_launch, tiles

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
    for rows, even in ((1, True), (48, True), (2048, True), (2048, False)):
        for kernel in ("split_kernel", "logit_gradient_kernel") if even else ("split_kernel",):
            tile = tiles.matmul_tile(capability=CARDS[cc], rows=rows, half=True, tma=False, plain=False)
            cases.append(
                {"kernel": kernel, "tile": vars(tile), "half": True, "plain": False, "even": even, "rows": rows}
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
        ((256, 256), 7, [{**plain, "partial": True}, everything]),
        ((256, 256), 448, [{**plain, "partial": True}, capped, everything]),
    ]:
        for kind in kinds:
            tile = tiles.attention_tile(capability=CARDS[cc], half=True, packed=packed, head_dim=max(dims))
            cases.append({"kernel": "attention_kernel", "tile": vars(tile), "dims": dims, "half": True, **kind})
    tile = tiles.attention_tile(capability=CARDS[cc], half=False, packed=448, head_dim=256)
    cases.append({"kernel": "attention_kernel", "tile": vars(tile), "dims": (256, 256), "half": False, **capped})
    return cases


def small_cases() -> list[dict[str, Any]]:
    """Row-wise kernels; `even`: of a vocabulary that is a multiple of 16, as all but a few are."""
    names = ["merge_kernel", "attention_merge_kernel", "write_kv_kernel", "logsumexp_parts_kernel", "guide_kernel"]
    cases = [{"kernel": name, "half": True, "even": True} for name in names]
    sampling = [("sample_parts_kernel", False, 4)]
    sampling += [("sample_pick_kernel", counters, _rows_launch.PICK_WARPS) for counters in (False, True)]
    cases += [
        {"kernel": name, "half": False, "even": True, "counters": counters, "warps": warps}
        for name, counters, warps in sampling
    ]
    odd = [case for case in cases if case["kernel"] in ("guide_kernel", "sample_parts_kernel")]
    return cases + [{**case, "even": False} for case in odd]


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
    if not case.get("even", True):
        multiples = [a for a in multiples if not a.startswith("stride") or tile]
    else:
        sizes = {"D"} if tile else {"V", "WIDTH", "prm_V", "ref_V", "share"}
        multiples += [a for a in kernel.arg_names if a in sizes]
    source = ASTSource(
        fn=kernel, signature=signature, constexprs=fixed,
        attrs={(kernel.arg_names.index(argument),): [["tt.divisibility", 16]] for argument in multiples},
    )  # fmt: skip
    options = {"num_warps": tile.get("warps", case.get("warps", 4)), "num_stages": tile.get("stages", 3)}
    compiled = triton.compile(source, target=GPUTarget("cuda", case["cc"], 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
        code = subprocess.run([tool, "-sass", cubin], capture_output=True, text=True, check=True).stdout
    return {
        **case,
        **{field.lower(): int(re.search(rf"{field}:(\d+)", usage).group(1)) for field in ("REG", "STACK", "LOCAL")},
        "shared": compiled.metadata.shared,
        **{name: len(re.findall(pattern, code)) for name, pattern in INSTRUCTIONS.items()},
        **{name: sorted(int(n, 16) for n in re.findall(pattern, code)) for name, pattern in WAITS.items()},
        "denormal_exps": len(re.findall(r"\bex2\.approx\.f32", compiled.asm["ptx"])),
        "copies_in_flight": in_loops(compiled.asm["ttgir"], r"ttg\.async_wait .*num = (\d+)"),
        "products_in_flight": in_loops(compiled.asm["ttgir"], r"warp_group_dot_wait .*pendings = (\d+)"),
    }


INSTRUCTIONS = {
    "hgmma": r"\bHGMMA\b",  # a warp group's products, sm_90
    "hmma": r"\bHMMA\b",  # a warp's products
    "tma_loads": r"\bUTMALDG\b",
    "async_copies": r"\bLDGSTS\b",  # cp.async
    "wide_loads": r"\bLDG\.E(?:\.\w+)*\.128\b",
    "loads": r"\bLDG\b",
}
# How many groups of cp.async, or of HGMMA, each wait in the machine code leaves under way.
WAITS = {
    "copy_waits": r"[^.]DEPBAR\.LE SB\d, 0x([0-9a-f]+)",
    "product_waits": r"WARPGROUP\.DEPBAR\.LE gsb0, 0x([0-9a-f]+)",
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


def shape_of(tile: dict[str, Any]) -> str:
    return (
        "x".join(str(tile[side]) for side in ("m", "v", "n", "k") if side in tile)
        + f" {tile['stages']},{tile['warps']}"
    )


def test_every_tile_that_a_launch_may_take_was_compiled(compiled):
    there = {(row["cc"], row["kernel"], row["half"], shape_of(row["tile"])) for row in compiled if row.get("tile")}
    wanted = set()
    for (cc, card), half in itertools.product(CARDS.items(), (False, True)):
        for rows, tma, plain, gradient in itertools.product((1, 16, 17, 64, 65, 4096), *[(False, True)] * 3):
            tile = tiles.matmul_tile(capability=card, rows=rows, half=half, tma=tma, plain=plain, gradient=gradient)
            kernel = "logit_gradient_kernel" if gradient else "split_kernel"
            wanted.add((cc, kernel, half, shape_of(vars(tile))))
        for packed, dim in itertools.product((1, 16, 17, 64, 65, 4096), (16, 64, 80, 128, 192, 256)):
            tile = tiles.attention_tile(capability=card, half=half, packed=packed, head_dim=dim)
            wanted.add((cc, "attention_kernel", half, shape_of(vars(tile))))
    assert wanted - there == set()


def test_nothing_spills(compiled):
    spilled = [described(row) for row in compiled if row["stack"] or row["local"]]
    assert not spilled, "\n".join(spilled)


def test_shared_memory_fits_the_card(compiled):
    too_much = [described(row) for row in compiled if row["shared"] > SHARED_LIMIT[row["cc"]]]
    assert not too_much, "\n".join(too_much)


def products(compiled: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the kernels that multiply matrices: the head, its gradient, attention."""
    return [row for row in compiled if row.get("tile")]


def test_half_operands_are_multiplied_by_tensor_cores(compiled):
    """By whole warp groups on sm_90 where a tile has the 64 rows of one. fp32 is multiplied exactly, without any."""
    for row in products(compiled):
        by_groups = row["half"] and row["cc"] == 90 and row["tile"]["m"] >= 64
        by_warps = row["half"] and not by_groups
        assert (bool(row["hgmma"]), bool(row["hmma"])) == (by_groups, by_warps), described(row)


def test_no_exponential_of_a_tile_handles_denormals(compiled):
    """A tile has thousands, and what they would add rounds away."""
    assert [described(row) for row in products(compiled) if row["denormal_exps"]] == []


def test_descriptors_load_ahead_while_a_product_runs(compiled):
    """TMA, sm_90: `stages` pairs of tiles are asked for, all but one before the loop; a product stays under way."""
    rows = [row for row in products(compiled) if row["tile"].get("tma")]
    assert {row["kernel"] for row in rows} == {"split_kernel", "logit_gradient_kernel"}
    for row in rows:
        assert row["tma_loads"] == 2 * row["tile"]["stages"], described(row)
        assert row["products_in_flight"] == [1], described(row)
        assert row["product_waits"] == [0, 1], described(row)  # the loop's, and one after it: nothing was serialised


def test_copies_overlap_with_compute_in_every_loop(compiled):
    """Later blocks of both operands are on their way while one is computed, in the compiler's loops and in the code."""
    rows = [row for row in products(compiled) if not row["tile"].get("tma") and row.get("even", True)]
    assert {row["kernel"] for row in rows} == {"split_kernel", "logit_gradient_kernel", "attention_kernel"}
    for row in rows:
        assert row["async_copies"], described(row)
        # attention walks masked and unmasked blocks apart; a window leaves the masked ones alone
        loops = (1 if row["window"] else 2) if row["kernel"] == "attention_kernel" else 1
        assert len(set(row["copies_in_flight"])) == 1, described(row)
        assert len(row["copies_in_flight"]) >= loops, described(row)
        assert row["copies_in_flight"][0] >= 2, described(row)
        assert row["copy_waits"].count(row["copies_in_flight"][0]) >= loops, described(row)


def test_wgmma_through_pointers_leaves_a_product_under_way(compiled):
    rows = [row for row in products(compiled) if row["hgmma"] and row["kernel"] != "attention_kernel"]
    rows = [row for row in rows if not row["tile"]["tma"] and row["even"]]
    assert rows
    for row in rows:
        assert row["products_in_flight"] == [1], described(row)
        assert row["product_waits"] == [0, 1], described(row)


def test_row_wise_kernels_read_sixteen_bytes_a_thread(compiled):
    """What they do is to read. The head's merge reads a number of each row and split: it has no such width."""
    rows = [row for row in compiled if not row.get("tile") and row["even"]]
    assert len({row["kernel"] for row in rows}) == 7
    for row in rows:
        assert row["wide_loads"] or row["kernel"] == "merge_kernel", described(row)


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


def test_two_programs_of_the_heads_gradient_fit_a_processor_of_hopper(compiled):
    (row,) = [
        row for row in compiled
        if row["kernel"] == "logit_gradient_kernel" and row["tile"] == vars(tiles.HOPPER_GRADIENT) and row["plain"]
    ]  # fmt: skip
    assert 2 * row["reg"] * row["tile"]["warps"] * WARP <= REGISTERS
    assert 2 * (row["shared"] + PROGRAM_SHARED) <= PROCESSOR_SHARED[90]


def test_the_row_wise_kernels_leave_room_for_the_warps_that_hide_their_reads(compiled):
    """As `tiles.row_splits` counts on; those that are not split get by with fewer."""
    for row in compiled:
        if not row.get("tile"):
            warps = 8 * 4 if row["kernel"].endswith("parts_kernel") else 5 * 4
            assert warps * -(-row["reg"] // 8) * 8 * WARP <= REGISTERS, described(row)


def test_the_main_tiles_keep_their_registers(compiled):
    """The parts that decide speed, with the room that a new Triton may take: spills begin at 255."""
    most = {("split_kernel", 64): 176, ("logit_gradient_kernel", 128): 128}
    for row in compiled:
        if row["cc"] == 90 and row.get("plain") and row["half"] and row["tile"].get("tma"):
            assert row["reg"] <= most.get((row["kernel"], row["tile"]["m"]), 255), described(row)


if __name__ == "__main__":
    json.dump([compile_case(case) for case in all_cases()], sys.stdout)
