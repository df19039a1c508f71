"""Loads, stores, atomics, asynchronous copies, matrix loads, and what they cost."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from tools.ptx_emulator import Memory, Module

from tests.tools.ptx_emulator.harness import DEVICES, program, run

INDEX = "mul.wide.u32 %wide, %thread, {size};\nadd.u64 %rd{pointer}, %rd{pointer}, %wide;\n"


def indexed(pointer: int, size: int) -> str:
    return INDEX.format(pointer=pointer, size=size)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("vector", "count", "bits"), (("", 1, 32), (".v2", 2, 32), (".v4", 4, 32), (".v2", 2, 64)))
def test_vector_access(vector: str, count: int, bits: int, device: str) -> None:
    prefix = "%r" if bits == 32 else "%rd"
    registers = [f"{prefix}{20 + i}" for i in range(count)]
    group = "{" + ", ".join(registers) + "}" if vector else registers[0]
    reverse = "{" + ", ".join(registers[::-1]) + "}" if vector else registers[0]
    size = count * bits // 8
    body = (
        indexed(0, size) + indexed(1, size) + ".shared .align 16 .b8 staging[1024];\n"
        f"mov.u32 %r1, staging;\nmad.lo.u32 %r2, %thread, {size}, %r1;\n"
        f"ld.global.nc.L1::no_allocate.L2::128B{vector}.b{bits} {group}, [%rd1];\n"
        f"st.shared{vector}.b{bits} [%r2], {group};\nld.shared{vector}.b{bits} {group}, [%r2];\n"
        f"st.global{vector}.b{bits} [%rd0], {reverse};"
    )
    source = np.random.default_rng(0).integers(0, 2**32, (64, size // 4), dtype=np.uint32)
    out = np.zeros_like(source)
    run(program(body, 2), [out, source], 64, device=device)
    words = source.view(f"u{bits // 8}").reshape(64, count)
    np.testing.assert_array_equal(out.view(f"u{bits // 8}").reshape(64, count), words[:, ::-1])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("type_name", ("u8", "s8", "u16", "s16"))
def test_narrow_loads_extend_to_the_register(type_name: str, device: str) -> None:
    size = int(type_name[1:]) // 8
    source = np.arange(-32, 32).astype({"u8": "u1", "s8": "i1", "u16": "u2", "s16": "i2"}[type_name])
    out = np.zeros(64, dtype=np.int32)
    wide = np.zeros(64, dtype=np.int64)
    body = (
        indexed(2, size) + indexed(0, 4) + indexed(1, 8) + f"ld.global.{type_name} %r1, [%rd2];\n"
        f"st.global.u32 [%rd0], %r1;\nld.global.{type_name} %rd20, [%rd2];\nst.global.u64 [%rd1], %rd20;"
    )
    run(program(body, 3), [out, wide, source], 64, device=device)
    assert out.tolist() == source.astype(np.int32).tolist()
    assert wide.tolist() == source.astype(np.int64).tolist()


@pytest.mark.parametrize("device", DEVICES)
def test_generic_addresses_reach_every_space(device: str) -> None:
    """Shared, local and global memory through one generic pointer; offsets and negative offsets."""
    body = (
        indexed(0, 12) + ".shared .align 8 .b8 words[256];\n.local .align 8 .b8 depot[16];\n"
        "mov.u64 %rd20, words;\ncvta.shared.u64 %rd21, %rd20;\nmul.wide.u32 %wide, %thread, 4;\n"
        "add.u64 %rd21, %rd21, %wide;\nadd.u32 %r1, %thread, 1000;\nst.u32 [%rd21], %r1;\nld.shared.u32 %r2, [%rd21];\n"
    )
    # A generic address is no shared address: the load above must be refused by the emulator, so convert first.
    body = body.replace(
        "ld.shared.u32 %r2, [%rd21];\n", "cvta.to.shared.u64 %rd22, %rd21;\nld.shared.u32 %r2, [%rd22];\n"
    )
    body += (
        "mov.u64 %rd23, depot;\ncvta.local.u64 %rd24, %rd23;\nadd.u32 %r3, %thread, 2000;\nst.u32 [%rd24+4], %r3;\n"
        "ld.local.u32 %r4, [depot+4];\nadd.u64 %rd25, %rd24, 8;\nld.u32 %r5, [%rd25+-4];\n"
        "cvta.global.u64 %rd26, %rd0;\nst.u32 [%rd26], %r2;\nst.global.u32 [%rd0+4], %r4;\nst.global.u32 [%rd0+8], %r5;"
    )
    out = np.zeros((64, 3), dtype=np.uint32)
    run(program(body, 1), [out], 64, device=device)
    lanes = np.arange(64)
    np.testing.assert_array_equal(out, np.stack([lanes + 1000, lanes + 2000, lanes + 2000], axis=1))


@pytest.mark.parametrize("device", DEVICES)
def test_parameters_by_value_are_addressable(device: str) -> None:
    """A struct parameter, read at a thread-dependent index; constants and initialised globals of the module."""
    text = program(
        indexed(0, 4)
        + """
        mov.b64 %rd20, p1;
        and.b32 %r1, %thread, 1;
        mul.wide.u32 %rd21, %r1, 4;
        add.s64 %rd22, %rd20, %rd21;
        ld.param.u32 %r2, [%rd22];
        mul.wide.u32 %rd23, %r1, 2;
        mov.u64 %rd24, table;
        add.s64 %rd25, %rd24, %rd23;
        ld.const.u16 %r3, [%rd25+2];
        ld.global.u32 %r4, [cell+4];
        add.u32 %r2, %r2, %r3;
        add.u32 %r2, %r2, %r4;
        st.global.u32 [%rd0], %r2;
        """,
        2,
    ).replace(
        ".visible",
        ".const .align 2 .b16 table[3] = {7, 500, 600};\n.global .align 4 .u32 cell[2] = {1, 90000};\n.visible",
        1,
    )
    out = np.zeros(32, dtype=np.uint32)
    blob = np.zeros(8, dtype=np.uint8)
    if device == "emulated":
        memory = Memory()
        address = memory.register(out, "out", writable=True)
        Module.from_ptx(text).launch("program", 1, 32, 0, [address, 20 | 30 << 32], memory)
        assert out.tolist() == [20 + 500 + 90000, 30 + 600 + 90000] * 16
    else:
        run(text, [out, blob], 32, device=device)
        low = out.astype(np.int64) - np.array([500 + 90000, 600 + 90000] * 16)
        assert (low[0::2] == low[0]).all() and (low[1::2] == low[1]).all()


ATOMICS: dict[str, Callable[[np.ndarray], int]] = {
    "add.u32": lambda x: int(x.sum(dtype=np.uint32)), "max.u32": lambda x: int(x.max()),
    "min.u32": lambda x: 0, "or.b32": lambda x: int(np.bitwise_or.reduce(x)),
    "xor.b32": lambda x: int(np.bitwise_xor.reduce(x)), "and.b32": lambda x: 0,
}  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("operation", ATOMICS)
def test_atomics(operation: str, device: str) -> None:
    values = np.random.default_rng(1).integers(0, 2**32, 256, dtype=np.uint32)
    total = np.zeros(1, dtype=np.uint32)
    body = indexed(1, 4) + f"ld.global.u32 %r1, [%rd1];\natom.global.{operation} %r2, [%rd0], %r1;"
    run(program(body, 2), [total, values], 256, device=device)
    assert int(total[0]) == ATOMICS[operation](values)
    reduced = np.zeros(1, dtype=np.uint32)
    body = indexed(1, 4) + f"ld.global.u32 %r1, [%rd1];\nred.relaxed.gpu.global.{operation} [%rd0], %r1;"
    run(program(body, 2), [reduced, values], 256, device=device)
    assert int(reduced[0]) == int(total[0])


@pytest.mark.parametrize("device", DEVICES)
def test_atomic_results_are_a_permutation(device: str) -> None:
    """Every thread draws its own ticket; float additions of exact values give the exact sum."""
    counter, tickets, total = np.zeros(1, np.uint32), np.zeros(128, np.uint32), np.zeros(1, np.float32)
    body = (
        indexed(1, 4) + "atom.global.add.u32 %r1, [%rd0], 1;\nst.global.u32 [%rd1], %r1;\n"
        "cvt.rn.f32.u32 %f1, %r1;\nred.global.add.f32 [%rd2], %f1;"
    )
    run(program(body, 3), [counter, tickets, total], 128, device=device)
    assert sorted(tickets.tolist()) == list(range(128))
    assert total[0] == 127 * 64


@pytest.mark.parametrize("device", DEVICES)
def test_compare_and_swap_makes_a_lock(device: str) -> None:
    """All threads add to a float by compare-and-swap, in shared and in global memory."""
    loop = """
    LOOP{n}:
    {load} %r1, [{address}];
    mov.b32 %f1, %r1;
    add.f32 %f2, %f1, 0f3F800000;
    mov.b32 %r2, %f2;
    atom.{space}.cas.b32 %r3, [{address}], %r1, %r2;
    setp.ne.u32 %p1, %r3, %r1;
    @%p1 bra LOOP{n};
    """
    body = (
        ".shared .align 4 .f32 cell;\nmov.u32 %r10, cell;\nmov.u32 %r11, 0;\nsetp.eq.u32 %p2, %thread, 0;\n"
        "@%p2 st.shared.u32 [%r10], %r11;\nbar.sync 0;\n"
        + loop.format(n=1, load="ld.volatile.shared.u32", address="%r10", space="shared")
        + loop.format(n=2, load="ld.volatile.global.u32", address="%rd0", space="global")
        + "bar.sync 0;\nld.shared.f32 %f3, [%r10];\n@%p2 st.global.f32 [%rd0+4], %f3;"
    )
    out = np.zeros(2, dtype=np.float32)
    run(program(body, 1), [out], 96, device=device)
    assert out.tolist() == [96.0, 96.0]


def copy_program(size: int, source_size: str, operator: str) -> str:
    return program(
        indexed(0, size) + indexed(1, size) + ".shared .align 16 .b8 tile[1024];\n"
        f"mov.u32 %r1, tile;\nmad.lo.u32 %r2, %thread, {size}, %r1;\n"
        f"and.b32 %r3, %thread, 15;\nmin.u32 %r3, %r3, {size};\n"
        f"cp.async.{operator}.shared.global [%r2], [%rd1], {size}{source_size};\n"
        "cp.async.commit_group;\ncp.async.wait_group 0;\n"
        f"add.u32 %r4, %r1, {size - 4};\nmad.lo.u32 %r4, %thread, {size}, %r4;\n"
        + "".join(f"ld.shared.u32 %r10, [%r2+{at}];\nst.global.u32 [%rd0+{at}], %r10;\n" for at in range(0, size, 4)),
        2,
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("size", "operator"), ((4, "ca"), (8, "ca"), (16, "ca"), (16, "cg")))
def test_copy_async_fills_with_zeros(size: int, operator: str, device: str) -> None:
    source = np.random.default_rng(2).integers(1, 256, (64, size), dtype=np.uint8)
    for source_size, kept in (("", [size] * 64), (", %r3", [min(i & 15, size) for i in range(64)])):
        out = np.zeros_like(source)
        run(copy_program(size, source_size, operator), [out, source], 64, device=device)
        expected = np.where(np.arange(size) < np.array(kept)[:, None], source, 0)
        np.testing.assert_array_equal(out, expected)


def test_copy_async_with_no_source_bytes_reads_nothing() -> None:
    """A source size of 0 may point anywhere aligned: this is how tiles beyond the end are filled."""
    text = copy_program(16, ", 0", "cg").replace("cp.async.cg", "mov.u64 %rd1, 4096;\ncp.async.cg")
    memory = Memory()
    out = np.ones((32, 16), dtype=np.uint8)
    addresses = [memory.register(out, "out", writable=True), 0]
    Module.from_ptx(text).launch("program", 1, 32, 0, addresses, memory)
    assert not out.any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("transposed", (False, True))
@pytest.mark.parametrize("n_matrices", (1, 2, 4))
def test_ldmatrix(n_matrices: int, transposed: bool, device: str) -> None:
    registers = [f"%r{20 + i}" for i in range(n_matrices)]
    trans = ".trans" if transposed else ""
    body = (
        indexed(1, 16) + indexed(0, 4 * n_matrices) + ".shared .align 16 .b8 tile[512];\nmov.u32 %r1, tile;\n"
        "mad.lo.u32 %r2, %thread, 16, %r1;\nld.global.v4.u32 {%r10, %r11, %r12, %r13}, [%rd1];\n"
        "st.shared.v4.u32 [%r2], {%r10, %r11, %r12, %r13};\nbar.sync 0;\n"
        # Rows come from scattered places: lane l addresses row 5·l mod 32.
        "mul.lo.u32 %r3, %thread, 5;\nand.b32 %r3, %r3, 31;\nmad.lo.u32 %r2, %r3, 16, %r1;\n"
        f"ldmatrix.sync.aligned.m8n8.x{n_matrices}{trans}.shared.b16 {{{', '.join(registers)}}}, [%r2];\n"
        + "".join(f"st.global.u32 [%rd0+{4 * i}], {register};\n" for i, register in enumerate(registers))
    )
    source = np.arange(256, dtype=np.uint16).reshape(32, 8)
    out = np.zeros((32, n_matrices), dtype=np.uint32)
    run(program(body, 2), [out, source], 32, device=device)
    halves = out.view(np.uint16).reshape(32, n_matrices, 2)
    rows = source[np.arange(32) * 5 % 32].reshape(4, 8, 8)
    for matrix in range(n_matrices):
        content = rows[matrix].T if transposed else rows[matrix]
        np.testing.assert_array_equal(halves[:, matrix], content.reshape(32, 2))


@pytest.mark.parametrize("device", DEVICES)
def test_movmatrix_transposes(device: str) -> None:
    body = (
        indexed(0, 4)
        + indexed(1, 4)
        + "ld.global.u32 %r1, [%rd1];\nmovmatrix.sync.aligned.m8n8.trans.b16 %r2, %r1;\nst.global.u32 [%rd0], %r2;"
    )
    source = np.arange(64, dtype=np.uint16).reshape(8, 8)
    out = np.zeros_like(source)
    run(program(body, 2), [out, source], 32, device=device)
    np.testing.assert_array_equal(out, source.T)


def count_shared_load(stride: int, size: int) -> tuple[int, int]:
    """Wavefronts and conflicts of one warp's load of `size` bytes per lane at a byte stride."""
    vector = {4: "u32 %r10", 8: "v2.u32 {%r10, %r11}", 16: "v4.u32 {%r10, %r11, %r12, %r13}"}[size]
    body = (
        ".shared .align 16 .b8 tile[8192];\nmov.u32 %r1, tile;\n"
        f"mad.lo.u32 %r2, %thread, {stride}, %r1;\nmov.u32 %r10, 0;\n"
        "mov.u32 %r11, 0;\nmov.u32 %r12, 0;\nmov.u32 %r13, 0;\n"
        f"st.shared.{vector.split()[0]} [%r2], {vector.split(' ', 1)[1]};\nld.shared.{vector}, [%r2];"
    )
    counters = Module.from_ptx(program(body, 0)).launch("program", 1, 32, 0, [], Memory())
    (name,) = [key for key in counters.shared_memory() if key.startswith("ld.")]
    entry = counters.shared_memory()[name]
    assert entry["requests"] == 1
    return entry["wavefronts"], entry["conflicts"]


@pytest.mark.parametrize(
    ("stride", "size", "expected"),
    (
        (4, 4, (1, 0)),  # one word per bank
        (8, 4, (2, 1)),  # every other bank, twice
        (128, 4, (32, 31)),  # one bank
        (132, 4, (1, 0)),  # padded rows
        (8, 8, (2, 0)),  # 256 bytes take two wavefronts
        (16, 16, (4, 0)),  # 512 bytes take four
        (128, 16, (32, 28)),  # each quarter in the same four banks
        (144, 16, (4, 0)),
    ),
)
def test_bank_conflicts(stride: int, size: int, expected: tuple[int, int]) -> None:
    assert count_shared_load(stride, size) == expected


@pytest.mark.parametrize(("stride", "sectors"), ((4, 4), (8, 8), (32, 32), (1, 1), (128, 32)))
def test_global_sectors(stride: int, sectors: int) -> None:
    memory = Memory()
    address = memory.register(np.zeros(8192, dtype=np.uint8), "x")
    kind = "u8" if stride == 1 else "u32"
    body = f"mul.wide.u32 %wide, %thread, {stride};\nadd.u64 %rd0, %rd0, %wide;\nld.global.{kind} %r1, [%rd0];"
    counters = Module.from_ptx(program(body, 1)).launch("program", 1, 32, 0, [address], memory)
    assert counters.global_memory()[f"ld.global.{kind}"] == {"requests": 1, "sectors": sectors}


def test_counters_add_up() -> None:
    body = "mov.u32 %r1, 0;\nLOOP:\nadd.u32 %r1, %r1, 1;\nsetp.le.u32 %p1, %r1, %thread;\n@%p1 bra LOOP;"
    counters = Module.from_ptx(program(body, 0)).launch("program", 3, 32, 0, [], Memory())
    additions = next(count for count in counters.instructions() if count.operation == "add.u32")
    # The loop runs as long as its longest lane; lane i takes part i + 1 times.
    assert additions.warps == 3 * 32
    assert additions.threads == 3 * sum(range(1, 33))
    assert counters.totals()["warps"] == sum(counters.by_operation().values())
    assert counters.by_class()["add"] == 96


def test_strided_views_are_used_in_place() -> None:
    packed = np.arange(96, dtype=np.float32).reshape(32, 3)
    memory = Memory()
    out = np.zeros(32, dtype=np.float32)
    addresses = [memory.register(out, "out", writable=True), memory.register(packed[:, 1], "middle")]
    body = indexed(0, 4) + indexed(1, 12) + "ld.global.f32 %f1, [%rd1];\nst.global.f32 [%rd0], %f1;"
    Module.from_ptx(program(body, 2)).launch("program", 1, 32, 0, addresses, memory)
    np.testing.assert_array_equal(out, packed[:, 1])


def test_unwritten_elements_of_a_poisoned_output_are_found() -> None:
    out = np.zeros(64, dtype=np.float32)
    memory = Memory()
    address = memory.register(out, "out", writable=True, poisoned=True)
    body = indexed(0, 4) + "setp.lt.u32 %p1, %thread, 40;\nmov.f32 %f1, 0f3F800000;\n@%p1 st.global.f32 [%rd0], %f1;"
    Module.from_ptx(program(body, 1)).launch("program", 1, 64, 0, [address], memory)
    np.testing.assert_array_equal(memory.unwritten("out"), np.arange(64) >= 40)
    assert (out[:40] == 1).all() and np.isnan(out[40:]).all()
