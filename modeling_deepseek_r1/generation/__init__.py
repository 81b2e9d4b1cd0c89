"""Generation beyond a plain `model.generate()`."""

from ..attention.segments import SegmentedCache
from .candidates import CandidateOutput, HierarchicalCandidates, generate_candidates
from .compiled import compiled_decoding
from .conversation import Conversation
from .evaluators import EmbeddingEvaluator, RewardEvaluator
from .packed import pack_weights
from .selection import Candidate, PromptCandidates

__all__ = [
    "Candidate",
    "CandidateOutput",
    "Conversation",
    "EmbeddingEvaluator",
    "HierarchicalCandidates",
    "PromptCandidates",
    "RewardEvaluator",
    "SegmentedCache",
    "compiled_decoding",
    "generate_candidates",
    "pack_weights",
]
