"""The functional model of the chip, tested: its layouts against CuTe's, its checks by misuse, its power by
planted faults."""

import subprocess

import numpy as np
import pytest
import torch

from chip import build
from chip.faults import FAULTS
from chip.harness import POLICIES, Case, bits, floats, make_inputs, oracle, run

# What shows a fault, by name (chip/faults.py): 3 CTAs that share 2 tiles; one tile in 4 pieces; grouped
# heads; a grid larger than the machine; a whole sequence with sink and window; 3 tiles of 6 units in a row on
# one CTA; scores that rise from tile to tile; 3 tiles on 3 CTAs, nothing cut; rows of their own, the first of
# them empty, which one CTA has first.
CASES = {
    "split": Case(130, 611, num_sms=3),
    "many": Case(70, 1409, num_sms=5),
    "grouped": Case(70, 300, heads=4, kv_heads=2),
    "one_resident": Case(130, 611, num_sms=3, resident=1),
    "whole": Case(600, 600, chunk_ends=(150, 450, 600), num_sink_tokens=100, num_window_tokens=300),
    "queue": Case(300, 900, num_sms=1),
    "queue3": Case(300, 300, num_sms=3),
    "rows": Case(130, 900, batch=4, row_kv_tokens=(0, 300, 4000, 40), num_sms=2, variant="bf16_128_rows"),
    "bias": Case(130, 611, batch=2, bias=2.0, num_sms=3, variant="bf16_128_rows"),
    "rising": Case(130, 900, num_sms=3, q_scale=4.0, k_ramp=6.0),
}


@pytest.fixture(scope="module")
def prepared():
    return {name: (inputs := make_inputs(case), *oracle(inputs)) for name, case in CASES.items()}


# ---- layouts -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cute(chip):
    """CuTe's own layouts, as its host code computes them."""
    program = build.BUILD / "cute_layouts"
    if not (build.cutlass_include() and build.cuda_include()):
        pytest.skip(
            "needs the CUTLASS headers (pip install --no-deps nvidia-cutlass==4.2.0.0) and the CUDA toolkit's"
            " headers"
        )
    tables = {}
    for line in subprocess.run([program], capture_output=True, text=True, check=True).stdout.splitlines():
        name, *numbers = line.split()
        tables.setdefault(name, []).append(tuple(map(int, numbers)))
    return tables


def test_k_major_operand_matches_cute(chip, cute):
    """Q and K: [128 / 64][64 rows][64], 128-byte swizzle, addressed by the descriptors that the kernel
    builds."""
    for mn, k, byte in cute["k_major"]:
        step, inside = k // 16, k % 16
        desc = chip.operand_desc(False, 0, 0, step // 4 * 64 * 128 + step % 4 * 32)
        assert chip.operand_address(desc, mn, inside, False) == byte, (mn, k)


def test_mn_major_operand_matches_cute(chip, cute):
    """V: 176 keys x 128, read along the head dimension."""
    for n, k, byte in cute["mn_major"]:
        desc = chip.operand_desc(True, 0, 176 * 128, k // 16 * 2048)
        assert chip.operand_address(desc, n, k % 16, True) == byte, (n, k)


def test_fragments_match_cute(chip, cute):
    assert all(chip.accumulator_coord(t, i) == (row, col) for t, i, row, col in cute["accumulator"])
    assert all(chip.a_operand_coord(t, j, h) == (row, col) for t, j, h, row, col in cute["a_operand"])


def test_accumulators_are_the_next_a_operand(chip):
    """What lets P go from softmax to the second product inside a thread."""
    for t in range(128):
        for j in range(4):
            for h in range(2):
                assert chip.accumulator_coord(t, 2 * j + h) == chip.a_operand_coord(t, j, h)


def test_swizzle_is_an_involution_inside_1024_bytes(chip):
    for span in (32, 64, 128):
        there = [chip.swizzle(a, span) for a in range(0, 2048, 16)]
        assert sorted(there) == list(range(0, 2048, 16))
        assert [chip.swizzle(a, span) for a in there] == list(range(0, 2048, 16))
        assert all(a // 1024 == b // 1024 for a, b in zip(there, range(0, 2048, 16), strict=True))


# ---- instructions that the attention kernel does not use, and the proxy fence ------------------------------


def tiles(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, 128, 1, 64, generator=generator).to(torch.bfloat16)


def probe(chip, name, x, **options):
    out = np.full((1, 64, 1, 64), 0xFFFF, np.uint16)
    chip.probe(name, bits(x), out, **options)
    return out


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize(("name", "sign"), [("store_through_shared", 1), ("operand_by_threads", -1)])
def test_proxy_fence(chip, name, sign, policy):
    """stmatrix then TMA store, and ordinary stores then wgmma: right with the fence, poison without it."""
    x = tiles()
    expected = sign * (x[0, :64, 0].double() @ x[0, 64:, 0].double().T)
    out = floats(probe(chip, name, x, policy=policy), torch.bfloat16)[0, :, 0]
    assert float((out.double() - expected).abs().max()) <= 2**-8 * float(expected.abs().max())
    assert floats(probe(chip, name, x, policy=policy, fault=True), torch.bfloat16).isnan().any()


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_release_and_acquire(chip, policy):
    """One CTA hands a warp's data to another; without the warp barrier in front of the release, lanes' data
    is missing."""
    for fault in (False, True):
        out = np.zeros((1, 64, 1, 64), np.uint16)
        chip.probe("hand_over", bits(tiles()), out, fault=fault, policy=policy)
        received = out.reshape(-1).view(np.float32)[128:256].reshape(32, 4)
        expected = np.array([[lane + 1, 3, 4, 5] for lane in range(32)], np.float32)
        assert np.array_equal(received, expected) != fault


MISUSE = {
    "over_arrival": "one arrival too many on mbarrier full",
    "unpublished_barrier": "mbarrier.*full",
    "expect_too_little": "in flight|transaction bytes|missing",
    "misaligned_tile": "misaligned for its swizzle",
    "tile_over_barrier": "TMA tile (over mbarrier|at shared|outside)",
    "exit_before_landing": "exit with TMA in flight",
    "no_wgmma_fence": "without wgmma.fence",
    "divergent_descriptor": "thread .*: wgmma operands differ",
    "accumulator_touched": "accumulator written while its wgmma was in flight",
    "exit_with_wgmma": "exit with wgmma in flight",
    "store_out_of_bounds": "store outside every global buffer",
    "misaligned_store": "misaligned 16-byte global store",
    "unordered_writers": r"two threads write out\+0 without an order",
    "barrier_two_counts": "named barrier 1 used with",
    "registers_missing": r"deadlock: 128 threads .* setmaxnreg.inc \(0 registers free\)",
    "nobody_arrives": r"deadlock: 128 threads .* mbarrier wait on other \(2 arrivals and 0 bytes missing\)",
}


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize("name", MISUSE)
def test_misuse_is_named(chip, name, policy):
    with pytest.raises(chip.Fault, match=MISUSE[name]):
        probe(chip, name, tiles(), policy=policy)


# ---- planted faults in the attention kernel ----------------------------------------------------------------


def symptom(chip, prepared, case, variant, policy, seed):
    """What a launch shows: a report of the model, a wrong result, or None."""
    inputs, expected, expected_lse = prepared[case]
    try:
        out, lse, _ = run(inputs, policy=policy, seed=seed, variant=variant)
    except (chip.Fault, AssertionError) as error:
        return str(error)
    error = float((out.double() - expected).abs().max())
    error_lse = float(torch.where(lse == expected_lse, 0.0, lse - expected_lse).abs().max())  # -inf is -inf
    # Healthy: at most 6e-3 (rounding of P and O to bf16, |O| up to 3) and 2e-6; written so that NaN fails.
    return None if error < 1.5e-2 and error_lse < 1e-4 else f"error {error:.1e}, of LSE {error_lse:.1e}"


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.name)
def test_planted_fault_is_caught(chip, prepared, fault):
    shown = {p: symptom(chip, prepared, fault.case, fault.name, p, seed=1) for p in POLICIES}
    assert any(shown.values()), f"{fault.name} went unnoticed under every policy"


def test_every_wait_fault_is_caught_by_an_adversary(chip, prepared):
    """Random latencies may hide a missing wait; the policy that delays what it waits for may not."""
    adversary = dict.fromkeys(("no_wait_k", "no_wait_v", "no_wait_q"), "tma_late") | dict.fromkeys(
        ("early_release_k", "early_release_v", "scores_read_in_flight", "probs_written_in_flight"),
        "wgmma_late",
    )
    for name, policy in adversary.items():
        for seed in range(3):
            assert symptom(chip, prepared, "split", name, policy, seed), (
                f"{name} unnoticed by {policy}, seed {seed}"
            )


def test_no_false_alarm(chip, prepared):
    for case in CASES:
        for policy in POLICIES:
            assert symptom(chip, prepared, case, CASES[case].variant, policy, seed=1) is None, (case, policy)


@pytest.mark.heavy
def test_no_false_alarm_over_200_seeds(chip, prepared):
    for seed in range(200):
        for case in ("split", "many", "one_resident"):
            policy = list(POLICIES)[seed % 3]
            assert symptom(chip, prepared, case, "bf16_128", policy, seed) is None, (case, policy, seed)
