import math

import pytest
import torch

from fastgpt.errors import RequestError
from fastgpt.gpus import ARCHITECTURES, GPUS, find_gpu

# What NVIDIA prints of each card, and TechPowerUp of those that no whitepaper covers: CUDA cores, TFLOP/s in fp32,
# dense tensor TFLOP/s of fp16 with fp32 accumulation, and memory as bits x Gbit/s a pin, or, for stacks, in GB/s.
# A dash: not printed. Where the only rate printed is a multiple, it is divided: /2 with sparsity, /4 fp8 with
# sparsity, and of GeForce's "AI TOPS" /8 in int8 (RTX 40) and /16 in fp4 (RTX 50), both with sparsity.
PUBLISHED = """
Tesla V100-SXM2-16GB                5120 15.7  125     900
Tesla V100-SXM2-32GB                5120 15.7  125     900
Tesla V100-PCIE-16GB                5120 14    112     900
Tesla V100-PCIE-32GB                5120 14    112     900
Tesla V100S-PCIE-32GB               5120 16.4  130     1134
Tesla T4                            2560 8.1   65      256x10
NVIDIA TITAN RTX                    4608 16.3  130.5   384x14
NVIDIA GeForce RTX 2080 Ti          4352 13.4  53.8    352x14
NVIDIA GeForce RTX 2080 SUPER       3072 11.2  44.6    256x15.5
NVIDIA GeForce RTX 2080             2944 10.1  40.3    256x14
NVIDIA GeForce RTX 2070 SUPER       2560 9.1   36.3    256x14
NVIDIA GeForce RTX 2070             2304 7.5   29.9    256x14
NVIDIA GeForce RTX 2060 SUPER       2176 7.2   -       256x14
NVIDIA GeForce RTX 2060             1920 6.5   -       192x14
Quadro RTX 8000                     4608 16.3  130.5   384x14
Quadro RTX 6000                     4608 16.3  130.5   384x14
Quadro RTX 5000                     3072 11.2  89.2    256x14
NVIDIA A100-SXM4-80GB               6912 19.5  312     2039
NVIDIA A100-SXM4-40GB               6912 19.5  312     1555
NVIDIA A100 80GB PCIe               6912 19.5  312     1935
NVIDIA A100-PCIE-40GB               6912 19.5  312     1555
NVIDIA A30                          3584 10.3  165     933
NVIDIA GeForce RTX 3090 Ti          10752 40.0 80      384x21
NVIDIA GeForce RTX 3090             10496 35.6 71      384x19.5
NVIDIA GeForce RTX 3080 Ti          10240 34.1 68.2    384x19
NVIDIA GeForce RTX 3080             8704 29.8  59.5    320x19
NVIDIA GeForce RTX 3070 Ti          6144 21.7  43.5    256x19
NVIDIA GeForce RTX 3070             5888 20.3  40.6    256x14
NVIDIA GeForce RTX 3060 Ti          4864 16.2  -       256x14
NVIDIA GeForce RTX 3060             3584 12.7  -       192x15
NVIDIA GeForce RTX 3050             2560 9.1   -       128x14
NVIDIA GeForce RTX 3080 Ti Laptop GPU 7424 -   -       256x16
NVIDIA GeForce RTX 3080 Laptop GPU  6144 -     -       256x14
NVIDIA GeForce RTX 3070 Ti Laptop GPU 5888 -   -       256x14
NVIDIA GeForce RTX 3070 Laptop GPU  5120 -     -       256x14
NVIDIA GeForce RTX 3060 Laptop GPU  3840 -     -       192x14
NVIDIA RTX A6000                    10752 38.7 154.8   384x16
NVIDIA RTX A5500                    10240 34.1 272.8/2 384x16
NVIDIA RTX A5000                    8192 27.8  222.2/2 384x16
NVIDIA RTX A4500                    7168 23.7  189.2/2 320x16
NVIDIA RTX A4000                    6144 19.2  153.4/2 256x14
NVIDIA RTX A2000 12GB               3328 8.0   63.9/2  192x12
NVIDIA RTX A2000                    3328 8.0   63.9/2  192x12
NVIDIA A40                          10752 37.4 149.7   384x14.5
NVIDIA A10                          9216 31.2  125     384x12.5
NVIDIA GeForce RTX 4090             16384 82.6 165.2   384x21
NVIDIA GeForce RTX 4090 D           14592 73.5 -       384x21
NVIDIA GeForce RTX 4080 SUPER       10240 52.2 836/8   256x23
NVIDIA GeForce RTX 4080             9728 48.7  97.5    256x22.4
NVIDIA GeForce RTX 4070 Ti SUPER    8448 44.1  706/8   256x21
NVIDIA GeForce RTX 4070 Ti          7680 40.1  80.2    192x21
NVIDIA GeForce RTX 4070 SUPER       7168 35.5  568/8   192x21
NVIDIA GeForce RTX 4070             5888 29.1  58.3    192x21
NVIDIA GeForce RTX 4060 Ti          4352 22.1  353/8   128x18
NVIDIA GeForce RTX 4060             3072 15.1  242/8   128x17
NVIDIA GeForce RTX 4090 Laptop GPU  9728 -     -       256x18
NVIDIA GeForce RTX 4080 Laptop GPU  7424 -     542/8   192x18
NVIDIA GeForce RTX 4070 Laptop GPU  4608 -     321/8   128x16
NVIDIA GeForce RTX 4060 Laptop GPU  3072 -     233/8   128x16
NVIDIA GeForce RTX 4050 Laptop GPU  2560 -     194/8   96x16
NVIDIA RTX 6000 Ada Generation      18176 91.1 364.2   384x20
NVIDIA RTX 5000 Ada Generation      12800 65.3 1044.4/4 256x18
NVIDIA RTX 4500 Ada Generation      7680 39.6  634.0/4 192x18
NVIDIA RTX 4000 Ada Generation      6144 26.7  427.6/4 160x18
NVIDIA RTX 4000 SFF Ada Generation  6144 19.2  306.8/4 160x14
NVIDIA RTX 2000 Ada Generation      2816 12.0  191.9/4 128x14
NVIDIA L40S                         18176 91.6 733/2   384x18
NVIDIA L40                          18176 90.5 362.1/2 384x18
NVIDIA L4                           7424 30.3  121     192x12.5
NVIDIA H100 80GB HBM3               16896 66.9 989.4   3350
NVIDIA H100 PCIe                    14592 51.2 756     2000
NVIDIA H100 NVL                     16896 60   1671/2  3900
NVIDIA H200                         16896 67   1979/2  4800
NVIDIA H200 NVL                     16896 60   1671/2  4800
NVIDIA B200                         18944 75   2250    7700
NVIDIA GeForce RTX 5090             21760 104.8 209.5  512x28
NVIDIA GeForce RTX 5080             10752 56.3 112.6   256x30
NVIDIA GeForce RTX 5070 Ti          8960 43.9  87.9    256x28
NVIDIA GeForce RTX 5070             6144 30.9  61.7    192x28
NVIDIA GeForce RTX 5060 Ti          4608 23.7  759/16  128x28
NVIDIA GeForce RTX 5060             3840 19.2  614/16  128x28
NVIDIA RTX PRO 6000 Blackwell Workstation Edition       24064 - 503.8 512x28
NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition 24064 - 438.9 512x28
"""
ROWS = [line.rsplit(maxsplit=4) for line in PUBLISHED.strip().splitlines()]
BF16, FP16, FP32, FP8 = torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn


def gpu(name):
    return GPUS[f"NVIDIA {name}"]


def as_printed(text):
    """The number that a figure stands for, and one unit of its last digit: makers round up and down."""
    figure, _, divisor = text.partition("/")
    unit = 10.0 ** -len(figure.partition(".")[2])
    return pytest.approx(float(figure) / int(divisor or 1), abs=unit / int(divisor or 1))


# ---- the table ----


def test_every_card_is_held_against_what_its_maker_prints():
    assert [row[0] for row in ROWS] == list(GPUS)


@pytest.mark.parametrize(("name", "cores", "fp32", "tensor", "memory"), ROWS, ids=[row[0] for row in ROWS])
def test_a_cards_peaks_are_those_that_its_maker_prints(name, cores, fp32, tensor, memory):
    card = GPUS[name]
    cores_per_sm = 64 if card.capability <= 80 else 128
    assert card.n_sm * cores_per_sm == int(cores)
    if fp32 != "-":
        assert card.tflops(FP32) == as_printed(fp32)
    if tensor != "-":
        assert card.tflops(FP16) == as_printed(tensor)
    assert card.bandwidth_gb_s == pytest.approx(
        math.prod(map(float, memory.split("x"))) / (8 if "x" in memory else 1), rel=1e-3
    )


def test_rows_go_by_their_own_names_and_say_where_they_come_from():
    assert all(name == card.name and len(card.source) > 20 for name, card in GPUS.items())


def test_the_rtx_4070_is_what_its_whitepaper_says():
    card = gpu("GeForce RTX 4070")
    # 46 SMs, 4 tensor cores each, 64 FMA a clock with fp32 accumulation, 2475 MHz
    assert card.tflops(BF16) == pytest.approx(46 * 4 * 64 * 2 * 2475e6 / 1e12)
    assert round(card.tflops(BF16), 1) == round(card.tflops(FP16), 1) == 58.3
    assert round(card.tflops(FP16, accumulate=FP16), 1) == round(card.tflops(FP8), 1) == 116.6
    assert round(card.tflops(FP8, accumulate=FP16), 1) == 233.2
    assert (card.capability, card.n_sm, card.boost_mhz, card.flops_per_cycle) == (89, 46, 2475, 512)
    assert (card.bandwidth_gb_s, card.memory_gb, card.l2_mb, card.shared_memory) == (504, 12, 36, 99 * 1024)


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("GeForce RTX 4090", 165.2),
        ("GeForce RTX 3090", 71.2),
        ("A100-SXM4-80GB", 311.9),
        ("H100 80GB HBM3", 989.4),
        ("H200", 989.4),
        ("H100 PCIe", 756.4),
    ],
)
def test_bf16_peaks_by_which_others_are_judged(name, tflops):
    assert round(gpu(name).tflops(BF16), 1) == tflops


# With sparsity, from the same data sheets; bf16, or fp16 where there is no bf16.
@pytest.mark.parametrize(
    ("name", "sparse"),
    [
        ("GeForce RTX 4070", 116.6),
        ("GeForce RTX 4090", 330.4),
        ("GeForce RTX 3090", 142),
        ("GeForce RTX 5090", 419),
        ("RTX A6000", 309.7),
        ("A100-SXM4-80GB", 624),
        ("A10", 250),
        ("L4", 242),
        ("L40", 362.1),
        ("L40S", 733),
        ("H100 80GB HBM3", 1979),
        ("H100 PCIe", 1513),
        ("H200", 1979),
        ("B200", 4500),
    ],
)
def test_sparse_figures_are_not_taken_for_dense(name, sparse):
    assert gpu(name).tflops(BF16) == pytest.approx(sparse / 2, rel=5e-3)


def test_geforce_cards_halve_their_rate_for_fp32_accumulation_and_their_twins_do_not():
    for geforce, twin in (("GeForce RTX 3090 Ti", "RTX A6000"), ("GeForce RTX 4090", "RTX 6000 Ada Generation")):
        assert gpu(geforce).tflops(FP16, accumulate=FP16) == 2 * gpu(geforce).tflops(FP16)
        assert gpu(twin).tflops(FP16, accumulate=FP16) == gpu(twin).tflops(FP16)
        assert gpu(twin).flops_per_cycle == 2 * gpu(geforce).flops_per_cycle
    assert {card.halved for card in GPUS.values() if "GeForce" in card.name} == {True}
    assert [card.name for card in GPUS.values() if card.halved and "GeForce" not in card.name] == ["NVIDIA L40"]


def test_volta_and_turing_have_no_bf16_and_nothing_before_ada_has_fp8():
    for card in GPUS.values():
        assert (card.tflops(BF16) is None) == (card.capability < 80)
        assert (card.tflops(FP8) is None) == (card.capability < 89)
        assert card.tflops(BF16) in (None, card.tflops(FP16))
        assert card.tflops(FP8) in (None, 2 * card.tflops(FP16))


@pytest.mark.parametrize(
    ("dtype", "accumulate"),
    [(BF16, FP16), (BF16, BF16), (FP32, FP16), (torch.float64, FP32), (torch.int8, torch.int32), (FP16, torch.int32)],
)
def test_what_no_unit_computes_has_no_peak(dtype, accumulate):
    assert gpu("H100 80GB HBM3").tflops(dtype, accumulate) is None


def test_a_block_may_use_the_shared_memory_that_cuda_allows():
    # CUDA programming guide, table of compute capabilities: KiB a block
    kib = {70: 96, 75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
    assert {card.capability: card.shared_memory >> 10 for card in GPUS.values()} == kib
    assert ARCHITECTURES.keys() == kib.keys()


def test_h200_differs_from_h100_in_memory_alone():
    h100, h200 = gpu("H100 80GB HBM3"), gpu("H200")
    assert (h100.bandwidth_gb_s, h200.bandwidth_gb_s) == (3350, 4800)
    assert (h100.memory_gb, h200.memory_gb) == (80, 141)
    assert h100.tflops(BF16) == h200.tflops(BF16)


def test_a_laptops_card_is_not_the_desktops():
    laptops = [card for card in GPUS.values() if card.name.endswith(" Laptop GPU")]
    assert len(laptops) == 10
    for card in laptops:
        desktop = GPUS.get(card.name.removesuffix(" Laptop GPU"))
        assert desktop is None or card.tflops(BF16) < desktop.tflops(BF16) or card.n_sm > desktop.n_sm
        assert "highest power" in card.source


# ---- find_gpu ----


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("rtx-4070", "NVIDIA GeForce RTX 4070"),
        ("RTX 4070", "NVIDIA GeForce RTX 4070"),
        ("4070", "NVIDIA GeForce RTX 4070"),
        ("geforce_rtx_4070", "NVIDIA GeForce RTX 4070"),
        ("4070ti", "NVIDIA GeForce RTX 4070 Ti"),
        ("rtx4070tisuper", "NVIDIA GeForce RTX 4070 Ti SUPER"),
        ("4070 laptop", "NVIDIA GeForce RTX 4070 Laptop GPU"),
        ("rtx-4050-laptop", "NVIDIA GeForce RTX 4050 Laptop GPU"),
        ("t4", "Tesla T4"),
        ("a10", "NVIDIA A10"),
        ("l4", "NVIDIA L4"),
        ("l40", "NVIDIA L40"),
        ("v100s", "Tesla V100S-PCIE-32GB"),
        ("rtx 6000 ada", "NVIDIA RTX 6000 Ada Generation"),
        ("a6000", "NVIDIA RTX A6000"),
        ("a2000", "NVIDIA RTX A2000"),
        ("titan", "NVIDIA TITAN RTX"),
        ("h200", "NVIDIA H200"),
        ("h100-pcie", "NVIDIA H100 PCIe"),
        ("h100 sxm5", "NVIDIA H100 80GB HBM3"),
        ("h100-sxm", "NVIDIA H100 80GB HBM3"),
        ("a100 sxm 40gb", "NVIDIA A100-SXM4-40GB"),
        ("pcie a100 80gb", "NVIDIA A100 80GB PCIe"),
        ("rtx pro 6000 max-q", "NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition"),
    ],
)
def test_a_card_is_found_by_what_people_call_it(text, name):
    assert find_gpu(text).name == name


@pytest.mark.parametrize("name", GPUS)
def test_a_card_is_found_by_the_name_that_cuda_reports(name):
    assert find_gpu(name).name == find_gpu(name.lower().replace(" ", "-")).name == name


@pytest.mark.parametrize(
    ("text", "candidates"),
    [
        ("h100", {"NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe", "NVIDIA H100 NVL"}),
        ("a100-sxm", {"NVIDIA A100-SXM4-40GB", "NVIDIA A100-SXM4-80GB"}),
        ("A100 80GB", {"NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB PCIe"}),
        ("rtx 5000", {"Quadro RTX 5000", "NVIDIA RTX 5000 Ada Generation"}),
        ("4050", {"NVIDIA GeForce RTX 4050 Laptop GPU"}),
    ],
)
def test_a_name_that_may_mean_several_cards_is_refused_with_their_names(text, candidates):
    with pytest.raises(RequestError, match=f"^'{text}' does not name one GPU; say which: ") as caught:
        find_gpu(text)
    assert set(str(caught.value).partition("which: ")[2].split(", ")) == candidates


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("rtx 4075", "near it are RTX 40"),
        ("h100 nvlink", "near it are H100 NVL"),
        ("quantum", "it has names such as RTX 4070"),
    ],
)
def test_an_unknown_card_is_refused_with_the_nearest_names(text, said):
    with pytest.raises(RequestError, match=f"^'{text}' is no GPU of the table of {len(GPUS)} in .*; {said}") as e:
        find_gpu(text)
    assert len(str(e.value)) < 160
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("text", ["", "nvidia", "12gb", "d", "laptop", "ti", "hbm3", "pcie", "rtx 4070 pro"])
def test_words_without_a_cards_number_or_untrue_of_it_name_none(text):
    with pytest.raises(RequestError, match="is no GPU of the table"):
        find_gpu(text)


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("rtx 4070", "sm_89 GeForce"),
        ("l40s", "sm_89 PCIe"),
        ("a100 sxm 80gb", "sm_80 SXM"),
        ("h100 80gb hbm3", "sm_90 SXM"),
        ("h100 nvl", "sm_90 PCIe"),
        ("b200", "sm_100 SXM"),
    ],
)
def test_a_family_is_an_architecture_and_what_feeds_it(name, family):
    assert find_gpu(name).family == family
