"""Golden values: released checkpoints, published parameter counts and FLOP figures."""

import pytest

from shoestring.core.errors import UserError
from shoestring.cost.shape import ModelShape

MLA = dict(kind="mla", kv_lora=512, qk_nope=128, qk_rope=64, v_dim=128)
V3 = ModelShape(
    vocab=129280, d_model=7168, layers=61, heads=128, ffn=18432, **MLA, q_lora=1536, n_routed=256, n_active=8,
    n_shared=1, expert_ffn=2048, dense_layers=3, n_group=8, topk_group=4, gate_bias=True, mtp_layers=1,
)  # fmt: skip
MOONLIGHT = ModelShape(
    vocab=163840, d_model=2048, layers=27, heads=16, ffn=11264, **MLA, n_routed=64, n_active=6, n_shared=2,
    expert_ffn=1408, dense_layers=1, gate_bias=True,
)  # fmt: skip
V2_LITE = MOONLIGHT.with_(vocab=102400, ffn=10944, gate_bias=False)
V2 = ModelShape(
    vocab=102400, d_model=5120, layers=60, heads=128, ffn=12288, **MLA, q_lora=1536, n_routed=160, n_active=6,
    n_shared=2, expert_ffn=1536, dense_layers=1, n_group=8, topk_group=3,
)  # fmt: skip
TINY = ModelShape(
    vocab=64, d_model=32, layers=2, heads=2, ffn=48, kind="mla", kv_lora=8, q_lora=12, qk_rope=4, qk_nope=8, v_dim=8,
    n_routed=4, n_active=2, n_shared=1, expert_ffn=16, dense_layers=1,
)  # fmt: skip


def qwen2(d, layers, ffn, heads, kv, head_dim, vocab, tied):
    return ModelShape(vocab=vocab, d_model=d, layers=layers, heads=heads, kv_heads=kv, head_dim=head_dim, ffn=ffn,
                      tied=tied, qkv_bias=True)  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "total", "active", "with_tables"),
    [
        (V3, 671_026_419_200, 36_625_618_432, 37_552_297_472),
        (MOONLIGHT, 15_960_110_208, 2_579_231_872, 2_914_776_192),
        (V2_LITE, 15_706_484_224, 2_451_435_008, 2_661_150_208),
        (V2, 235_741_434_880, 20_851_512_320, 21_375_800_320),
    ],
)
def test_deepseek_counts(shape, total, active, with_tables):
    count = shape.params()
    assert (count.total, count.active, count.active_with_tables) == (total, active, with_tables)


def test_tiny_v3():
    assert TINY.params().total == 20_360
    assert TINY.with_(gate_bias=True).params().total == 20_364


def test_mtp_counts():
    assert V3.params().mtp == 11_610_068_224
    assert V3.params().mtp + 2 * 129280 * 7168 == 13_463_426_304
    assert V3.params().total + V3.params().mtp + 2 * 129280 * 7168 == 684_489_845_504


@pytest.mark.parametrize(
    ("shape", "total"),
    [
        (qwen2(896, 24, 4864, 14, 2, 64, 151936, True), 494_032_768),
        (qwen2(1536, 28, 8960, 12, 2, 128, 151936, True), 1_543_714_304),
        (qwen2(1536, 28, 8960, 12, 2, 128, 151936, False), 1_777_088_000),
        (qwen2(3584, 28, 18944, 28, 4, 128, 152064, False), 7_615_616_512),
        (ModelShape(vocab=151936, d_model=1024, layers=28, heads=16, kv_heads=8, head_dim=128, ffn=3072, tied=True,
                    qk_norm="head"), 596_049_920),
        (ModelShape(vocab=128256, d_model=2048, layers=16, heads=32, kv_heads=8, ffn=8192, tied=True), 1_235_814_400),
        (ModelShape(vocab=128256, d_model=4096, layers=32, heads=32, kv_heads=8, ffn=14336), 8_030_261_248),
    ],
)  # fmt: skip
def test_student_counts(shape, total):
    assert shape.params().total == total


def test_parts_of_v3():
    assert V3.attention_params() == 187_107_328
    assert V3.attention_matrices() == 187_105_280
    assert V3.expert_params() == 44_040_192
    assert V3.dense_ffn_params() == 396_361_728
    assert V3.router_params() == 1_835_008 + 256
    assert V3.matmul_params() == 36_624_596_992
    assert V3.matmul_params(mtp=True) - V3.matmul_params() == 1_614_741_504
    assert MOONLIGHT.attention_params() == 13_763_072
    assert V2.attention_params() == 149_227_520


@pytest.mark.parametrize(
    ("seq_len", "options", "gflop"),
    [
        (4096, {}, 250.45),
        (4096, {"causal": False}, 281.15),
        (4096, {"mtp": True}, 260.64),
        (32768, {}, 465.37),
        (131072, {}, 1202.22),
    ],
)
def test_v3_training_flops(seq_len, options, gflop):
    assert V3.flops_per_token(seq_len, **options) / 1e9 == pytest.approx(gflop, abs=0.005)


def test_whole_run_and_llama_flops():
    assert V3.flops_per_token(4096) * 14.8e12 == pytest.approx(3.7067e24, rel=1e-4)
    llama = ModelShape(vocab=128256, d_model=16384, layers=126, heads=128, kv_heads=8, ffn=53248)
    assert llama.params().total == 405_853_388_800
    assert llama.flops_per_token(8192) / 1e9 == pytest.approx(2524.0, abs=0.05)
    assert llama.flops_per_token(4096) / 1e9 == pytest.approx(2473.2, abs=0.05)
    assert llama.kv_numbers_per_token() * 2 == 516_096


def test_forward_is_a_third_of_training():
    assert V3.flops_per_token(4096, backward=False) * 3 == V3.flops_per_token(4096)


def test_kv_numbers():
    assert V3.kv_numbers_per_token() == 35_136
    assert V3.kv_numbers_per_token() * 2 == 70_272
    assert MOONLIGHT.kv_numbers_per_token() == 15_552
    assert V2.kv_numbers_per_token() == 34_560
    qwen72 = ModelShape(vocab=152064, d_model=8192, layers=80, heads=64, kv_heads=8, ffn=29568, qkv_bias=True)
    assert qwen72.kv_numbers_per_token() * 2 == 327_680
    windowed = qwen72.with_(window=1024, window_layers=40)
    assert windowed.kv_numbers(4096) == qwen72.kv_numbers_per_token() // 80 * (40 * 4096 + 40 * 1024)


def test_window_lowers_attention_only():
    wide = V2_LITE.with_(window=8192, window_layers=27)
    narrow = V2_LITE.with_(window=1024, window_layers=27)
    assert wide.attention_flops(4096) == V2_LITE.attention_flops(4096)
    assert narrow.attention_flops(4096) == pytest.approx(V2_LITE.attention_flops(4096) * (1024 - 128) / 2048)
    assert narrow.matmul_params() == V2_LITE.matmul_params()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layers": 0}, "layers is 0"),
        ({"n_active": 300}, "300 active of 256"),
        ({"kv_lora": 0}, "kv_lora"),
        ({"d_model": -1}, "d_model is -1"),
        ({"n_group": 7}, "7 groups"),
        ({"expert_ffn": 0}, "expert_ffn"),
    ],
)
def test_contradictions_are_named(changes, words):
    with pytest.raises(UserError, match=words):
        V3.with_(**changes)


# arXiv 2104.04473: layers, width, heads, batch, chips, TFLOP/s a chip; parameters in billions, seconds a step
MEGATRON = [
    (40, 6144, 48, 1024, 256, 135, 18.45, 9.40), (80, 12288, 96, 2304, 1536, 148, 145.62, 24.82),
    (105, 20480, 128, 2520, 2520, 163, 529.60, 54.08), (128, 25600, 160, 3072, 3072, 163, 1008.04, 102.6),
]  # fmt: skip


@pytest.mark.parametrize("row", MEGATRON)
def test_megatron_s_counter_and_ours(row):
    """Their FLOPs of a step, with full recomputation, are ours to the digit; they count positions and biases too."""
    layers, d, heads, batch, chips, tflops, billions, seconds = row
    shape = ModelShape(vocab=51200, d_model=d, layers=layers, heads=heads, ffn=4 * d, ffn_mats=2, tied=True)
    forward = shape.flops_per_token(2048, causal=False, backward=False)
    ours = (4 * forward - 2 * shape.vocab * d) * batch * 2048  # the head is not computed again
    theirs = 96 * batch * 2048 * layers * d**2 * (1 + 2048 / (6 * d) + 51200 / (16 * layers * d))
    assert ours == pytest.approx(theirs, rel=1e-12)
    assert ours / (chips * tflops * 1e12) == pytest.approx(seconds, abs=0.06)
    assert shape.params().total == pytest.approx(billions * 1e9, rel=1e-3)


def test_a_trillion_parameters_take_83_days():
    """Their estimate for 450B tokens on 3,072 chips at 163 TFLOP/s is 83.2 days by 8 T P; ours counts attention too."""
    shape = ModelShape(vocab=51200, d_model=25600, layers=128, heads=160, ffn=102400, ffn_mats=2, tied=True)
    forward = shape.flops_per_token(2048, causal=False, backward=False)
    days = (4 * forward - 2 * shape.vocab * shape.d_model) * 450e9 / (3072 * 163e12) / 86400
    assert 83.2 < days < 83.2 * 1.03
