"""NVIDIA's GPUs: what each can do at most, with sources. Data only; the device at hand is :mod:`fastgpt.hardware`'s.

Peaks are not written down but reckoned: SMs x clock x FLOP a cycle. All are dense; the figures "with sparsity", twice
as high, that data sheets like to print are used nowhere.
"""

import difflib
import re
from dataclasses import dataclass

import torch

from fastgpt.errors import RequestError


@dataclass(frozen=True)
class Architecture:
    """What all GPUs of one compute capability have in common.

    Attributes:
        tensor_flops: dense fp16 FLOP a cycle and SM on the tensor cores, accumulated in fp16.
        fp32_flops: FLOP a cycle and SM on the CUDA cores.
        shared_memory: KiB that one block may use.
    """

    tensor_flops: int
    fp32_flops: int
    shared_memory: int


# Shared memory: CUDA programming guide, table of compute capabilities. FLOP: the whitepapers named below.
ARCHITECTURES = {
    70: Architecture(1024, 128, 96),
    75: Architecture(1024, 128, 64),
    80: Architecture(2048, 128, 163),
    86: Architecture(1024, 256, 99),
    89: Architecture(1024, 256, 99),
    90: Architecture(4096, 256, 227),
    100: Architecture(8192, 256, 227),
    120: Architecture(1024, 256, 99),
}

BF16_SINCE, FP8_SINCE = 80, 89  # capabilities
KERNELS_SINCE = 80  # our Triton kernels; older GPUs run plain PyTorch
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True)
class GPU:
    """One card.

    Attributes:
        name: what CUDA reports.
        capability: compute capability times ten; 89 is Ada.
        n_sm: streaming multiprocessors.
        boost_mhz: the clock for which the maker states the tensor cores' rate.
        bandwidth_gb_s: of the memory, in 10^9 bytes a second.
        memory_gb: as the maker counts it; the driver keeps some of it.
        l2_mb: L2 cache, in MiB.
        source: where the figures come from.
        halved: products accumulated in fp32 run at half the rate of those in fp16, as on all GeForce cards.
        cuda_core_mhz: the clock of the CUDA cores' stated rate, where that is another than the tensor cores'.
    """

    name: str
    capability: int
    n_sm: int
    boost_mhz: float
    bandwidth_gb_s: float
    memory_gb: float
    l2_mb: float
    source: str
    halved: bool = False
    cuda_core_mhz: float | None = None

    @property
    def architecture(self) -> Architecture:
        return ARCHITECTURES[self.capability]

    @property
    def family(self) -> str:
        """Architecture and kind: cards of one family get to like shares of their peaks. ``sm_89 GeForce``."""
        socket = "SXM" in self.name or self.name in SXM
        return f"sm_{self.capability} {'GeForce' if self.halved else 'SXM' if socket else 'PCIe'}"

    @property
    def flops_per_cycle(self) -> int:
        """Dense tensor-core FLOP a cycle and SM for bf16 and fp16 with fp32 accumulation."""
        return self.architecture.tensor_flops // (2 if self.halved else 1)

    @property
    def shared_memory(self) -> int:
        """Bytes of shared memory that one block may use."""
        return self.architecture.shared_memory << 10

    def tflops(self, dtype: torch.dtype, accumulate: torch.dtype = torch.float32) -> float | None:
        """Dense peak of matrix products, in TFLOP/s; ``None`` where the card has no unit for them.

        Args:
            dtype: of the factors; float32 means plain fp32 on the CUDA cores, not TF32.
            accumulate: what products are summed in.
        """
        if dtype == torch.float32:
            mhz = self.cuda_core_mhz or self.boost_mhz
            return self._rate(self.architecture.fp32_flops, mhz) if accumulate == torch.float32 else None
        if accumulate not in (torch.float32, torch.float16):
            return None
        flops = self.flops_per_cycle if accumulate == torch.float32 else self.architecture.tensor_flops
        if dtype == torch.float16:
            return self._rate(flops, self.boost_mhz)
        if dtype == torch.bfloat16 and accumulate == torch.float32 and self.capability >= BF16_SINCE:
            return self._rate(flops, self.boost_mhz)
        if dtype in FP8 and self.capability >= FP8_SINCE:
            return self._rate(2 * flops, self.boost_mhz)
        return None

    def _rate(self, flops: int, mhz: float) -> float:
        return self.n_sm * flops * mhz / 1e6


VOLTA = "NVIDIA V100 datasheet, Volta whitepaper (WP-08608)"
V100_PCIE = "NVIDIA V100 datasheet; the clock is what its 112 TFLOP/s imply"
T4 = "NVIDIA Turing whitepaper (WP-09183), T4 datasheet"
TURING = "NVIDIA Turing whitepaper (WP-09183), reference clock, not the Founders Edition's"
GEFORCE_20 = "NVIDIA's GeForce 20 specifications; L2: TechPowerUp"
QUADRO_RTX = "NVIDIA Turing whitepaper (WP-09183), Quadro RTX datasheets"
A100 = "NVIDIA A100 whitepaper v1.0, A100 datasheet"
A30 = "NVIDIA A30 datasheet; L2: TechPowerUp"
GA102 = "NVIDIA Ampere GA102 whitepaper v2.1"
GEFORCE_30 = "NVIDIA's GeForce 30 specifications; L2: TechPowerUp"
RTX_A = "NVIDIA RTX A-series datasheets; L2: TechPowerUp"
GA102_SERVER = "NVIDIA A10 and A40 datasheets; L2: GA102 whitepaper v2.1"
ADA = "NVIDIA Ada whitepaper v2.1"
ADA_PRO = "NVIDIA Ada whitepaper for professional cards v1.1"
GEFORCE_40 = "NVIDIA's GeForce 40 specifications; L2: TechPowerUp"
RTX_ADA = "NVIDIA RTX Ada Generation datasheets; L2: TechPowerUp"
ADA_SERVER = "NVIDIA L4, L40 and L40S datasheets; L2: TechPowerUp"
HOPPER = "NVIDIA H100 whitepaper v1.04: SMs, both clocks, L2; data sheets of H100 and H200: memory"
HOPPER_NVL = "NVIDIA data sheets of H100 NVL and H200 NVL; the clocks are what their dense 835.5 and 60 TFLOP/s imply"
B200 = "NVIDIA HGX B200 datasheet, the clocks are what its dense 2250 and 75 TFLOP/s imply; L2: Blackwell tuning guide"
GEFORCE_50 = "NVIDIA RTX Blackwell whitepaper v1.1"
GEFORCE_50_LATER = "NVIDIA's GeForce 50 specifications; L2: TechPowerUp"
RTX_PRO = "NVIDIA RTX PRO Blackwell whitepaper v1.0"
LAPTOP_30 = "NVIDIA's GeForce 30 laptop specifications, clock and memory at the highest power; L2: TechPowerUp"
LAPTOP_40 = "NVIDIA's GeForce 40 laptop specifications, clock at the highest power; memory rate and L2: TechPowerUp"

# By the exact name that CUDA reports. One name may stand for several cards: memory is that of the first sold, or the
# least; where SMs differ too, as between the RTX 3080 with 10 and 12 GB, the device at hand tells (see hardware).
# Laptops with an RTX 20 go by the desktop card's name, at lower clocks.
# fmt: off
GPUS = {gpu.name: gpu for gpu in (
    # name, capability, SMs, MHz, GB/s, GB, MiB of L2, source
    GPU("Tesla V100-SXM2-16GB", 70, 80, 1530, 900, 16, 6, VOLTA),
    GPU("Tesla V100-SXM2-32GB", 70, 80, 1530, 900, 32, 6, VOLTA),
    GPU("Tesla V100-PCIE-16GB", 70, 80, 1370, 900, 16, 6, V100_PCIE),
    GPU("Tesla V100-PCIE-32GB", 70, 80, 1370, 900, 32, 6, V100_PCIE),
    GPU("Tesla V100S-PCIE-32GB", 70, 80, 1597, 1134, 32, 6, VOLTA),

    GPU("Tesla T4", 75, 40, 1590, 320, 16, 4, T4),
    GPU("NVIDIA TITAN RTX", 75, 72, 1770, 672, 24, 6, GA102),
    GPU("NVIDIA GeForce RTX 2080 Ti", 75, 68, 1545, 616, 11, 5.5, TURING, halved=True),
    GPU("NVIDIA GeForce RTX 2080 SUPER", 75, 48, 1815, 496, 8, 4, GA102, halved=True),
    GPU("NVIDIA GeForce RTX 2080", 75, 46, 1710, 448, 8, 4, TURING, halved=True),
    GPU("NVIDIA GeForce RTX 2070 SUPER", 75, 40, 1770, 448, 8, 4, GA102, halved=True),
    GPU("NVIDIA GeForce RTX 2070", 75, 36, 1620, 448, 8, 4, TURING, halved=True),
    GPU("NVIDIA GeForce RTX 2060 SUPER", 75, 34, 1650, 448, 8, 4, GEFORCE_20, halved=True),
    GPU("NVIDIA GeForce RTX 2060", 75, 30, 1680, 336, 6, 3, GEFORCE_20, halved=True),
    GPU("Quadro RTX 8000", 75, 72, 1770, 672, 48, 6, QUADRO_RTX),
    GPU("Quadro RTX 6000", 75, 72, 1770, 672, 24, 6, QUADRO_RTX),
    GPU("Quadro RTX 5000", 75, 48, 1815, 448, 16, 4, QUADRO_RTX),

    GPU("NVIDIA A100-SXM4-80GB", 80, 108, 1410, 2039, 80, 40, A100),
    GPU("NVIDIA A100-SXM4-40GB", 80, 108, 1410, 1555, 40, 40, A100),
    GPU("NVIDIA A100 80GB PCIe", 80, 108, 1410, 1935, 80, 40, A100),
    GPU("NVIDIA A100-PCIE-40GB", 80, 108, 1410, 1555, 40, 40, A100),
    GPU("NVIDIA A30", 80, 56, 1440, 933, 24, 24, A30),

    GPU("NVIDIA GeForce RTX 3090 Ti", 86, 84, 1860, 1008, 24, 6, ADA, halved=True),
    GPU("NVIDIA GeForce RTX 3090", 86, 82, 1695, 936, 24, 6, GA102, halved=True),
    GPU("NVIDIA GeForce RTX 3080 Ti", 86, 80, 1665, 912, 12, 6, GEFORCE_30, halved=True),
    GPU("NVIDIA GeForce RTX 3080", 86, 68, 1710, 760, 10, 5, GA102, halved=True),
    GPU("NVIDIA GeForce RTX 3070 Ti", 86, 48, 1770, 608, 8, 4, GEFORCE_30, halved=True),
    GPU("NVIDIA GeForce RTX 3070", 86, 46, 1725, 448, 8, 4, GA102, halved=True),
    GPU("NVIDIA GeForce RTX 3060 Ti", 86, 38, 1665, 448, 8, 4, GEFORCE_30, halved=True),
    GPU("NVIDIA GeForce RTX 3060", 86, 28, 1777, 360, 12, 3, GEFORCE_30, halved=True),
    GPU("NVIDIA GeForce RTX 3050", 86, 20, 1777, 224, 8, 2, GEFORCE_30, halved=True),
    GPU("NVIDIA GeForce RTX 3080 Ti Laptop GPU", 86, 58, 1590, 512, 16, 4, LAPTOP_30, halved=True),
    GPU("NVIDIA GeForce RTX 3080 Laptop GPU", 86, 48, 1710, 448, 8, 4, LAPTOP_30, halved=True),
    GPU("NVIDIA GeForce RTX 3070 Ti Laptop GPU", 86, 46, 1485, 448, 8, 4, LAPTOP_30, halved=True),
    GPU("NVIDIA GeForce RTX 3070 Laptop GPU", 86, 40, 1620, 448, 8, 4, LAPTOP_30, halved=True),
    GPU("NVIDIA GeForce RTX 3060 Laptop GPU", 86, 30, 1703, 336, 6, 3, LAPTOP_30, halved=True),
    GPU("NVIDIA RTX A6000", 86, 84, 1800, 768, 48, 6, ADA_PRO),
    GPU("NVIDIA RTX A5500", 86, 80, 1665, 768, 24, 6, RTX_A),
    GPU("NVIDIA RTX A5000", 86, 64, 1695, 768, 24, 6, RTX_A),
    GPU("NVIDIA RTX A4500", 86, 56, 1650, 640, 20, 6, RTX_A),
    GPU("NVIDIA RTX A4000", 86, 48, 1560, 448, 16, 4, RTX_A),
    GPU("NVIDIA RTX A2000 12GB", 86, 26, 1200, 288, 12, 3, RTX_A),
    GPU("NVIDIA RTX A2000", 86, 26, 1200, 288, 6, 3, RTX_A),
    GPU("NVIDIA A40", 86, 84, 1740, 696, 48, 6, GA102_SERVER),
    GPU("NVIDIA A10", 86, 72, 1695, 600, 24, 6, GA102_SERVER),

    GPU("NVIDIA GeForce RTX 4090", 89, 128, 2520, 1008, 24, 72, ADA, halved=True),
    GPU("NVIDIA GeForce RTX 4090 D", 89, 114, 2520, 1008, 24, 72, GEFORCE_40, halved=True),
    GPU("NVIDIA GeForce RTX 4080 SUPER", 89, 80, 2550, 736, 16, 64, GEFORCE_40, halved=True),
    GPU("NVIDIA GeForce RTX 4080", 89, 76, 2505, 716.8, 16, 64, ADA, halved=True),
    GPU("NVIDIA GeForce RTX 4070 Ti SUPER", 89, 66, 2610, 672, 16, 48, GEFORCE_40, halved=True),
    GPU("NVIDIA GeForce RTX 4070 Ti", 89, 60, 2610, 504, 12, 48, ADA, halved=True),
    GPU("NVIDIA GeForce RTX 4070 SUPER", 89, 56, 2475, 504, 12, 48, GEFORCE_40, halved=True),
    GPU("NVIDIA GeForce RTX 4070", 89, 46, 2475, 504, 12, 36, ADA, halved=True),
    GPU("NVIDIA GeForce RTX 4060 Ti", 89, 34, 2535, 288, 8, 32, GEFORCE_40, halved=True),
    GPU("NVIDIA GeForce RTX 4060", 89, 24, 2460, 272, 8, 24, GEFORCE_40, halved=True),
    GPU("NVIDIA GeForce RTX 4090 Laptop GPU", 89, 76, 2040, 576, 16, 64, LAPTOP_40, halved=True),
    GPU("NVIDIA GeForce RTX 4080 Laptop GPU", 89, 58, 2280, 432, 12, 48, LAPTOP_40, halved=True),
    GPU("NVIDIA GeForce RTX 4070 Laptop GPU", 89, 36, 2175, 256, 8, 32, LAPTOP_40, halved=True),
    GPU("NVIDIA GeForce RTX 4060 Laptop GPU", 89, 24, 2370, 256, 8, 32, LAPTOP_40, halved=True),
    GPU("NVIDIA GeForce RTX 4050 Laptop GPU", 89, 20, 2370, 192, 6, 12, LAPTOP_40, halved=True),
    GPU("NVIDIA RTX 6000 Ada Generation", 89, 142, 2505, 960, 48, 96, ADA_PRO),
    GPU("NVIDIA RTX 5000 Ada Generation", 89, 100, 2550, 576, 32, 72, RTX_ADA),
    GPU("NVIDIA RTX 4500 Ada Generation", 89, 60, 2580, 432, 24, 48, RTX_ADA),
    GPU("NVIDIA RTX 4000 Ada Generation", 89, 48, 2175, 360, 20, 48, RTX_ADA),
    GPU("NVIDIA RTX 4000 SFF Ada Generation", 89, 48, 1560, 280, 20, 48, RTX_ADA),
    GPU("NVIDIA RTX 2000 Ada Generation", 89, 22, 2130, 224, 16, 12, RTX_ADA),
    GPU("NVIDIA L40S", 89, 142, 2520, 864, 48, 96, ADA_SERVER),
    GPU("NVIDIA L40", 89, 142, 2490, 864, 48, 96, ADA_SERVER, halved=True),
    GPU("NVIDIA L4", 89, 58, 2040, 300, 24, 48, ADA_SERVER),

    GPU("NVIDIA H100 80GB HBM3", 90, 132, 1830, 3350, 80, 50, HOPPER, cuda_core_mhz=1980),
    GPU("NVIDIA H100 PCIe", 90, 114, 1620, 2000, 80, 50, HOPPER, cuda_core_mhz=1755),
    GPU("NVIDIA H100 NVL", 90, 132, 1545, 3900, 94, 50, HOPPER_NVL, cuda_core_mhz=1785),
    GPU("NVIDIA H200", 90, 132, 1830, 4800, 141, 50, HOPPER, cuda_core_mhz=1980),
    GPU("NVIDIA H200 NVL", 90, 132, 1545, 4800, 141, 50, HOPPER_NVL, cuda_core_mhz=1785),

    GPU("NVIDIA B200", 100, 148, 1856, 7700, 180, 126, B200, cuda_core_mhz=1980),

    GPU("NVIDIA GeForce RTX 5090", 120, 170, 2407, 1792, 32, 96, GEFORCE_50, halved=True),
    GPU("NVIDIA GeForce RTX 5080", 120, 84, 2617, 960, 16, 64, GEFORCE_50, halved=True),
    GPU("NVIDIA GeForce RTX 5070 Ti", 120, 70, 2452, 896, 16, 48, GEFORCE_50, halved=True),
    GPU("NVIDIA GeForce RTX 5070", 120, 48, 2512, 672, 12, 48, GEFORCE_50, halved=True),
    GPU("NVIDIA GeForce RTX 5060 Ti", 120, 36, 2572, 448, 8, 32, GEFORCE_50_LATER, halved=True),
    GPU("NVIDIA GeForce RTX 5060", 120, 30, 2497, 448, 8, 32, GEFORCE_50_LATER, halved=True),
    GPU("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", 120, 188, 2617, 1792, 96, 128, RTX_PRO),
    GPU("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", 120, 188, 2280, 1792, 96, 128, RTX_PRO),
)}
# fmt: on

# Cards for the SXM socket whose names do not say so.
SXM = {"NVIDIA H100 80GB HBM3", "NVIDIA H200", "NVIDIA B200"}


def find_gpu(text: str) -> GPU:
    """The card that a person means: ``rtx-4070``, ``RTX 4070``, ``4070``, ``h100 pcie`` or the name that CUDA reports.

    Case, spaces, hyphens and words such as NVIDIA, GeForce and RTX do not matter. A laptop's card is meant only where
    ``laptop`` is said.

    Raises:
        RequestError: no card, or more than one, goes by that name.
    """
    words = _words(text)
    for gpu in GPUS.values():
        if "".join(_words(gpu.name)) == "".join(words):
            return gpu
    alike = [gpu.name for gpu in GPUS.values() if _may_be(words, gpu)]
    candidates = [name for name in alike if ("Laptop" in name) == ("laptop" in words)]
    if len(candidates) == 1:
        return GPUS[candidates[0]]
    if alike:
        raise RequestError(f"'{text}' does not name one GPU; say which: {', '.join(candidates or alike)}")
    by_words = {" ".join(_words(name)): name.removeprefix("NVIDIA ").removeprefix("GeForce ") for name in GPUS}
    nearest = [by_words[match] for match in difflib.get_close_matches(" ".join(words), by_words, n=3, cutoff=0.5)]
    said = f"near it are {', '.join(nearest)}" if nearest else "it has names such as RTX 4070, A100-SXM4-80GB, L4"
    raise RequestError(f"'{text}' is no GPU of the table of {len(GPUS)} in fastgpt/gpus.py; {said}")


def _may_be(words: list[str], gpu: GPU) -> bool:
    """Whether everything that was said is true of the card, its number included: ``12gb`` names none."""
    own = _words(gpu.name)
    number = next((word for word in own if re.search(r"\d", word)), own[0])
    true = {*own, "sxm"} if gpu.name in SXM else {*own}
    return number in words and true.issuperset(words)


def _words(text: str) -> list[str]:
    """A name's words, less those that tell no two cards apart; ``sxm4`` and ``sxm5`` are ``sxm``."""
    text = re.sub("nvidia|geforce|tesla|rtx|generation|edition|gpu", " ", text.lower())
    return re.findall("[a-z0-9]+", re.sub(r"sxm\d", "sxm", text))
