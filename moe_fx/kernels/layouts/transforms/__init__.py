"""The built-in transforms, each registered by the decorator in its own file."""

from moe_fx.kernels.layouts.transforms.aiter_scales import AiterScales
from moe_fx.kernels.layouts.transforms.aiter_shuffle import AiterLanes, AiterShuffle
from moe_fx.kernels.layouts.transforms.block_major_k import BlockMajorK
from moe_fx.kernels.layouts.transforms.cast import Cast
from moe_fx.kernels.layouts.transforms.clamp import Clamp
from moe_fx.kernels.layouts.transforms.column_major import ColumnMajor
from moe_fx.kernels.layouts.transforms.deinterleave_rows import DeinterleaveRows
from moe_fx.kernels.layouts.transforms.expand_rows import ExpandRows
from moe_fx.kernels.layouts.transforms.flatten import Flatten
from moe_fx.kernels.layouts.transforms.flip_bits import FlipBits
from moe_fx.kernels.layouts.transforms.interleave_rows import InterleaveRows
from moe_fx.kernels.layouts.transforms.marlin_exponent import MarlinExponent
from moe_fx.kernels.layouts.transforms.marlin_s0e5m3 import MarlinS0E5M3
from moe_fx.kernels.layouts.transforms.marlin_scales import MarlinBias, MarlinByteScales, MarlinScales
from moe_fx.kernels.layouts.transforms.marlin_weights import MarlinWeights
from moe_fx.kernels.layouts.transforms.pack_e8m0 import PackE8M0
from moe_fx.kernels.layouts.transforms.pack_nibbles import PackNibbles
from moe_fx.kernels.layouts.transforms.pad import Pad
from moe_fx.kernels.layouts.transforms.registry import TRANSFORMS, Transform, find_transform, span, transform
from moe_fx.kernels.layouts.transforms.requantise_ue8m0 import RequantiseCodes, RequantiseScales, requantise
from moe_fx.kernels.layouts.transforms.shuffle_matrix_a import ShuffleMatrixA
from moe_fx.kernels.layouts.transforms.swap_halves import SwapHalves
from moe_fx.kernels.layouts.transforms.swizzle_128x4 import Swizzle128x4
from moe_fx.kernels.layouts.transforms.transpose import Transpose
from moe_fx.kernels.layouts.transforms.vnni import Vnni, VnniInt8, VnniNibbles
from moe_fx.kernels.layouts.transforms.whole_blocks import WholeBlocks

__all__ = [
    "TRANSFORMS",
    "AiterLanes",
    "AiterScales",
    "AiterShuffle",
    "BlockMajorK",
    "Cast",
    "Clamp",
    "ColumnMajor",
    "DeinterleaveRows",
    "ExpandRows",
    "Flatten",
    "FlipBits",
    "InterleaveRows",
    "MarlinBias",
    "MarlinByteScales",
    "MarlinExponent",
    "MarlinS0E5M3",
    "MarlinScales",
    "MarlinWeights",
    "PackE8M0",
    "PackNibbles",
    "Pad",
    "RequantiseCodes",
    "RequantiseScales",
    "ShuffleMatrixA",
    "SwapHalves",
    "Swizzle128x4",
    "Transform",
    "Transpose",
    "Vnni",
    "VnniInt8",
    "VnniNibbles",
    "WholeBlocks",
    "find_transform",
    "requantise",
    "span",
    "transform",
]
