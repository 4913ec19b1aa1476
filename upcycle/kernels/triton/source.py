"""The Triton kernels of the experts; `upcycle.kernels.triton.launch` launches them.

Importing this file needs Triton. Three steps, none of which waits for the host:

1. `count_slots`, `place_slots`: sort the slots (a token and one of its experts) by expert, in
   blocks that belong to one expert each. Nothing is padded in memory but a list of slot numbers.
2. `grouped_gemm`, twice: rows gathered by slot number, times the weights of the block's expert;
   the activation and the gate, or the router weight, are applied before the result is stored.
3. `sum_slots`: the K results of a token, always in the same order.

Shape suffixes: T tokens, K chosen experts, S = T * K slots, E experts, B blocks, M rows of a
block, R = B * M, N columns of a result, D depth of a product.
"""

import triton
import triton.language as tl


@triton.jit
def count_slots(index_S, weight_S, count_E, slots, STEP: tl.constexpr):
    """How many slots with a weight each expert has; one program for each expert."""
    expert = tl.program_id(0)
    step = tl.arange(0, STEP)
    total = tl.zeros((STEP,), dtype=tl.int32)
    for start in range(0, slots, STEP):
        slot = start + step
        inside = slot < slots
        weight = tl.load(weight_S + slot, mask=inside, other=0.0)
        here = (tl.load(index_S + slot, mask=inside, other=-1) == expert) & (weight != 0)
        total += here.to(tl.int32)
    tl.store(count_E + expert, tl.sum(total))


@triton.jit
def place_slots(
    index_S,
    weight_S,
    count_E,
    slot_R,
    expert_B,
    blocks,
    slots,
    experts,
    POWER: tl.constexpr,
    STEP: tl.constexpr,
    BM: tl.constexpr,
):
    """Fill `slot_R` (-1 where a block has no row), `expert_B` and the number of blocks."""
    expert = tl.program_id(0)
    every = tl.arange(0, POWER)
    count = tl.load(count_E + every, mask=every < experts, other=0)
    before = tl.sum(tl.where(every < expert, (count + BM - 1) // BM, 0))
    mine = tl.load(count_E + expert)
    many = (mine + BM - 1) // BM
    if expert == experts - 1:
        tl.store(blocks, before + many)
    step = tl.arange(0, STEP)
    for start in range(0, many, STEP):
        tl.store(expert_B + before + start + step, expert, mask=start + step < many)
    rest = mine + tl.arange(0, BM)
    tl.store(slot_R + before * BM + rest, -1, mask=rest < many * BM)
    done = before * BM
    for start in range(0, slots, STEP):
        slot = start + step
        inside = slot < slots
        weight = tl.load(weight_S + slot, mask=inside, other=0.0)
        here = (tl.load(index_S + slot, mask=inside, other=-1) == expert) & (weight != 0)
        here = here.to(tl.int32)
        tl.store(slot_R + done + tl.cumsum(here, 0) - 1, slot, mask=here != 0)
        done += tl.sum(here)


@triton.jit
def activate(z, ACT: tl.constexpr):
    """The activation of that name, in float32."""
    if ACT == "silu":
        z = z * tl.sigmoid(z)
    elif ACT == "gelu":
        z = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    elif ACT == "gelu_tanh":  # (1 + tanh(u)) / 2 is sigmoid(2 u)
        z = z * tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
    elif ACT == "relu":
        z = tl.maximum(z, 0.0)
    elif ACT == "relu2":
        z = tl.maximum(z, 0.0) * tl.maximum(z, 0.0)
    return z


@triton.jit
def grouped_gemm(
    a_XD,
    weight_END,
    bias_EN,
    c_SN,
    index_S,
    router_S,
    slot_R,
    expert_B,
    blocks,
    slots,
    experts,
    columns,
    depth,
    stride_e,
    stride_n,
    stride_d,
    PER_ROW: tl.constexpr,
    ACT: tl.constexpr,
    GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    PLACED: tl.constexpr,
    EVEN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One tile [M, N] of ``act(a @ W_e^T + b_e)``, gated or times the router weight.

    Slot s reads row ``s // PER_ROW`` of `a` and writes row s of `c`. Gated weights have the rows
    of the gate first, then `columns` more. Without PLACED every slot is a block of its own.
    """
    # Neighbouring programs share weights: GROUP blocks take the same columns one after the other.
    tiles = tl.cdiv(columns, BN)
    many = tl.load(blocks) if PLACED else slots
    place = tl.program_id(0)
    if place >= many * tiles:
        return
    first = place // (GROUP * tiles) * GROUP
    group = tl.minimum(many - first, GROUP)
    inner = place % (GROUP * tiles)
    block = first + inner % group
    tile = inner // group
    row = tl.arange(0, BM)
    if PLACED:
        slot = tl.load(slot_R + block * BM + row)
        expert = tl.load(expert_B + block)
        valid = slot >= 0
    else:
        slot = block + row
        expert = tl.load(index_S + block).to(tl.int32)
        if (expert >= experts) | (tl.load(router_S + block) == 0):
            return
        valid = row == 0
    slot = tl.where(valid, slot, 0).to(tl.int64)
    column = tile * BN + tl.arange(0, BN)
    # Columns beyond the end read others again and are not stored.
    source = (column % columns).to(tl.int64)
    d = tl.arange(0, BD)
    a = a_XD + (slot // PER_ROW)[:, None] * depth + d[None, :]
    w = weight_END + expert.to(tl.int64) * stride_e
    w += source[:, None] * stride_n + d[None, :] * stride_d
    z = tl.zeros((BM, BN), dtype=tl.float32)
    up = tl.zeros((BM, BN), dtype=tl.float32)
    for start in range(0, depth, BD):
        if EVEN:
            a_MD = tl.load(a, mask=valid[:, None], other=0.0)
            w_ND = tl.load(w)
        else:
            left = d[None, :] < depth - start
            a_MD = tl.load(a, mask=valid[:, None] & left, other=0.0)
            w_ND = tl.load(w, mask=left, other=0.0)
        # Of float32 no bits are dropped ("ieee"), as in torch by default.
        z = tl.dot(a_MD, tl.trans(w_ND), z, input_precision="ieee")
        if GATED:
            v = w + columns * stride_n
            v_ND = tl.load(v) if EVEN else tl.load(v, mask=left, other=0.0)
            up = tl.dot(a_MD, tl.trans(v_ND), up, input_precision="ieee")
        a += BD
        w += BD * stride_d
    if HAS_BIAS:
        bias = bias_EN + expert.to(tl.int64) * columns * (2 if GATED else 1) + source
        z += tl.load(bias).to(tl.float32)[None, :]
        if GATED:
            up += tl.load(bias + columns).to(tl.float32)[None, :]
    z = activate(z, ACT)
    if GATED:
        z = z * up
    if WEIGHTED:
        z = z * tl.load(router_S + slot, mask=valid, other=0.0).to(tl.float32)[:, None]
    mask = valid[:, None] & (column < columns)[None, :]
    out = c_SN + slot[:, None] * columns + column[None, :]
    tl.store(out, z.to(c_SN.dtype.element_ty), mask=mask)


@triton.jit
def sum_slots(c_SN, index_S, router_S, y_TN, experts, columns, K: tl.constexpr, BN: tl.constexpr):
    """The sum of the K rows of a token; rows without a weight were never written."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BN + tl.arange(0, BN)
    total = tl.zeros((BN,), dtype=tl.float32)
    for k in range(K):
        slot = token * K + k
        there = (tl.load(index_S + slot) < experts) & (tl.load(router_S + slot) != 0)
        inside = column < tl.where(there, columns, 0)
        row = tl.load(c_SN + slot * columns + column, mask=inside, other=0.0)
        total += row.to(tl.float32)
    tl.store(
        y_TN + token * columns + column, total.to(y_TN.dtype.element_ty), mask=column < columns
    )
