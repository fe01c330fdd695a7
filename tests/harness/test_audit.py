"""The audit of the machine code: the built library passes, and a kernel that is not as intended does not."""

import dataclasses
import re

import pytest

from benchmarks import audit, issue_model


@pytest.fixture(scope="module")
def hopper():
    """The kernels of the built library for sm_90a."""
    try:
        found = audit.kernels(arch="sm_90a")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    if not found:
        pytest.skip("this build has no CUDA kernels for sm_90a")
    return found


@pytest.fixture(scope="module")
def attention(hopper):
    found = [k for k in hopper if "sink_window_attention_fwd_sm90" in k.name]
    if not found:
        pytest.skip("this build has no Hopper kernels (RF_HOPPER)")
    return found


def test_the_library_is_as_intended(hopper):
    assert {k.title: audit.check(k) for k in hopper if audit.check(k)} == {}
    assert audit.check_memory_bound(hopper) == []
    assert issue_model.check(hopper) == []


def test_every_variant_of_attention_is_there(attention):
    assert sorted(map(audit.short_title, attention)) == [
        f"sink_window_attention_fwd_sm90<{keys}{dtype}, D {d}>"
        for keys in ("", "rows, ")
        for dtype in ("bf16", "f16")
        for d in (128, 64)
    ]


def changed(kernel, edit):
    """A copy whose instructions went through `edit`, a function of the list of (address, text)."""
    return dataclasses.replace(kernel, instructions=edit(list(kernel.instructions)))


def hoist_second_wait(instructions):
    """What ptxas does when nothing stops it: the wait for O directly behind the wait for S."""
    waits = [i for i, (_, text) in enumerate(instructions) if text.startswith("WARPGROUP.DEPBAR")]
    first = next(i for i in waits if instructions[i][1].endswith("0x1"))
    second = next(i for i in waits if i > first)
    second_address, second_text = instructions[second]
    instructions.insert(first + 1, (instructions[first][0], second_text))
    instructions[second + 1] = (second_address, "NOP")
    return instructions


def in_loop(text, where):
    """Puts an instruction into the main loop, right behind the first one that starts with `where`."""

    def edit(instructions):
        address = next(
            a for a, t in audit.main_loop(audit.Kernel("", "", instructions)) if t.startswith(where)
        )
        at = next(i for i, (a, _) in enumerate(instructions) if a == address)
        return [
            *instructions[: at + 1],
            *([(address, text)] * (1 if text != "NOP" else 200)),
            *instructions[at + 1 :],
        ]

    return edit


def late_release(instructions):
    """Without the arrival for K: the next one, for V, stands behind the exponentials."""
    loop = audit.main_loop(audit.Kernel("", "", instructions))
    wait = next(i for i, (_, t) in enumerate(loop) if t.startswith("WARPGROUP.DEPBAR"))
    arrival = next(a for a, t in loop[wait:] if t.startswith("SYNCS.ARRIVE"))
    return [(a, "NOP" if a == arrival else t) for a, t in instructions]


def waits_in_merge(instructions):
    """Every load of the merge is used before the next is issued."""
    out = []
    for address, text in instructions:
        out.append((address, text))
        if text.startswith("LDG.E.128"):
            out.append((address, f"FADD R0, {text.split()[1]} R0"))
    return out


FINDINGS = {
    "softmax outside the overlap": (hoist_second_wait, "exponentials between the two waits"),
    "a spill": (lambda x: [*x, (0xFFFF0, "STL [R1], R4")], "1 local-memory accesses"),
    "another shape": (
        lambda x: [(a, re.sub("64x(176|64)x16", "64x128x16", t)) for a, t in x],
        "matrix products",
    ),
    "no bulk loads": (lambda x: [(a, t.replace("UTMALDG", "LDGSTS")) for a, t in x], "0 bulk tensor loads"),
    "no register hand-over": (
        lambda x: [(a, t.replace("USETMAXREG", "NOP")) for a, t in x],
        "0 register hand-overs",
    ),
    "an address in vector registers": (in_loop("R2UR UR4, R4", "HGMMA"), "1 R2UR in the main loop"),
    "a divergent branch": (in_loop("BSSY B0, 0x10", "HGMMA"), "1 BSSY in the main loop"),
    "a longer loop": (in_loop("NOP", "FMNMX"), "instructions executed per key tile"),
    "a product that starts late": (in_loop("NOP", "F2FP"), "from the wait for O to the next product"),
    "a late release": (late_release, "K handed back"),
    "a merge that waits": (waits_in_merge, "1 loads of the merge in flight"),
    "no loop": (lambda x: [(a, t.replace("BRA", "NOP")) for a, t in x], "no main loop"),
}


@pytest.mark.parametrize("name", FINDINGS)
def test_what_is_not_intended_is_found(attention, name):
    edit, finding = FINDINGS[name]
    for kernel in attention:
        assert any(finding in text for text in audit.check(changed(kernel, edit))), audit.short_title(kernel)


def test_what_forward_branches_skip_is_not_executed():
    """A loop of 11 instructions with a branch over 2 and one out of the loop; the wait for O stands 2 before
    its end, the product 1 behind its begin."""
    texts = [
        "IADD3",
        "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4]",
        "BRA 0x1000",
        "WARPGROUP.DEPBAR.LE gsb0, 0x1",
        "SYNCS.ARRIVE",
        "BRA 0x80",
        "FMUL",
        "FMUL",
        "WARPGROUP.DEPBAR.LE gsb0, 0x0",
        "F2FP",
        "BRA 0x0",
    ]
    found = audit.loop_figures([(16 * i, text) for i, text in enumerate(texts)])
    assert (found.instructions, found.executed, found.after_wait, found.before_release) == (11, 9, 3, 0)
    assert found["FMUL"] == 2 and found["R2UR"] == 0


def test_registers_and_stack_are_held(attention):
    kernel = attention[0]
    assert audit.check(dataclasses.replace(kernel, registers=kernel.registers + 8))
    assert audit.check(dataclasses.replace(kernel, stack=16))


def test_narrow_accesses_are_found(hopper):
    narrow = [changed(k, lambda x: [(a, t.replace(".128", ".64")) for a, t in x]) for k in hopper]
    assert len(audit.check_memory_bound(narrow)) == len(audit._MEMORY_BOUND)


def test_a_library_without_kernels_is_no_success(tmp_path, capsys):
    empty = tmp_path / "none.so"
    empty.write_bytes(b"")
    assert audit.main([str(empty)]) == 2
    assert "benchmarks.audit" in capsys.readouterr().err


@pytest.fixture(scope="module")
def usual(hopper):
    """The kernels of the usual calls of memory-bound ops, by what is intended of them."""
    return [(u, k) for u in issue_model.USUAL for k in hopper if u.kernel in k.name]


def test_every_usual_call_has_its_kernel(usual):
    assert len(usual) == len(issue_model.USUAL)


def test_longer_code_is_found(usual):
    """In the loop all of it counts, before it a share."""
    for intended, kernel in usual:
        code, before = kernel.instructions, issue_model.issue(kernel, intended).instructions
        padding = [(-1 - n, "NOP") for n in range(900)]
        longer = dataclasses.replace(kernel, instructions=[code[0], *padding, *code[1:]])
        assert issue_model.issue(longer, intended).instructions == pytest.approx(
            before + 900 / intended.turns
        )
        loop = [x for one in code for x in ([one, *padding] if one[1].startswith("BAR") else [one])]
        longer = dataclasses.replace(kernel, instructions=loop)
        assert any("instructions, intended" in x for x in issue_model.check([longer])), intended.label


PADDING = [(-1 - n, "NOP") for n in range(900)]


def padded_early(instructions):
    return [instructions[0], *PADDING, *instructions[1:]]


def padded_shuffles(instructions):
    return [x for i in instructions for x in ([i, *PADDING] if i[1].startswith("SHFL") else [i])]


def narrow_loads(instructions):
    return [(a, text.replace("LDG.E.128", "LDG.E.64")) for a, text in instructions]


@pytest.mark.parametrize("label", [passes.label for passes in issue_model.PASSES])
def test_longer_code_of_two_passes_is_found(hopper, label):
    """In a loop all of it counts, before it what is done once."""
    intended = next(p for p in issue_model.PASSES if p.label == label)
    kernels = [k for k in hopper if any(name in k.name for name, *_ in intended.loops)]
    assert len(kernels) == len({name for name, *_ in intended.loops})
    before = issue_model.issue_of_passes(kernels, intended)
    after = issue_model.issue_of_passes([changed(k, padded_early) for k in kernels], intended)
    assert after.instructions == before.instructions
    assert after.once == pytest.approx(before.once + 900 * len(kernels))
    assert after.all_over_bytes > before.all_over_bytes > before.issue_over_bytes == after.issue_over_bytes

    for edit, finding in (
        (padded_early, "instructions besides, intended"),
        (padded_shuffles, "instructions, intended"),
        (waits_in_merge, "1 loads in flight"),
        (narrow_loads, "no loop with 8 loads"),
    ):
        findings = issue_model.check([changed(k, edit) for k in kernels])
        assert any(x.startswith(f"{label}:") and finding in x for x in findings), finding


def test_a_loop_counts_with_its_turns():
    """Four instructions into a loop of seven, of which three are a loop of sums, and one out of it."""
    code = ["MOV R1, RZ", "MOV R2, RZ", "MOV R3, RZ", "MOV R4, RZ"]
    code += ["LDG.E.128 R4, [R2.64]", *["LDS R8, [R1]"] * 4, "BRA 0x50", "STG.E.128 [R2.64], R4", "BRA 0x40"]
    code += ["EXIT"]
    kernel = audit.Kernel("k", "sm_90a", [(0x10 * i, t) for i, t in enumerate(code)])
    kernel.predicated = {0x90, 0xB0}
    call = issue_model.Usual("k", "k", 1, 1, turns=2, most=99, in_flight=1, sums=(3,))
    # the loop's 8, twice more the 5 of the sums, half of 5 before (its first instruction too) and 1 behind
    assert issue_model.issue(kernel, call).instructions == 8 + 2 * 5 + (5 + 1) / 2
    assert issue_model.issue(kernel, dataclasses.replace(call, sums=())).instructions == 8 + 3
    assert issue_model.issue(kernel, dataclasses.replace(call, loads=2)) is None


def test_the_longest_path_goes_around_a_loop_once():
    """Two ways around a block, a loop of three instructions, an exit under a predicate."""
    code = [
        "MOV R1, RZ",
        "BRA 0x40",
        "LDG.E.128 R4, [R2.64]",
        "NOP",
        "IADD3 R1, R1, 0x1, RZ",
        "NOP",
        "BRA 0x40",
    ]
    code += ["EXIT", "STG.E.128 [R2.64], R4", "EXIT"]
    kernel = audit.Kernel("k", "sm_90a", [(0x10 * i, t) for i, t in enumerate(code)])
    kernel.predicated = {0x10, 0x60, 0x70}
    assert issue_model.longest_path(kernel, 1, 1) == code[:7] + code[7:]
    assert issue_model.longest_path(kernel, 0, 1) == code[:2] + code[4:]
    assert len(issue_model.longest_path(kernel, 0, 0)) == 6
    assert issue_model.longest_path(kernel, 2, 1) is None


def test_loads_that_are_waited_for_one_by_one_are_counted_so():
    loads = ["LDG.E.128 R4, [R2.64]", "LDG.E.128 R8, [R2.64]"]
    assert issue_model.loads_in_flight([*loads, "FADD R0, R4, R8"]) == 2
    assert issue_model.loads_in_flight([loads[0], "FADD R0, R5, R0", loads[1]]) == 1
