"""Figures of the published simulator, to hold the model of it to: data with their sources, and nothing computed.

* ``published`` (November 2024): commit 58d7bdb of the BitMoD authors' simulator run with CACTI 7, for four models; the
  other two (grouped-query attention) from its plotting notebooks, which agree with the runs in the four, up to the
  last µJ.
* ``published-2025`` (July 2025): the same authors' simulator at its head, run with CACTI 7, for four models.
* Mean ratios: arithmetic means over the six models of ``termwise.sim.published.PUBLISHED_MODELS``, from the same runs.
* Headlines: BitMoD (HPCA 2025), abstract and section V.

A prefill has 256 tokens; a decode step is one token after 256.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

from termwise.algorithms.workload import Phase


class PublishedFigure(NamedTuple):
    """Cycles, and energies rounded to whole µJ: in all, and of PEs and buffers."""

    cycles: int
    energy_uj: int
    on_chip_energy_uj: int


Quantity = Literal["speed", "energy"]


class MeanRatio(NamedTuple):
    """Mean over six models of the other's cost / this one's: of a prefill, and of one with 20 tokens after it."""

    prefill: float
    with_20_tokens: float


class Headline(NamedTuple):
    """A ratio that the paper prints: of ``quantity``, ``accelerator`` over ``other``, in ``task``."""

    quantity: Quantity
    accelerator: str
    other: str
    task: Literal["prefill", "with_20_tokens", "both"]
    printed: float


PUBLISHED_FIGURES: Mapping[str, Mapping[tuple[str, Phase], Mapping[str, PublishedFigure]]] = {
    "published": {
        ("fp16", "prefill"): {
            "opt-1.3b": PublishedFigure(669_255_680, 2_549_499, 656_668),
            "phi-2": PublishedFigure(1_399_816_192, 6_252_350, 1_273_252),
            "yi-6b": PublishedFigure(2_878_668_800, 13_014_774, 2_614_171),
            "llama-2-7b": PublishedFigure(3_156_574_208, 15_511_221, 2_928_682),
            "llama-2-13b": PublishedFigure(6_676_111_360, 36_365_139, 5_742_951),
            "llama-3-8b": PublishedFigure(3_969_089_536, 18_528_840, 3_279_511),
        },
        ("ant", "prefill"): {
            "opt-1.3b": PublishedFigure(440_975_360, 1_360_903, 459_880),
            "phi-2": PublishedFigure(847_773_696, 3_147_508, 888_236),
            "yi-6b": PublishedFigure(1_734_868_992, 5_659_691, 1_815_179),
            "llama-2-7b": PublishedFigure(1_949_564_928, 7_426_912, 2_035_862),
            "llama-2-13b": PublishedFigure(4_076_584_960, 16_936_053, 3_981_122),
            "llama-3-8b": PublishedFigure(2_266_234_880, 7_910_575, 2_270_541),
        },
        ("olive", "prefill"): {
            "opt-1.3b": PublishedFigure(403_718_144, 1_308_354, 501_789),
            "phi-2": PublishedFigure(779_268_096, 2_969_260, 969_019),
            "yi-6b": PublishedFigure(1_575_157_760, 5_182_082, 1_960_581),
            "llama-2-7b": PublishedFigure(1_768_062_976, 6_898_215, 2_192_068),
            "llama-2-13b": PublishedFigure(3_648_512_000, 15_557_969, 4_285_634),
            "llama-3-8b": PublishedFigure(2_008_645_632, 7_165_633, 2_440_769),
        },
        ("bitmod-lossy", "prefill"): {
            "opt-1.3b": PublishedFigure(233_070_592, 986_623, 221_382),
            "phi-2": PublishedFigure(515_194_880, 2_315_439, 428_524),
            "yi-6b": PublishedFigure(946_937_856, 3_820_005, 871_622),
            "llama-2-7b": PublishedFigure(1_202_921_472, 5_388_371, 981_870),
            "llama-2-13b": PublishedFigure(2_601_461_760, 12_460_765, 1_924_566),
            "llama-3-8b": PublishedFigure(1_273_233_408, 5_416_024, 1_091_548),
        },
        ("bitmod-lossless", "prefill"): {
            "opt-1.3b": PublishedFigure(336_236_544, 1_272_043, 317_887),
            "phi-2": PublishedFigure(693_780_480, 3_020_095, 615_118),
            "yi-6b": PublishedFigure(1_414_209_536, 5_452_484, 1_255_562),
            "llama-2-7b": PublishedFigure(1_649_680_384, 7_186_699, 1_410_390),
            "llama-2-13b": PublishedFigure(3_537_397_760, 16_664_646, 2_763_255),
            "llama-3-8b": PublishedFigure(1_901_133_824, 7_727_074, 1_572_255),
        },
        ("fp16", "decode"): {
            "opt-1.3b": PublishedFigure(82_153_718, 419_862, 25_745),
            "phi-2": PublishedFigure(165_841_248, 847_599, 51_929),
            "yi-6b": PublishedFigure(362_970_848, 1_854_106, 113_537),
            "llama-2-7b": PublishedFigure(413_518_608, 2_113_617, 129_318),
            "llama-2-13b": PublishedFigure(804_330_080, 4_110_960, 251_588),
            "llama-3-8b": PublishedFigure(469_624_976, 2_399_478, 146_812),
        },
        ("ant", "decode"): {
            "opt-1.3b": PublishedFigure(25_779_238, 145_879, 22_139),
            "phi-2": PublishedFigure(51_998_112, 294_259, 44_668),
            "yi-6b": PublishedFigure(119_342_816, 669_718, 97_934),
            "llama-2-7b": PublishedFigure(129_497_936, 732_882, 111_292),
            "llama-2-13b": PublishedFigure(251_907_680, 1_425_302, 216_575),
            "llama-3-8b": PublishedFigure(132_370_576, 760_225, 125_750),
        },
        ("olive", "decode"): {
            "opt-1.3b": PublishedFigure(20_018_374, 119_339, 23_250),
            "phi-2": PublishedFigure(41_655_712, 246_787, 46_840),
            "yi-6b": PublishedFigure(96_691_936, 567_264, 104_204),
            "llama-2-7b": PublishedFigure(97_236_816, 582_192, 115_455),
            "llama-2-13b": PublishedFigure(189_155_680, 1_133_377, 225_859),
            "llama-3-8b": PublishedFigure(105_031_744, 624_942, 131_179),
        },
        ("bitmod-lossy", "decode"): {
            "opt-1.3b": PublishedFigure(15_857_750, 86_588, 10_470),
            "phi-2": PublishedFigure(31_959_712, 174_535, 21_129),
            "yi-6b": PublishedFigure(69_662_944, 380_148, 46_198),
            "llama-2-7b": PublishedFigure(79_493_200, 434_198, 52_631),
            "llama-2-13b": PublishedFigure(154_552_560, 844_271, 102_418),
            "llama-3-8b": PublishedFigure(90_099_088, 491_953, 59_753),
        },
        ("bitmod-lossless", "decode"): {
            "opt-1.3b": PublishedFigure(31_220_054, 165_547, 15_691),
            "phi-2": PublishedFigure(62_986_912, 334_000, 31_662),
            "yi-6b": PublishedFigure(137_681_120, 729_367, 69_245),
            "llama-2-7b": PublishedFigure(156_919_888, 832_097, 78_882),
            "llama-2-13b": PublishedFigure(305_157_360, 1_618_257, 153_502),
            "llama-3-8b": PublishedFigure(178_109_840, 943_899, 89_561),
        },
    },
    "published-2025": {
        ("fp16", "prefill"): {
            "opt-1.3b": PublishedFigure(530_843_648, 2_149_855, 502_391),
            "phi-2": PublishedFigure(1_177_255_936, 5_402_248, 1_022_097),
            "llama-2-7b": PublishedFigure(2_810_544_128, 13_860_666, 2_536_419),
            "llama-2-13b": PublishedFigure(5_999_452_160, 32_511_495, 4_972_121),
        },
        ("ant", "prefill"): {
            "opt-1.3b": PublishedFigure(341_098_496, 956_433, 348_005),
            "phi-2": PublishedFigure(686_555_136, 2_235_806, 704_996),
            "llama-2-7b": PublishedFigure(1_687_420_928, 5_537_425, 1_747_118),
            "llama-2-13b": PublishedFigure(3_278_438_400, 10_739_532, 3_391_308),
        },
        ("olive", "prefill"): {
            "opt-1.3b": PublishedFigure(305_217_536, 882_398, 368_428),
            "phi-2": PublishedFigure(618_049_536, 2_022_811, 751_033),
            "llama-2-7b": PublishedFigure(1_505_918_976, 4_952_392, 1_846_989),
            "llama-2-13b": PublishedFigure(2_929_991_680, 10_957_749, 3_609_525),
        },
        ("bitmod-lossy", "prefill"): {
            "opt-1.3b": PublishedFigure(177_233_920, 667_152, 169_927),
            "phi-2": PublishedFigure(383_598_592, 1_599_582, 344_330),
            "llama-2-7b": PublishedFigure(926_097_408, 3_925_596, 847_850),
            "llama-2-13b": PublishedFigure(1_936_271_360, 8_998_392, 1_655_106),
        },
        ("bitmod-lossless", "prefill"): {
            "opt-1.3b": PublishedFigure(259_166_208, 928_183, 242_043),
            "phi-2": PublishedFigure(562_184_192, 2_264_480, 491_166),
            "llama-2-7b": PublishedFigure(1_372_856_320, 5_662_493, 1_214_940),
            "llama-2-13b": PublishedFigure(2_872_207_360, 13_083_705, 2_375_227),
        },
        ("fp16", "decode"): {
            "opt-1.3b": PublishedFigure(83_594_438, 427_316, 26_063),
            "phi-2": PublishedFigure(168_238_368, 860_220, 52_676),
            "llama-2-7b": PublishedFigure(417_344_208, 2_133_426, 130_174),
            "llama-2-13b": PublishedFigure(810_102_800, 4_141_194, 252_700),
        },
        ("ant", "decode"): {
            "opt-1.3b": PublishedFigure(27_265_990, 153_372, 22_496),
            "phi-2": PublishedFigure(54_471_968, 306_932, 45_466),
            "llama-2-7b": PublishedFigure(133_446_352, 752_794, 112_251),
            "llama-2-13b": PublishedFigure(207_683_600, 1_210_137, 213_256),
        },
        ("olive", "decode"): {
            "opt-1.3b": PublishedFigure(22_145_222, 129_997, 23_700),
            "phi-2": PublishedFigure(44_129_568, 259_598, 47_776),
            "llama-2-7b": PublishedFigure(107_637_456, 633_551, 116_891),
            "llama-2-13b": PublishedFigure(207_683_600, 1_224_854, 227_973),
        },
        ("bitmod-lossy", "decode"): {
            "opt-1.3b": PublishedFigure(16_558_070, 90_286, 10_807),
            "phi-2": PublishedFigure(33_122_848, 180_858, 21_868),
            "llama-2-7b": PublishedFigure(81_344_464, 443_984, 53_531),
            "llama-2-13b": PublishedFigure(157_342_800, 858_969, 103_724),
        },
        ("bitmod-lossless", "decode"): {
            "opt-1.3b": PublishedFigure(31_920_374, 169_223, 16_006),
            "phi-2": PublishedFigure(64_150_048, 340_289, 32_369),
            "llama-2-7b": PublishedFigure(158_771_152, 841_828, 79_726),
            "llama-2-13b": PublishedFigure(307_947_600, 1_632_824, 154_675),
        },
    },
}
"""By state, (accelerator, phase) and model."""

MEAN_RATIOS: Mapping[str, Mapping[tuple[Quantity, str, str], MeanRatio]] = {
    "published": {
        ("speed", "bitmod-lossy", "ant"): MeanRatio(1.723, 1.660),
        ("speed", "bitmod-lossy", "olive"): MeanRatio(1.560, 1.388),
        ("speed", "bitmod-lossy", "fp16"): MeanRatio(2.823, 4.176),
        ("speed", "bitmod-lossless", "fp16"): MeanRatio(1.989, 2.408),
        ("energy", "bitmod-lossy", "ant"): MeanRatio(1.403, 1.572),
        ("energy", "bitmod-lossy", "olive"): MeanRatio(1.303, 1.346),
        ("energy", "bitmod-lossy", "fp16"): MeanRatio(2.985, 4.153),
        ("energy", "bitmod-lossless", "fp16"): MeanRatio(2.200, 2.437),
    },
    "published-2025": {
        ("speed", "bitmod-lossy", "ant"): MeanRatio(1.786, 1.668),
        ("speed", "bitmod-lossy", "olive"): MeanRatio(1.598, 1.439),
        ("speed", "bitmod-lossy", "fp16"): MeanRatio(3.069, 4.371),
        ("speed", "bitmod-lossless", "fp16"): MeanRatio(2.078, 2.460),
        ("energy", "bitmod-lossy", "ant"): MeanRatio(1.375, 1.570),
        ("energy", "bitmod-lossy", "olive"): MeanRatio(1.269, 1.394),
        ("energy", "bitmod-lossy", "fp16"): MeanRatio(3.479, 4.394),
        ("energy", "bitmod-lossless", "fp16"): MeanRatio(2.425, 2.507),
    },
}
"""By state and (quantity, accelerator, other)."""

HEADLINES: tuple[Headline, ...] = (
    Headline("speed", "bitmod-lossless", "fp16", "prefill", 1.99),
    Headline("speed", "bitmod-lossless", "fp16", "with_20_tokens", 2.41),
    Headline("speed", "bitmod-lossy", "ant", "prefill", 1.72),
    Headline("speed", "bitmod-lossy", "ant", "with_20_tokens", 1.66),
    Headline("speed", "bitmod-lossy", "olive", "prefill", 1.56),
    Headline("speed", "bitmod-lossy", "olive", "with_20_tokens", 1.39),
    Headline("energy", "bitmod-lossless", "fp16", "both", 2.31),
    Headline("energy", "bitmod-lossy", "ant", "both", 1.48),
    Headline("energy", "bitmod-lossy", "olive", "both", 1.31),
)
"""The ratios of the paper, which all come from the state of November 2024."""

LLAMA_2_7B_2025_PARTS: Mapping[tuple[str, Phase], tuple[int, int, int, int]] = {
    ("fp16", "prefill"): (2035093, 402927, 98398, 11324247),
    ("fp16", "decode"): (92504, 21380, 16290, 2003252),
    ("bitmod-lossy", "prefill"): (724824, 96457, 26569, 3077746),
    ("bitmod-lossy", "decode"): (45302, 4838, 3391, 390453),
}
"""Energy of Llama-2-7B in the state of July 2025 in µJ: PEs, buffer reads, buffer writes, DRAM."""


class OliveRatio(NamedTuple):
    """A speed ratio of OliVe's own evaluation: over which design, how large, and on which model of the hardware."""

    other: str
    printed: float
    platform: Literal["GPU", "systolic array"]


OLIVE_RATIOS: tuple[OliveRatio, ...] = (
    OliveRatio("GOBO", 4.5, "GPU"),
    OliveRatio("int8", 2.7, "GPU"),
    OliveRatio("ANT", 2.4, "GPU"),
    OliveRatio("AdaFloat", 4.8, "systolic array"),
    OliveRatio("OLAccel", 3.8, "systolic array"),
    OliveRatio("ANT", 3.7, "systolic array"),
)
"""OliVe (ISCA 2023), evaluation. Nothing here computes them; reports/published-vs-cycle says why."""
