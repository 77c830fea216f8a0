"""What machine code shows: shared memory, stack, width of accesses and tensor cores, as the forms say."""

import pytest

from benchmarks import compiled_form as forms
from benchmarks.compiled_calls import Form


@pytest.mark.parametrize("stem", forms.stems())
def test_kernels_have_their_forms(stem, compiled_form):
    rows, faults = compiled_form(stem)
    assert not faults, "\n".join(faults)
    # bounds for a kernel that no call launches hold nothing
    assert set(forms.forms_of(stem)) <= {row["kernel"] for row in rows}


def test_faults_name_kernel_bound_and_value():
    row = forms.Compiled(
        op="op", kernel="_kernel", call="r=16", dtypes="bf16/fp32", target=90, settings="BLOCK=16", warps=4, stages=3,
        shared=200_000, registers=255, stack=8, loads={"2": 4, "8": 1}, stores={"16": 1}, products={"mma": 3},
    )  # fmt: skip
    form = Form(load=16, store=16, products={80: "mma", 90: "wgmma"})
    where = "op _kernel r=16 bf16/fp32 sm_90 BLOCK=16: "
    assert row.faults({"_kernel": form}) == [
        where + "shared is at most 102400 (got 200000)",
        where + "stack is at most 0 (got 8)",
        where + "loads reach 16 bytes (got 8)",
        where + "wgmma is among the instructions (got {'mma': 3})",
    ]
    assert row.faults({"_other": form}) == []
    assert row.faults({"_kernel": (Form(only="r=64"), Form(shared=None, stack=None))}) == []


def test_counts_of_instructions():
    ptx = """
    @%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
    ld.global.L1::evict_last.v2.b64 {%rd2, %rd3}, [%rd1];
    ld.global.b16 %rs1, [%rd1];
    cp.async.cg.shared.global [ %r5 + 0 ], [ %rd4 + 0 ], 0x10, %r6;
    cp.async.ca.shared.global [ %r5 + 0 ], [ %rd4 + 0 ], 0x8, %r6;
    st.global.v2.b32 [ %rd1 + 0 ], { %r1, %r2 };
    mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 { %f1 }, { %r1 }, { %r2 }, { %f1 };
    wgmma.mma_async.sync.aligned.m64n16k8.f32.tf32.tf32 {%f1}, %rd1, %rd2, 1, 1, 1;
    """
    assert forms._widths(ptx, "ld") == {"2": 1, "8": 1, "16": 3}
    assert forms._widths(ptx, "st") == {"8": 1}
    assert forms._products(ptx) == {"mma": 1, "wgmma": 1}
