"""The element-wise benchmark's arithmetic, table and command line, and the choice of block sizes. Times need a GPU."""

from __future__ import annotations

import pytest
import torch
from qoqlab_kernels import bench, elementwise, fused
from qoqlab_kernels import bench_elementwise as benchmark
from qoqlab_kernels.layout import tile_activations

from qoqlab import affine

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens where there is no GPU")


def point(op: str = "rms_norm_s8", m: int = 16, k: int = 4096, us: float = 4.0, bound: float = 3.0) -> dict:
    common = {"op": op, "precision": "fp16", "k": k, "m": m, "us": us, "bound_us": bound}
    return {**common, "share": bound / us, "copy_us": 3.5, "tb_per_s": 1.0, "peers": {"torch_eager": 40.0}}


def test_bytes_by_hand() -> None:
    assert benchmark.moved("quantize", 3, 4096) == 3 * 4096 * (2 + 1) + 3 * 8
    assert benchmark.moved("rms_norm_s8", 3, 4096) == 3 * 4096 * (2 + 1) + 2 * 4096 + 3 * 8
    assert benchmark.moved("add_rms_norm_s8", 3, 4096) == 3 * 4096 * (2 + 2 + 2 + 1) + 2 * 4096 + 3 * 8
    assert benchmark.moved("silu_mul_s8", 3, 14336) == 3 * 14336 * (2 + 2 + 1) + 3 * 8
    # 32 + 8 + 8 heads of 128 read, 32 + 8 written, 16 x 128 codes in half a byte, 16 scales and zeros
    assert benchmark.moved("rope_kv4_append", 3, 6144) == 3 * (48 * 256 + 40 * 256 + 16 * 64 + 16 * 4)
    # 32 heads seen, 32 queries, 8 keys, 8 values read, 32 log-sum-exps; 4096 codes, sum and scale written
    assert benchmark.moved("attend_own_s8", 3, 4096) == 3 * (80 * 256 + 32 * 4 + 4096 + 8)


def test_a_result_is_the_same_only_if_order_and_padding_are() -> None:
    a = affine.quantize_per_token_s8(torch.randn(3, 160))
    got = tile_activations(a.codes, a.scales)
    assert benchmark.same(got, a) and benchmark.same((got, a.codes), (a, a.codes))
    got.tiles[-1, -1, -1] = 1  # padding
    assert not benchmark.same(got, a)


@pytest.mark.parametrize(
    ("row", "met"),
    [
        (point(us=4.9), "met"),
        (point(us=5.0), "missed"),
        (point(m=1024, us=4.0, bound=2.8), "met"),
        (point(m=1024, us=4.0, bound=2.7), "missed"),
        (point(m=64), ""),
        (point("silu_mul_s8", k=14336), "met"),
    ],
)
def test_the_aims(row: dict, met: str) -> None:
    assert benchmark.verdict(row) == met


def test_the_table() -> None:
    text = benchmark.point_table([point()])
    assert text.splitlines()[0].split() == ["operation", "dtype", "MxK", "us", "bound", "share", "copy", "eager"]
    assert text.splitlines()[1].split() == ["rms_norm_s8", "fp16", "16x4096", "4.00", "3.00", "0.75", "3.50", "40.0", "met"]


def test_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    names, batches, known = benchmark.parse(["--ops", "quantize,silu_mul_s8", "--m", "1,16", "--dtype", "bf16"])
    assert (names, batches, known.dtype) == (("quantize", "silu_mul_s8"), (1, 16), "bf16")
    for wrong, message in (
        (["--ops", "softmax"], "--ops: 'softmax' is not one of"),
        (["--m", "0"], "--m: expected positive"),
    ):
        with pytest.raises(SystemExit) as ended:
            benchmark.parse(wrong)
        assert ended.value.code == 2 and message in capsys.readouterr().err


@needs_no_gpu
def test_the_benchmark_hands_over(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["elementwise", "--m", "1"]) == 2
    assert "no CUDA GPU here" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        bench.main(["--help"])
    assert "elementwise" in capsys.readouterr().out


def test_threads_of_a_block() -> None:
    assert [elementwise.threads_for(m, 4096, 132) for m in (1, 132, 1056, 1057)] == [512, 512, 512, 256]
    assert [elementwise.threads_for(m, 4096, 132, elementwise.SHORT_QUEUE) for m in (528, 529)] == [512, 256]
    assert [elementwise.threads_for(m, 14336, 132) for m in (1, 132, 133, 4096)] == [1024, 1024, 512, 512]
    assert elementwise.threads_for(1, 32, 132) == 64  # the fewest
    assert [elementwise.threads_for(4096, k, 132) for k in (32768, 53248)] == [512, 1024]  # 8 and 7 pieces a thread
    for k in (32, 96, 1056, 65792):
        threads = elementwise.threads_for(7, k, 132)
        assert 64 <= threads <= 1024 and threads.bit_count() == 1


def test_kernels_need_a_gpu_outside_the_simulator() -> None:
    x, weight = torch.zeros(2, 64).half(), torch.ones(64).half()
    with pytest.raises(ValueError, match="x: on cpu; the kernels need a CUDA tensor"):
        fused.rms_norm_s8(x, weight, 1e-5)
    with pytest.raises(ValueError, match="gate_up: on cpu; the kernels need a CUDA tensor"):
        fused.silu_mul_s8(x)
