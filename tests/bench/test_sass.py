"""The reader of machine code finds a tile's straight path; tests/kernels/test_aot.py reads what the
compiler makes."""

import pytest

from bench.sass import Counts, proxy_fence, read, tile_code


def code(text: str):
    """Of lines `label:`, or `[@guard] NAME operands`, as nvdisasm prints them."""
    lines = []
    for at, line in enumerate(filter(None, map(str.strip, text.splitlines()))):
        if line.endswith(":"):
            lines.append(line)
        else:
            lines.append(f"        /*{16 * at:04x}*/              {line} ;")
    return read("\n".join(["\t.headerflags  @x", ".text.kernel:", *lines]))


PLAIN = """
    LDC R1, c[0x0][0x28]
    IMAD.MOV.U32 R2, RZ, RZ, R1
    LDGSTS.E.BYPASS.128 [R3], desc[UR4][R6.64]
    HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24
    HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, gsb0
    WARPGROUP.DEPBAR.LE gsb0, 0x0
    FMUL R24, R24, R2
    FSETP.GT.AND P0, PT, R24, RZ, PT
    MUFU.EX2 R24, R24
    F2FP.BF16.F32.PACK_AB R24, R25, R24
    NOP
    @P0 STG.E.128 desc[UR4][R4.64], R24
    STG.E desc[UR4][R4.64], R24
    EXIT
.L_x_1:
    BRA `(.L_x_1)
    NOP
"""


def test_epilogue_is_what_follows_the_last_product_up_to_the_exit():
    (tile,) = tile_code(code(PLAIN))
    assert tile.epilogue == Counts(all=8, alu=2, special=1, memory=2, stored_bytes=20)
    assert tile.prologue.all == 3 and not tile.loops


BRANCHES = """
    ISETP.NE.AND P0, PT, R2, RZ, PT
    @P0 EXIT
.L_x_2:
    HMMA.16816.F32.BF16 R24, R4, R6, R24
    IADD3 R5, R5, 0x1, RZ
    @!P1 BRA `(.L_x_2)
    BRA.U !UP0, `(.L_x_5)
    LDG.E R7, desc[UR4][R8.64]
.L_x_3:
    ISETP.EQ.AND P2, PT, R7, R9, PT
    @P2 BRA `(.L_x_3)
.L_x_5:
    FADD R24, R24, R25
    @P3 BRA `(.L_x_6)
    FMUL R24, R24, 2
    FMUL R24, R24, 3
    BRA `(.L_x_7)
.L_x_6:
    FMUL R24, R24, 4
.L_x_7:
    RED.E.ADD.F32.FTZ.RN.STRONG.GPU desc[UR4][R4.64], R24
    EXIT
"""


def test_what_a_tile_may_skip_is_not_on_its_path():
    (tile,) = tile_code(code(BRANCHES))
    # IADD3, BRA, BRA.U; FADD, BRA, the shorter side's FMUL; RED, EXIT
    assert tile.epilogue.all == 8
    assert tile.reachable == 14


GUIDE = """
.L_x_1:
    HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24, gsb0
    @P0 BRA `(.L_x_1)
    FADD R24, R24, R25
    FADD R24, R24, R25
    FADD R24, R24, R25
    @P1 BRA `(.L_x_3)
.L_x_2:
    HGMMA.64x64x16.F32.BF16 R32, gdesc[UR4], R32, gsb0
    @P0 BRA `(.L_x_2)
.L_x_3:
    FMUL R32, R32, R24
    STG.E desc[UR4][R4.64], R32
    EXIT
"""


@pytest.mark.parametrize("guarded", [True, False], ids=["loop-of-no-steps", "loop-of-some"])
def test_an_earlier_product_has_no_epilogue_of_its_own(guarded):
    text = GUIDE if guarded else GUIDE.replace("@P1 BRA `(.L_x_3)", "NOP")
    (tile,) = tile_code(code(text))
    assert tile.epilogue.all == 4  # BRA, FMUL, STG, EXIT


# Two consumers that walk over tiles, waits that retry far behind, and a loop over roles around all.
SPECIALIZED = """
    USETMAXREG.DEALLOC.CTAPOOL 0x28
.L_roles:
    BAR.SYNC.DEFER_BLOCKING 0x1
    @P0 BRA `(.L_second)
    @P1 EXIT
.L_first:
    MOV R1, R2
.L_steps:
    SYNCS.PHASECHK.TRANS64.TRYWAIT P2, [UR11+0x24240], R10
    @!P2 BRA `(.L_wait)
.L_ready:
    HGMMA.64x256x16.F32.BF16 R24, gdesc[UR12], R24, gsb0
    @!P3 BRA `(.L_steps)
    MUFU.EX2 R24, R24
    MUFU.EX2 R25, R25
    STG.E desc[UR4][R4.64], R24
    @!P2 BRA `(.L_first)
    BRA `(.L_roles)
.L_second:
    MOV R1, R2
.L_more:
    HGMMA.64x256x16.F32.BF16 R24, gdesc[UR12], R24, gsb0
    @!P3 BRA `(.L_more)
    MUFU.EX2 R24, R24
    STS.128 [R3], R24
    UTMASTG.2D [UR8], [UR4]
    @!P2 BRA `(.L_second)
    BRA `(.L_roles)
.L_wait:
    SYNCS.PHASECHK.TRANS64.TRYWAIT P2, [UR11+0x24240], R10
    @!P2 BRA `(.L_wait)
    BRA `(.L_ready)
"""


def test_each_consumer_is_read_up_to_its_jump_back():
    first, second = tile_code(code(SPECIALIZED))
    assert first.loops and second.loops
    # BRA of the steps, two MUFU, STG, BRA to the next tile
    assert first.epilogue == Counts(all=5, special=2, memory=1, stored_bytes=4)
    assert second.epilogue == Counts(all=5, special=1, memory=1, bulk_stores=1)
    assert first.prologue.all == 3  # of the next tile: MOV, and a wait that is over


def test_a_loop_within_the_epilogue_is_no_jump_back():
    text = "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24, gsb0\n.L_x_1:\nFADD R1, R1, R2"
    (tile,) = tile_code(code(f"{text}\nSTG.E desc[UR4][R8.64], R4\n@P0 BRA `(.L_x_1)\nEXIT"))
    assert not tile.loops and tile.epilogue.all == 4


FLATTENED = """
.L_steps:
    IADD3 R5, R5, 0x1, RZ
    UTCHMMA gdesc[UR12], gdesc[UR14], tmem[UR8], tmem[UR10], idesc[UR11], UP1
    BRA.U UP0, `(.L_next)
    LDTM.x32 R4, tmem[UR8]
    FMUL R4, R4, R5
    STG.E.64 desc[UR4][R8.64], R4
.L_next:
    @P0 BRA `(.L_steps)
    EXIT
"""


def test_the_epilogue_of_a_loop_over_steps_of_all_tiles_is_the_way_that_stores():
    (tile,) = tile_code(code(FLATTENED))
    assert tile.loops and tile.epilogue == Counts(all=5, memory=2, stored_bytes=8)


def test_without_a_tensor_instruction_there_is_no_tile():
    assert tile_code(code("FFMA R1, R2, R3, R1\nSTG.E desc[UR4][R8.64], R4\nEXIT")) == []


LOOP = """
.visible .entry kernel()
{
	cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10;
	cp.async.commit_group;
$L__BB0_1:                              // =>This Inner Loop Header: Depth=1
	cp.async.wait_group 	1;
	bar.sync 	0;
	fence.proxy.async.shared::cta;
	wgmma.fence.sync.aligned;
	wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {%f1}, %rd2, %rd3, p, 1, 1, 0, 0;
	cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10;
	cp.async.commit_group;
	@%p1 bra 	$L__BB0_1;
	ret;
}
"""
FENCE = "fence.proxy.async.shared::cta;"
UNFENCED = LOOP.replace(FENCE, "")
TAIL = "st.shared.v4.b32 [ %r2 + 0 ], {%r3};\n\t@%p2 bra $L__BB0_1;\n\tret;"


@pytest.mark.parametrize(
    ("ptx", "fenced"),
    [
        pytest.param(LOOP, True, id="fenced-in-every-step"),
        pytest.param(UNFENCED, False, id="as-triton-3.6-compiles-it"),
        pytest.param(
            UNFENCED.replace("$L__BB0_1:", f"\t{FENCE}\n$L__BB0_1:"), False,
            id="only-before-the-loop",
        ),
        pytest.param(
            UNFENCED.replace("cp.async.wait_group", f"{FENCE}\n\tcp.async.wait_group"), False,
            id="before-the-copy-is-there",
        ),
        pytest.param(
            UNFENCED.replace("cp.async.cg.shared.global", "st.shared.b32"), False,
            id="stored-and-not-fenced",
        ),
        pytest.param(
            UNFENCED.replace("cp.async.cg.shared.global", "cp.async.bulk.tensor.2d.shared::cluster")
            .replace("ret;", TAIL), True, id="bulk-copies-beside-sums",
        ),
        pytest.param(UNFENCED.replace("wgmma.mma_async", "mma"), True, id="no-wgmma"),
    ],
)  # fmt: skip
def test_wgmma_reads_nothing_that_no_fence_made_visible(ptx, fenced):
    assert proxy_fence(ptx) is fenced
